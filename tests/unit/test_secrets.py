"""runtime/secrets: what it generates, keeps and takes, and what it never says."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmhost.catalogue import ROOT
from llmhost.settings import Layer, load, supplied_secrets

PROGRAM = ROOT / "runtime/secrets"
FILES = ("hub.env", "open-webui.env", "vllm.env")
GENERATED = ["OPENAI_API_KEY", "VLLM_API_KEY", "WEBUI_ADMIN_PASSWORD", "WEBUI_SECRET_KEY"]
KEY, PASSWORD, TOKEN = "supplied-key-of-the-engine-1", "supplied-password-2", "hf_supplied-token-3"


def run(directory: Path, *arguments: str, stdin: str = "{}", **options: Any) -> subprocess.CompletedProcess[str]:
    """One run of the program, which must not say a value, whether it succeeds or not."""
    environment = {**os.environ, "LLMHOST_SECRETS": str(directory)}
    command = [sys.executable, str(PROGRAM), *arguments]
    ended = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=30, **options)
    told = ended.stdout + ended.stderr
    assert not [value for value in values(directory).values() if value in told]
    return ended


def apply(directory: Path, **supplied: str) -> list[str]:
    return changes(run(directory, "apply", stdin=json.dumps(supplied)))


def check(directory: Path, **supplied: str) -> list[str]:
    return changes(run(directory, "check", stdin=json.dumps(supplied)))


def changes(ended: subprocess.CompletedProcess[str]) -> list[str]:
    assert ended.returncode == 0, ended.stderr
    return list(json.loads(ended.stdout)["changes"])


def values(directory: Path) -> dict[str, str]:
    """Every secret there, by name; files are read as systemd reads an EnvironmentFile without quotes."""
    lines = [line for file in sorted(directory.glob("*.env")) for line in file.read_text().splitlines()]
    return {name: value for name, _, value in (line.partition("=") for line in lines if not line.startswith("#"))}


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "secrets"


def test_what_is_missing_is_generated_once_and_kept(directory: Path) -> None:
    assert check(directory) == sorted([*GENERATED, *FILES, "secrets/"])
    assert not directory.exists()
    apply(directory)
    first = values(directory)
    assert sorted(first) == GENERATED
    assert all(len(value) >= 22 for value in first.values())  # 128 bits
    assert check(directory) == []
    assert apply(directory) == []
    assert values(directory) == first


def test_an_open_directory_is_noticed_and_closed(directory: Path) -> None:
    apply(directory)
    directory.chmod(0o755)
    assert check(directory) == ["secrets/"]
    apply(directory)
    assert check(directory) == []
    assert directory.stat().st_mode & 0o777 == 0o700


def test_two_hosts_have_nothing_in_common(tmp_path: Path) -> None:
    apply(tmp_path / "one")
    apply(tmp_path / "two")
    assert not set(values(tmp_path / "one").values()) & set(values(tmp_path / "two").values())


def test_the_engine_and_its_client_have_one_key(directory: Path) -> None:
    apply(directory)
    assert values(directory)["OPENAI_API_KEY"] == values(directory)["VLLM_API_KEY"]
    assert apply(directory, VLLM_API_KEY=KEY) == ["OPENAI_API_KEY", "VLLM_API_KEY"]
    assert values(directory)["OPENAI_API_KEY"] == values(directory)["VLLM_API_KEY"] == KEY


def test_supplied_values_win_and_stay(directory: Path) -> None:
    apply(directory)
    generated = values(directory)["WEBUI_SECRET_KEY"]
    apply(directory, VLLM_API_KEY=KEY, WEBUI_ADMIN_PASSWORD=PASSWORD, HF_TOKEN=TOKEN)
    assert values(directory) == {
        "VLLM_API_KEY": KEY,
        "OPENAI_API_KEY": KEY,
        "WEBUI_ADMIN_PASSWORD": PASSWORD,
        "HF_TOKEN": TOKEN,
        "WEBUI_SECRET_KEY": generated,
    }
    assert check(directory, HF_TOKEN=TOKEN) == []


def test_a_token_no_longer_supplied_is_removed(directory: Path) -> None:
    apply(directory, HF_TOKEN=TOKEN)
    assert apply(directory) == ["HF_TOKEN"]
    assert TOKEN not in "".join(contents(directory).values())


def test_only_root_can_read(directory: Path) -> None:
    old = os.umask(0)
    try:
        apply(directory)
    finally:
        os.umask(old)
    assert modes(directory) == {"secrets": 0o700, **dict.fromkeys(FILES, 0o600)}


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.iterdir())}


@pytest.mark.parametrize("name", FILES)
def test_a_file_open_to_others_is_closed(directory: Path, name: str) -> None:
    apply(directory)
    before = values(directory)
    (directory / name).chmod(0o644)
    assert check(directory) == [name]
    assert apply(directory) == [name]
    assert modes(directory)[name] == 0o600
    assert values(directory) == before


@pytest.mark.parametrize("name", FILES)
def test_a_run_killed_between_two_files_is_mended_by_the_next(directory: Path, name: str) -> None:
    """hub.env too, though it holds nothing without a token: fetching a model reads it."""
    apply(directory)
    (directory / name).unlink()
    assert name in check(directory)
    apply(directory)
    assert sorted(contents(directory)) == sorted(FILES)
    assert check(directory) == []


def test_a_write_that_fails_leaves_the_old(directory: Path) -> None:
    apply(directory)
    before = contents(directory)
    full = run(
        directory,
        "apply",
        stdin=json.dumps({"VLLM_API_KEY": KEY}),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)),
    )
    assert full.returncode != 0
    assert KEY not in full.stdout + full.stderr
    assert {name: text for name, text in contents(directory).items() if name in FILES} == before
    assert apply(directory, VLLM_API_KEY=KEY) == ["OPENAI_API_KEY", "VLLM_API_KEY"]
    assert sorted(contents(directory)) == sorted(FILES)


def test_a_part_that_a_killed_run_left_is_not_written_through(directory: Path, tmp_path: Path) -> None:
    """A link in its place must not lead the value elsewhere, nor a readable file keep its mode."""
    directory.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    (directory / "vllm.env.llmhost-part").symlink_to(elsewhere)
    (directory / "open-webui.env.llmhost-part").write_text("half a line")
    (directory / "open-webui.env.llmhost-part").chmod(0o644)
    apply(directory)
    assert elsewhere.read_text() == ""
    assert modes(directory) == {"secrets": 0o700, **dict.fromkeys(FILES, 0o600)}


@pytest.mark.parametrize("arguments", [(), ("show",), ("apply", json.dumps({"VLLM_API_KEY": KEY})), ("apply", KEY)])
def test_values_do_not_come_as_arguments(directory: Path, arguments: tuple[str, ...]) -> None:
    assert run(directory, *arguments).returncode != 0
    assert not directory.exists()


@pytest.mark.parametrize("stdin", ["", f"VLLM_API_KEY={KEY}", f'{{"VLLM_API_KEY": "{KEY}"'])
def test_other_input_than_json_changes_nothing_and_is_not_repeated(directory: Path, stdin: str) -> None:
    ended = run(directory, "apply", stdin=stdin)
    assert ended.returncode != 0
    assert KEY not in ended.stdout + ended.stderr
    assert not directory.exists()


ALLOWED = st.text("abcXYZ019._+/=:@%^,-", min_size=22, max_size=64)


@settings(max_examples=15, deadline=None)
@given(key=ALLOWED, password=ALLOWED, token=ALLOWED)
@example(key="=" * 22, password="a==b=%s%n-,^@:/+..======", token="hf_" + "-" * 30)
def test_every_value_that_settings_allow_arrives_as_it_is(key: str, password: str, token: str) -> None:
    """Through the schema, into the files, and back as systemd would hand it to the services."""
    given_settings = {"engine_api_key": key, "webui_admin_password": password, "model_hub_token": token}
    supplied = supplied_secrets(load([Layer("inventory", given_settings)]).settings)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "secrets"
        apply(directory, **supplied)
        seen = values(directory)
        assert (seen["VLLM_API_KEY"], seen["OPENAI_API_KEY"]) == (key, key)
        assert (seen["WEBUI_ADMIN_PASSWORD"], seen["HF_TOKEN"]) == (password, token)
        assert check(directory, **supplied) == []
