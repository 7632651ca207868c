"""What the scripts must never do: pass without having tested."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmhost.catalogue import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """scripts/test among stand-ins for what it calls: each writes its words to `called`, and `refuses` fails."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test", tmp_path / "scripts/test")
    for name in ("scripts/setup", "scripts/lint", ".venv/bin/python", ".venv/bin/pytest"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>called\n! grep -qsF -- "$2" refuses\n')
        program.chmod(0o755)
    return tmp_path


def run(checkout: Path, *parts: str, refuses: str = "") -> tuple[int, str]:
    (checkout / "refuses").write_text(refuses)
    ended = subprocess.run([checkout / "scripts/test", *parts], capture_output=True, text=True)
    return ended.returncode, (checkout / "called").read_text() if (checkout / "called").exists() else ended.stderr


def test_all_parts_are_run_in_order(checkout: Path) -> None:
    code, called = run(checkout)
    assert code == 0
    assert called.index("scripts/lint") < called.index("lab.mirror prepare") < called.index("pytest tests/unit")
    assert ".venv/bin/pytest tests/unit tests/plan tests/lab" in called


@pytest.mark.parametrize("refuses", ["lab.demo", "lab.mirror"])
def test_a_lab_that_cannot_be_prepared_fails(checkout: Path, refuses: str) -> None:
    code, called = run(checkout, "unit", "lab", refuses=refuses)
    assert code != 0
    assert "pytest" not in called


def test_parts_and_options_are_handed_on(checkout: Path) -> None:
    code, called = run(checkout, "plan", "--", "-k", "golden")
    assert code == 0
    assert "pytest tests/plan -ra --durations=15 -k golden" in called
    assert "lab" not in called


def test_a_part_that_does_not_exist_is_named(checkout: Path) -> None:
    code, said = run(checkout, "units")
    assert code == 2
    assert "no part 'units'" in said
