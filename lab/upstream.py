"""The lab's stand-in for the outside world: one `python -m lab.mirror serve` per lab, bound to the lab's bridge."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lab import LabError, cgroups, images, state
from lab.images import Say
from lab.state import Lab

REPOSITORY = Path(__file__).resolve().parents[1]
MIRROR = [sys.executable, "-m", "lab.mirror"]
RELEASE_PYTHON = "3.11"  # of the engine and of Open WebUI; hosts with another python3 fetch it through uv


def prepare(systems: list[str], *, gpu: bool = False) -> None:
    """Fills the mirror's cache with what hosts of these operating systems fetch; no work where it is full."""
    argv = [*MIRROR, "prepare", "--cache", _cache()]
    if any(images.operating_system(name).python != RELEASE_PYTHON for name in systems):
        argv.append("--python-builds")
    if gpu:
        argv.append("--vendor")
    # Its progress goes where ours goes: standard output is for --json.
    if subprocess.run(argv, cwd=REPOSITORY, stdout=sys.__stderr__, check=False).returncode != 0:
        raise LabError("the mirror's cache could not be filled (see above). Hosts without a mirror: --no-mirror.")


def ensure(lab: Lab, say: Say, timeout_seconds: float = 60) -> None:
    """Starts the mirror where it does not run, and records what hosts must be told to use it."""
    leaf = state.mirror_leaf(lab.prefix)
    if lab.settings and cgroups.populated(leaf):
        return
    cgroups.kill(leaf)
    log = lab.directory / "mirror.log"
    log.unlink(missing_ok=True)
    serve = [*MIRROR, "serve", "--bind", lab.address, "--cache", _cache()]
    cgroups.spawn(leaf, serve, output=log, environment={"PYTHONPATH": str(REPOSITORY)})
    announced = _await_announcement(leaf, log, timeout_seconds)
    lab.apt_proxy, lab.settings = announced["apt_proxy"], announced["settings"]
    lab.gpu_settings = announced["gpu_settings"]
    state.save(lab)
    say(f"mirror: serves on {lab.address}, log in {log}")


def _cache() -> str:
    return str(state.cache_directory() / "mirror")


def _await_announcement(leaf: str, log: Path, timeout_seconds: float) -> dict[str, Any]:
    """The JSON line that the mirror prints once it is ready."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and cgroups.populated(leaf):
        for line in log.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                announced = json.loads(line)
                if isinstance(announced, dict) and "apt_proxy" in announced:
                    return announced
        time.sleep(0.05)  # a file tells nobody that it has grown
    tail = "\n".join(log.read_text().splitlines()[-12:])
    raise LabError(f"the mirror did not get ready within {timeout_seconds:.0f} s. The end of {log}:\n{tail}")
