"""Folders of the mirror's cache: each appears whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Fill = Callable[[Path], None]


@contextmanager
def exclusive(cache: Path) -> Iterator[None]:
    """Held by one preparing process at a time: two labs may come up at once."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(directory: Path, fill: Fill) -> bool:
    """Let `fill` make `directory` unless it is there; whether it had to.

    It is filled under another name and renamed: an interrupted run leaves nothing that could be taken for complete.
    """
    if directory.exists():
        return False
    for left_over in directory.parent.glob(f"{directory.name}.partial-*"):
        shutil.rmtree(left_over)
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(directory)
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
