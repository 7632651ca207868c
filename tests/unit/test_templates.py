"""What the templates write, read back by the parsers of those who will read it on the host."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import pytest
import yaml

from llmhost.addresses import Archive, Repository
from llmhost.catalogue import ROOT
from llmhost.plan.host import plan
from llmhost.plan.model import EnginePlan, WebuiPlan
from llmhost.plan.webui import REASONS
from llmhost.render import render
from llmhost.settings import Layer, load
from tests.plan.test_driver_tasks_fake import DOCKER, DRIVER
from tests.recorded import bare

TEMPLATES = sorted(path.relative_to(ROOT / "templates") for path in (ROOT / "templates").rglob("*.j2"))
PATHS = [f"/{path.with_suffix('').as_posix()}" for path in TEMPLATES]
UNITS = ("vllm.service", "open-webui.service", "llmhost.target")
# As systemd-analyze security counts, 0.0 to 10.0; the engine keeps what compiled kernels need.
MOST_EXPOSED = {"vllm.service": 3.0, "open-webui.service": 2.0}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def planned(**data: Any) -> tuple[EnginePlan, WebuiPlan]:
    made = plan(load([Layer("group_data/all.py", data)]), bare(), "box")
    assert made.engine and made.webui
    return made.engine, made.webui


def written(path: str, **data: Any) -> str:
    """What a host gets at `path`; the values are those of tasks/."""
    engine, webui = planned(**data)
    return render(path, engine=engine, webui=webui, webui_reasons=REASONS, **OTHER_VALUES)


# Of templates whose plan the bare host, which has no GPU and asks the vendors directly, does not have.
OTHER_VALUES: dict[str, Any] = {
    "archive": Archive("http://m/debian", "http://m/security", ("trixie",), "trixie-security", ("main",), "/k.gpg", ()),
    "direct": ["localhost"],
    "dropin": "/etc/systemd/system/nvidia-persistenced.service.d/llmhost.conf",
    "entries": [Repository(("http://m/debian",), ("trixie",), ("contrib",), "/k.gpg")],
    "extra": ("ib_umad",),
    "frozen": DRIVER.frozen,
    "inputs": ("/etc/docker/daemon.json",),
    "pins": DRIVER.pins,
    "proxies": {"http_proxy": "http://proxy:3128"},
    "source": DOCKER,
}


@pytest.mark.parametrize("path", PATHS)
def test_every_template_renders_and_names_its_source(path: str) -> None:
    text = written(path)
    source = f"templates{path}.j2"
    assert text.splitlines()[0] == f"# llmhost: {source} - written by pyinfra, changes here are overwritten."
    assert (ROOT / source).is_file()
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert "{{" not in text and "{%" not in text


def test_a_value_that_the_plan_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="engine"):
        render("/etc/llmhost/vllm.yaml")


@pytest.mark.parametrize("data", [{}, {"engine_publish": True, "engine_context_tokens": 4096}], ids=["plain", "set"])
def test_the_engine_reads_the_planned_flags(data: dict[str, Any]) -> None:
    assert yaml.safe_load(written("/etc/llmhost/vllm.yaml", **data)) == planned(**data)[0].flags


@pytest.mark.parametrize("value", ["no", "1e3", "a: b", "# c", "{d}", "it's", 'a "quote"', "back\\slash", "é", ""])
def test_a_flag_keeps_its_type_and_text(value: str) -> None:
    """YAML has many ways to take a text for something else."""
    engine, _ = planned()
    odd = dataclasses.replace(engine, flags={"text": value, "flag": True, "number": 8, "none": None})
    assert yaml.safe_load(render("/etc/llmhost/vllm.yaml", engine=odd)) == odd.flags


def test_the_engine_gets_the_planned_environment() -> None:
    assert environment(written("/etc/llmhost/vllm.env")) == planned()[0].environment


@pytest.mark.parametrize("name", ["Administrator", "Ada O'Hara", 'the "boss"', "a\\b", "$HOME", "#1"])
def test_open_webui_gets_the_planned_environment(name: str) -> None:
    text = written("/etc/llmhost/open-webui.env", webui_admin_name=name)
    assert environment(text) == planned(webui_admin_name=name)[1].environment


def environment(text: str) -> dict[str, str]:
    """As systemd reads an EnvironmentFile; for what is written here a POSIX shell reads it so too."""
    printed = "set -a; . /dev/stdin; exec env -0"
    clean = subprocess.run(
        ["env", "-i", "/bin/sh", "-c", printed], input=text, capture_output=True, text=True, check=True
    )
    seen = dict(entry.split("=", 1) for entry in clean.stdout.split("\0") if entry)
    return {name: value for name, value in seen.items() if name not in ("PWD", "OLDPWD", "SHLVL", "_")}


@pytest.mark.parametrize("unit", ["vllm.service", "open-webui.service"])
def test_a_unit_records_what_the_plan_says_it_depends_on(unit: str) -> None:
    """A file that is read but not recorded would never lead to a restart."""
    engine, webui = planned()
    service = {plan.service.unit: plan.service for plan in (engine, webui)}[unit]
    text = written(f"/etc/systemd/system/{unit}")
    (recorded,) = re.findall(r"^ExecStartPre=\+\S+/inputs record %n (.*)$", text, re.MULTILINE)
    assert tuple(recorded.split()) == service.inputs
    read = re.findall(r"^EnvironmentFile=(.*)$", text, re.MULTILINE) + re.findall(r"--config (\S+)", text)
    assert set(read) <= set(service.inputs)
    assert f"--timeout {service.start_timeout_seconds} " in text


# --- systemd's own parser ---------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system that holds the units and everything they start."""
    for unit in UNITS:
        write(tmp_path, f"/etc/systemd/system/{unit}", written(f"/etc/systemd/system/{unit}"))
    engine, webui = planned()
    programs = [f"{engine.release.path}/venv/bin/vllm", f"{webui.release.path}/venv/bin/open-webui"]
    programs += [f"/usr/local/lib/llmhost/{name}" for name in ("inputs", "wait-ready")]
    for program in programs:
        write(tmp_path, program, "#!/bin/sh\n", 0o755)
    for target in ("basic", "sysinit", "shutdown", "multi-user", "network-online"):
        write(tmp_path, f"/usr/lib/systemd/system/{target}.target", f"[Unit]\nDescription={target}\n")
    return tmp_path


def write(root: Path, path: str, text: str, mode: int = 0o644) -> None:
    file = root / PurePosixPath(path).relative_to("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def verify(root: Path, unit: str) -> str:
    """What systemd has to say against a unit."""
    command = ["systemd-analyze", "verify", f"--root={root}", "--man=no", f"/etc/systemd/system/{unit}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.stderr if ended.returncode or unit in ended.stderr else ""


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_every_line(root: Path, unit: str) -> None:
    assert verify(root, unit) == ""


@needs_systemd
def test_a_line_that_systemd_would_not_take_is_seen(root: Path) -> None:
    """This test's own proof: verify says so."""
    text = written("/etc/systemd/system/vllm.service").replace("ProtectHome=", "ProtectHouse=")
    write(root, "/etc/systemd/system/vllm.service", text)
    assert "ProtectHouse" in verify(root, "vllm.service")


@needs_systemd
@pytest.mark.parametrize("unit", MOST_EXPOSED)
def test_services_are_confined(root: Path, unit: str) -> None:
    assert exposure(root, unit) <= MOST_EXPOSED[unit]


@needs_systemd
def test_a_service_that_gives_up_its_confinement_is_seen(root: Path) -> None:
    confined = written("/etc/systemd/system/vllm.service")
    bare_unit = re.sub(r"^(Protect|Private|Restrict|SystemCall|Capability|NoNew).*\n", "", confined, flags=re.MULTILINE)
    write(root, "/etc/systemd/system/vllm.service", bare_unit)
    assert exposure(root, "vllm.service") > MOST_EXPOSED["vllm.service"]


def exposure(root: Path, unit: str) -> float:
    command = [
        "systemd-analyze",
        "security",
        "--offline=yes",
        f"--root={root}",
        "--no-pager",
        f"/etc/systemd/system/{unit}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (level,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", ended.stdout + ended.stderr)
    return float(level)


def test_the_plan_on_the_host_is_the_plan() -> None:
    made = plan(load([]), bare(), "box")
    assert json.loads(json.dumps(made.as_json()))["hash"] == made.hash
