"""The wheels that the locks name, fetched once with pip (and so with the user's own pip configuration)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lab import LabError
from lab.mirror import cache

LOCKS = Path(__file__).resolve().parents[2] / "locks"

# PyTorch's own index, a vendor's; asked second, since the user's configured sources may hold the wheel.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

Say = Callable[[str], None]
PROGRESS_SECONDS = 3.0
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Wheel:
    """A wheel on disk; `sha256` was seen to be one that its lock allows."""

    path: Path
    sha256: str

    @property
    def project(self) -> str:
        """The name an index lists it under (PEP 503)."""
        return re.sub(r"[-_.]+", "-", self.path.name.split("-")[0]).lower()


def locks() -> list[Path]:
    """The locks that lab hosts install: none for CUDA, whose engine none of them can run, and which weigh 4 GB each."""
    return sorted(lock for lock in LOCKS.glob("*.txt") if "cuda" not in lock.stem)


def prepare(cache_directory: Path, lock: Path, say: Say) -> None:
    """Fetch the wheels of one lock unless the cache holds them."""
    cache.ensure(folder(cache_directory, lock), partial(fetch, lock=lock, say=say))


def folder(cache_directory: Path, lock: Path) -> Path:
    """Named by the lock's own hash: another lock is another folder."""
    return cache_directory / "wheels" / f"{lock.stem}-{cache.sha256(lock)[:16]}"


def load(cache_directory: Path) -> list[Wheel]:
    """Every wheel that a host may ask for."""
    wheels = {}
    for lock in locks():
        directory = folder(cache_directory, lock)
        try:
            sums = json.loads((directory / "sha256.json").read_text())
        except FileNotFoundError:
            raise LabError(
                f"the mirror lacks the wheels of locks/{lock.name}: run `python -m lab.mirror prepare`."
            ) from None
        wheels.update({name: Wheel(directory / name, sha256) for name, sha256 in sums.items()})
    return list(wheels.values())


def fetch(directory: Path, lock: Path, say: Say) -> None:
    """Download the wheels of `lock` into `directory` and record what was verified."""
    started = time.monotonic()
    say(f"wheels of locks/{lock.name}: fetching {distributions(lock)} distributions ...")
    failure = ""
    for more in ([], ["--extra-index-url", TORCH_CPU_INDEX]):
        failure = _pip_download(directory, lock, more, say)
        if not failure:
            break
    else:
        raise LabError(
            f"pip could not fetch the wheels of locks/{lock.name}, in its configured sources (`pip config list`) "
            f"or with {TORCH_CPU_INDEX}. Its own words:\n{failure}"
        )
    allowed = set(re.findall(r"sha256:([0-9a-f]{64})", lock.read_text()))
    sums = {path.name: cache.sha256(path) for path in sorted(directory.glob("*.whl"))}
    if strangers := sorted(name for name, sha256 in sums.items() if sha256 not in allowed):
        raise LabError(f"locks/{lock.name} has no hash for {', '.join(strangers)}: the download was altered.")
    (directory / "sha256.json").write_text(json.dumps(sums, indent=1) + "\n")
    size_mib = sum(path.stat().st_size for path in directory.iterdir()) / 2**20
    say(f"wheels of locks/{lock.name}: {len(sums)} files, {size_mib:.0f} MiB, {time.monotonic() - started:.0f} s")


def distributions(lock: Path) -> int:
    return len(re.findall(r"^\S+==", lock.read_text(), flags=re.MULTILINE))


def _pip_download(directory: Path, lock: Path, more: list[str], say: Say) -> str:
    """Nothing where pip got everything, else the end of what it said. Wheels are for Python 3.11 and this machine."""
    command = [sys.executable, "-m", "pip", "download", "--progress-bar", "off", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--dest", str(directory), "-r", str(lock), *more]
    said: list[str] = []
    fetched, size, spoke = 0, 0.0, time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout or ():
            said.append(line)
            if line.startswith("Collecting "):
                fetched += 1
            if found := re.search(r"(?:Downloading|Using cached) \S+ \(([\d.]+) (kB|MB|GB)\)", line):
                size += float(found[1]) * UNITS[found[2]]
            if time.monotonic() - spoke >= PROGRESS_SECONDS:
                spoke = time.monotonic()
                say(f"  {lock.stem}: {fetched} of {distributions(lock)}, {size / 2**20:.0f} MiB")
    return "" if pip.returncode == 0 else "".join(line for line in said if not line.startswith("WARNING"))[-2000:]
