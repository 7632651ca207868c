"""What an operator sees of settings: accepted, or refused with name, source and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.catalogue import ROOT
from llmhost.settings import (
    PYINFRA_NAMES,
    PYINFRA_PREFIXES,
    Layer,
    Settings,
    SettingsError,
    load,
    markdown,
    secret_names,
    supplied_secrets,
)


def refused(**data: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load([Layer("group_data/all.py", data)])
    return str(caught.value)


def test_nothing_set_is_complete() -> None:
    loaded = load([])
    assert (loaded.settings.engine_port, loaded.settings.webui_port) == (8000, 7860)
    assert loaded.source("engine_port") == "default"


def test_the_strongest_layer_wins_and_is_named() -> None:
    loaded = load([Layer("--data", {"engine_port": 8001}), Layer("group_data/all.py", {"engine_port": 8002})])
    assert (loaded.settings.engine_port, loaded.source("engine_port")) == (8001, "--data")


def test_names_of_pyinfra_are_not_settings() -> None:
    load([Layer("home.py", {"ssh_user": "root", "_sudo": True, "ssh_paramiko_connect_kwargs": {}})])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"enigne_port": 8000}, ["enigne_port", "group_data/all.py", "no such setting", "Did you mean engine_port?"]),
        ({"zzz": 1}, ["zzz", "docs/settings.md"]),
        ({"engine_port": "8000"}, ["engine_port", "valid integer", "'8000'", "TCP port"]),
        ({"engine_port": 80}, ["engine_port", "1024", "80"]),
        ({"engine_publish": "yes"}, ["engine_publish", "valid boolean", "'yes'"]),
        ({"engine_context_tokens": "8k"}, ["engine_context_tokens", "valid integer", "'8k'", "in tokens"]),
        ({"engine_gpu_memory_utilization": 90}, ["engine_gpu_memory_utilization", "0.98", "90"]),
        ({"accelerator": "gpu"}, ["accelerator", "'auto', 'cpu' or 'nvidia'", "'gpu'"]),
        ({"model_revision": "main"}, ["model_revision", "40 hexadecimal digits", "'main'"]),
        ({"mirror_hub": "hf-mirror"}, ["mirror_hub", "expected a URL", "'hf-mirror'"]),
        ({"model": "$(id)/x"}, ["model", "owner/name"]),
        ({"model": "../x/y"}, ["model", "absolute path"]),
        ({"webui_admin_email": "me"}, ["webui_admin_email", "e-mail address", "'me'"]),
        ({"driver_branch": "515"}, ["driver_branch", "515 is end of life; its successor is 580", "'515'"]),
        ({"driver_branch": "590"}, ["driver_branch", "its successor is 595"]),
        ({"driver_branch": "581"}, ["driver_branch", "no branch 581", "580, 595, 615"]),
        ({"cuda_toolkit_version": 13}, ["cuda_toolkit_version", "such as 13.0"]),
        ({"container_toolkit_version": "1.17.3"}, ["container_toolkit_version", "CVE-2026-24260", "1.19.1 or newer"]),
        ({"container_toolkit_version": "latest"}, ["container_toolkit_version", "such as 1.20.0"]),
        ({"mirror_cuda_key": ""}, ["mirror_cuda_key", "without a key", "vendor"]),
        ({"mirror_docker_key": "keys/mine.asc"}, ["mirror_docker_key", "absolute path"]),
        ({"docker_sorce": "none"}, ["docker_sorce", "Did you mean docker_source?"]),
        ({"container_toolkit_version": 1.2}, ["container_toolkit_version", "in quotes, such as 1.20.0", "got 1.2"]),
        ({"container_toolkit_version": "1.\uff12\uff10.0"}, ["container_toolkit_version", "such as 1.20.0"]),
        ({"driver_branch": True}, ["driver_branch", "expected one of 580, 595, 615", "got True"]),
        ({"driver_branch": 580.5}, ["driver_branch", "there is no branch 580.5", "580, 595, 615"]),
        ({"driver_branch": ["580"]}, ["driver_branch", "expected one of 580, 595, 615"]),
        ({"cuda_toolkit_version": True}, ["cuda_toolkit_version", "such as 13.0, in quotes"]),
        ({"mirror_registry": "https://mirror.example/hub"}, ["mirror_registry", "without a path", "/hub"]),
        ({"proxy_https": "proxy:3128"}, ["proxy_https", "expected a URL"]),
        ({"proxy_bypass": "a b"}, ["proxy_bypass", "separated by commas"]),
    ],
)
def test_bad_input_is_explained(data: dict[str, Any], words: list[str]) -> None:
    message = refused(**data)
    assert [word for word in words if word not in message] == []


URLS = sorted(name for name in Settings.model_fields if re.match("mirror_|proxy_http", name) and name[-4:] != "_key")
NEEDED = [name for name in URLS if Settings.model_fields[name].default and name != "proxy_bypass"]


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    "url",
    [
        "https://mirror.example/\nApt::Get::AllowUnauthenticated true",
        "https://mirror.example\n",
        "https://mirror.example/a b",
        'https://mirror.example/"; DPkg::Pre-Invoke { "id"; };',
        "https://mirror.example/'",
        "https://mirror.example/;",
        "https://mirror.example/{}",
        "https://mirror.example\\evil.example/",
        "https://mirror.example/%zz",
        "https://mirror.example:0/",
        "https://mirror.example:65536/",
        "https://mirror.example:port/",
        "https://:8080/",
        "https://[::1/",
        "https:///simple",
        "https://[1:2]/",
        "https://mirror.example:\u0663\u0661/",
        "ftp://mirror.example/",
        "https://mirror.example/\u00e4",
    ],
)
def test_what_is_no_plain_url_never_reaches_a_hosts_configuration(name: str, url: str) -> None:
    message = refused(**{name: url})
    assert all(
        words in message for words in (name, "expected a URL such as https://mirror.example/", "host name", "port")
    )


@pytest.mark.parametrize("name", [name for name in URLS if name != "mirror_registry"])
@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:3128",
        "https://[2001:db8::1]:8443/pypi/simple/",
        "https://mirror.example/a%20b/~x/v1.0_2+cu130/",
        "https://pypi_proxy.example/simple",
    ],
)
def test_plain_urls_are_taken(name: str, url: str) -> None:
    assert getattr(load([Layer("home.py", {name: url})]).settings, name) == url


@pytest.mark.parametrize("url", ["https://mirror.example", "http://mirror.example:5000/", ""])
def test_a_registry_is_taken_without_a_path(url: str) -> None:
    assert load([Layer("home.py", {"mirror_registry": url})]).settings.mirror_registry == url


@pytest.mark.parametrize("name", NEEDED)
def test_an_address_that_is_needed_is_not_empty(name: str) -> None:
    message = refused(**{name: ""})
    assert f"cannot be empty; its default is {Settings.model_fields[name].default}" in message


def test_the_addresses_that_are_needed() -> None:
    assert set(NEEDED) == {
        "mirror_container_toolkit",
        "mirror_cuda",
        "mirror_docker",
        "mirror_hub",
        "mirror_python_builds",
        "mirror_torch_index",
    }


def test_every_fault_is_reported_at_once() -> None:
    message = refused(enigne_port=1, engine_port="x", model_revision="main")
    assert all(name in message for name in ("enigne_port", "engine_port", "model_revision"))


@pytest.mark.parametrize(
    ("name", "value"), [("engine_api_key", "short-but-secret"), ("webui_admin_password", "x" * 73 + "secret")]
)
def test_a_refused_secret_is_not_shown(name: str, value: str) -> None:
    message = refused(**{name: value})
    assert name in message
    assert value not in message


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    message = refused(mirror_python_index="https://bob:hunter2@mirror.example/simple/")
    assert "without user and password" in message
    assert "hunter2" not in message


def test_a_number_given_for_the_driver_branch_is_taken() -> None:
    # pyinfra turns `--data driver_branch=595` into a number.
    assert load([Layer("--data", {"driver_branch": 595})]).settings.driver_branch == "595"
    assert load([Layer("--data", {"driver_branch": 580.0})]).settings.driver_branch == "580"
    assert load([Layer("--data", {"cuda_toolkit_version": 13.0})]).settings.cuda_toolkit_version == "13.0"


def test_supplied_secrets_go_by_their_name_on_the_host() -> None:
    loaded = load([Layer("home.py", {"engine_api_key": "k" * 32})])
    assert supplied_secrets(loaded.settings) == {"VLLM_API_KEY": "k" * 32}
    assert "k" * 32 not in repr(loaded)


def test_secret_names_are_known() -> None:
    assert secret_names() == ("model_hub_token", "engine_api_key", "webui_admin_password")


@given(st.dictionaries(st.text(min_size=1).filter(lambda n: not n.startswith("_")), st.integers(), min_size=1))
def test_unknown_names_never_pass(data: dict[str, int]) -> None:
    ours = {n: v for n, v in data.items() if n not in PYINFRA_NAMES and not n.startswith(PYINFRA_PREFIXES)}
    unknown = {n: v for n, v in ours.items() if n not in Settings.model_fields}
    if unknown:
        message = refused(**unknown)
        assert all(name in message for name in unknown)


def test_the_documentation_is_generated_from_the_schema() -> None:
    assert Path(ROOT, "docs/settings.md").read_text() == markdown(), (
        "run: llmhost settings --markdown > docs/settings.md"
    )
    assert all(f"`{name}`" in markdown() for name in Settings.model_fields)
