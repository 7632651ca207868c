"""Stand-in for python-build-standalone, the vendor that `uv python install` gets its Pythons from.

Debian 12's own CPython 3.11, put into the layout of that vendor's `install_only` archives and announced in a list of
the shape that UV_PYTHON_DOWNLOADS_JSON_URL names. It lets a lab host without a python3.11 (Debian 13, any Ubuntu) walk
the same path as a real one, without the Internet. What differs from the vendor's: it is linked with shared libraries
(OpenSSL 3, libffi 8, SQLite ...) that every supported system has already for its own python3; it has no tkinter, no
idle and no ensurepip; its patch version is Debian's. It needs glibc 2.35 or newer.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lab import LabError
from lab.mirror import cache

SUITE = "bookworm"
PACKAGES = ("python3.11", "libpython3.11-dev")  # -dev: Python.h, which torch.compile includes
SERIES = "3.11"
LIST = "builds.json"
RECIPE = 1  # raise it when the archive's content changes

# From Debian's places to the vendor's. The second pyconfig.h is the real one; Debian's first only points to it.
PLACES = (
    (f"usr/bin/python{SERIES}", f"bin/python{SERIES}"),
    (f"usr/lib/python{SERIES}", f"lib/python{SERIES}"),
    (f"usr/include/python{SERIES}", f"include/python{SERIES}"),
)
REAL_PYCONFIG = (f"usr/include/*-linux-gnu/python{SERIES}/pyconfig.h", f"include/python{SERIES}/pyconfig.h")

# Static libraries of -dev, links into /etc, byte code: of no use here, or written anew by Python.
LEFT_OUT = re.compile(r"/config-3[^/]*-linux-gnu(/|$)|/sitecustomize\.py$|/__pycache__(/|$)|pyconfig\.h$")

Say = Callable[[str], None]


class PythonBuilds:
    """What the mirror offers; nothing where it was not prepared."""

    def __init__(self, cache_directory: Path) -> None:
        self.directory = folder(cache_directory)

    def file(self, name: str) -> Path | None:
        """A file of the stand-in by its name, or None where there is none."""
        path = self.directory / Path(name).name
        return path if path.is_file() else None

    def listing(self, base_url: str) -> dict[str, object]:
        """uv's list of downloads, with the archive's address as the client reaches it."""
        described = self.file(LIST)
        if described is None:
            return {}
        builds: dict[str, dict[str, Any]] = json.loads(described.read_text())
        return {key: {**build, "url": f"{base_url}/{build['url']}"} for key, build in builds.items()}


def folder(cache_directory: Path) -> Path:
    return cache_directory / "python" / f"cpython-{SERIES}-{platform.machine()}-{RECIPE}"


def prepare(cache_directory: Path, say: Say) -> None:
    """Build the archive unless the cache holds it."""
    cache.ensure(folder(cache_directory), partial(build, say=say))


def build(directory: Path, say: Say) -> None:
    """Fetch Debian's packages, pack them as the vendor does, and describe the archive for uv."""
    started = time.monotonic()
    say(f"python {SERIES} stand-in: fetching {SUITE}'s packages ...")
    with tempfile.TemporaryDirectory(prefix="llmhost-python-") as name:
        root = Path(name) / "root"
        unpack(root)
        version = extracted_version(root)
        archive = directory / f"cpython-{version}-{platform.machine()}-unknown-linux-gnu-install_only.tar.gz"
        pack(root, archive)
    key = f"cpython-{version}-linux-{platform.machine()}-gnu"
    (directory / LIST).write_text(json.dumps({key: describe(archive, version)}, indent=1) + "\n")
    size_mib = archive.stat().st_size / 2**20
    say(f"python {SERIES} stand-in: {archive.name}, {size_mib:.0f} MiB, {time.monotonic() - started:.0f} s")


def unpack(root: Path) -> None:
    """mmdebstrap fetches, verifies and extracts, on any controller that can build lab images; nothing is run."""
    command = ["mmdebstrap", "--quiet", "--variant=extract", '--aptopt=APT::Install-Recommends "false"']
    command += [f"--include={','.join(PACKAGES)}", SUITE, str(root)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise LabError("the Python stand-in is made with mmdebstrap: install the package of that name.") from None
    if done.returncode != 0:
        raise LabError(f"mmdebstrap could not fetch {', '.join(PACKAGES)} of {SUITE}:\n{done.stderr[-2000:]}")


def extracted_version(root: Path) -> str:
    """`3.11.2`, as Python's own header says."""
    header = (root / f"usr/include/python{SERIES}/patchlevel.h").read_text()
    [version] = re.findall(r'^#define PY_VERSION\s+"([\d.]+)"', header, re.MULTILINE)
    return str(version)


def pack(root: Path, archive: Path) -> None:
    """The same packages make the same bytes: sorted, without times and owners."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for source, name in members(root):
            tar.add(source, f"python/{name}", recursive=False, filter=anonymous)
        for link in ("python", "python3"):
            entry = tarfile.TarInfo(f"python/bin/{link}")
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, f"python{SERIES}", 0o777
            tar.addfile(entry)


def members(root: Path) -> Iterator[tuple[Path, str]]:
    """Each file to pack and its name below python/."""
    for place, name in PLACES:
        start = root / place
        for path in [start, *sorted(start.rglob("*"))]:
            inside = name if path == start else f"{name}/{path.relative_to(start)}"
            if not LEFT_OUT.search(f"/{inside}"):
                yield path, inside
    [pyconfig] = root.glob(REAL_PYCONFIG[0])
    yield pyconfig, REAL_PYCONFIG[1]


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def describe(archive: Path, version: str) -> dict[str, object]:
    """One entry of uv's list of downloads; `url` is the file's name here and becomes an address when it is served."""
    major, minor, patch = (int(part) for part in version.split("."))
    return {
        "name": "cpython",
        "arch": {"family": os.uname().machine, "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": major,
        "minor": minor,
        "patch": patch,
        "prerelease": "",
        "url": archive.name,
        "sha256": cache.sha256(archive),
        "variant": None,
        "build": None,
    }
