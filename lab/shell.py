"""Runs the programs that the lab is made of."""

from __future__ import annotations

import subprocess

from lab import LabError


def run(*argv: str, input_text: str | None = None) -> str:
    """The program's output; LabError with its own words where it failed."""
    done = subprocess.run(argv, input=input_text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(argv)}` failed with exit code {done.returncode}: {_last_lines(done.stderr)}")
    return done.stdout


def succeeds(*argv: str) -> bool:
    """Whether the program exits 0; for asking, and for undoing what may be undone already."""
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])
