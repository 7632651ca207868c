"""inventories/local.py: the machine that pyinfra runs on. A lab host gets this repository and deploys to itself."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import ssh, state
from tests.lab import spine

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the host's Python 3.11 must load this one's packages"),
]


def test_a_machine_deploys_to_itself(converged: str) -> None:
    """It finds the host as the run over SSH left it, and changes only the plan's words on where settings come from."""
    copy_repository(spine.disk(converged) / "srv/llmhost")
    settings = state.running(state.prefix_of(converged)).settings
    overrides = " ".join(f"--data {name}={shlex.quote(value)}" for name, value in settings.items())
    output = ssh.run(
        converged,
        "cd /srv/llmhost && PYTHONPATH=/srv/llmhost:/srv/llmhost/packages PATH=/srv/llmhost/packages/bin:$PATH "
        f"python3 -m pyinfra inventories/local.py deploy.py -y {overrides} 2>&1",
        timeout_seconds=120,
    )
    assert "@local: passed" in output, output
    assert re.findall(r"\[@local\] (change|create|start|restart) (\S+)", output) == [
        ("change", "/etc/llmhost/plan.json")
    ]


def copy_repository(target: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=spine.REPOSITORY, capture_output=True, text=True
    )
    for name in tracked.stdout.split():
        if (spine.REPOSITORY / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(spine.REPOSITORY / name, target / name, follow_symlinks=False)
    requirements = re.findall(
        r"^([A-Za-z0-9._-]+)==", (spine.REPOSITORY / "requirements.txt").read_text(), re.MULTILINE
    )
    for file in (file for name in requirements for file in files_of(name)):
        if ".." not in file.parts and "__pycache__" not in file.parts:
            (target / "packages" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target / "packages" / file)


def files_of(name: str) -> list[importlib.metadata.PackagePath]:
    try:
        return importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # a requirement of another operating system
