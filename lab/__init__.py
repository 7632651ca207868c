"""Disposable systemd hosts with SSH, for trials and tests: `python -m lab up`, and docs/lab.md."""

from __future__ import annotations


class LabError(Exception):
    """Why the lab cannot do what was asked, in a sentence that names the remedy."""
