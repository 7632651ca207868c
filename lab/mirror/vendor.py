"""Stand-ins for the vendors' apt repositories: signed with a throw-away key, laid out as theirs, with faults on demand.

    /cuda/debian12/x86_64/, /cuda/debian13/x86_64/     flat, the key beside the packages
    /toolkit/amd64/                                     flat
    /docker/debian/dists/bookworm|trixie/               a suite with a component `stable`

POST /_fault  {"status": 503}             every answer is this status
POST /_fault  {"signed_by": "another"}    InRelease and Release.gpg are of a key that nobody knows
POST /_fault  {}                          all is well again

The key's private half lives in memory of one `prepare` and is gone after it: another cache is another key.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lab import LabError
from lab.gpu import packages
from lab.gpu.packages import Package
from lab.mirror import cache
from lab.mirror.web import Handler

Say = Callable[[str], None]
KEY = "lab.asc"
CUDA_KEYS = {"debian12": "3bf863cc.pub", "debian13": "8793F200.pub"}
SOURCES = (Path(packages.__file__), Path(__file__), *sorted(packages.PROGRAMS.iterdir()))


def folder(cache_directory: Path) -> Path:
    """Named by a hash over all that the packages are made of."""
    recipe = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES if file.is_file()))
    return cache_directory / "vendor" / recipe.hexdigest()[:16]


def key(cache_directory: Path) -> Path:
    """The public key that signs the repositories."""
    return folder(cache_directory) / KEY


def prepare(cache_directory: Path, say: Say) -> None:
    """Build and sign what is missing from the cache."""
    docker = docker_folder(cache_directory)
    cache.ensure(docker, partial(build_docker, say=say))
    cache.ensure(folder(cache_directory), partial(build, docker=docker, say=say))


def docker_folder(cache_directory: Path) -> Path:
    """Apart from the others, and so built once: it is fetched, and large."""
    units = (packages.DOCKER_SERVICE, packages.DOCKER_SOCKET, packages.CONTAINERD_SERVICE)
    recipe = json.dumps([packages.DOCKER_PACKAGES, packages.RUNC_SUITES, packages.DOCKER_VERSION, units])
    return cache_directory / "vendor-docker" / hashlib.sha256(recipe.encode()).hexdigest()[:16]


def build_docker(directory: Path, say: Say) -> None:
    started = time.monotonic()
    say("docker-ce stand-in: fetching Debian 13's Docker ...")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch, "root")
        packages.unpack(root, packages.DOCKER_SUITE, *packages.DOCKER_PACKAGES)
        for codename in packages.RUNC_SUITES:
            runc = Path(scratch, codename)
            packages.unpack(runc, codename, "runc")
            (directory / codename).mkdir()
            build_all(packages.docker_packages(root, runc), directory / codename, compression="zstd")
    size_mib = sum(file.stat().st_size for file in directory.rglob("*.deb")) / 2**20
    say(f"docker-ce stand-in: {size_mib:.0f} MiB, {time.monotonic() - started:.0f} s")


def build(directory: Path, docker: Path, say: Say) -> None:
    """Every repository, signed twice: by the key that is handed out, and by another."""
    started = time.monotonic()
    driver = [package for version in packages.DRIVER_VERSIONS for package in packages.driver_packages(version)]
    for distribution in CUDA_KEYS:
        place = directory / "cuda" / distribution / "x86_64"
        place.mkdir(parents=True)
        build_all(driver, place)
        flat_index(place, "NVIDIA CUDA")
    toolkit = directory / "toolkit/amd64"
    toolkit.mkdir(parents=True)
    build_all([p for version in packages.TOOLKIT_VERSIONS for p in packages.toolkit_packages(version)], toolkit)
    flat_index(toolkit, "NVIDIA container toolkit")
    for codename in packages.RUNC_SUITES:
        suite_index(directory / "docker/debian", codename, docker / codename)
    with signing_key("llmhost lab, stand-in for the vendors") as sign:
        for release in releases(directory):
            sign(release, "")
        sign.export(directory / KEY)
    for distribution, name in CUDA_KEYS.items():
        shutil.copyfile(directory / KEY, directory / "cuda" / distribution / "x86_64" / name)
    with signing_key("a stranger") as sign:
        for release in releases(directory):
            sign(release, ".another")
    say(f"vendors' repositories: {len(driver)} driver packages and more, {time.monotonic() - started:.0f} s")


def build_all(wanted: list[Package], directory: Path, compression: str = "gzip") -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda package: packages.build(package, directory, compression), wanted))


def releases(directory: Path) -> list[Path]:
    return sorted(directory.rglob("Release"))


# --- indexes -----------------------------------------------------------------------------------------------------


def flat_index(directory: Path, label: str) -> None:
    """A repository without suites: deb URL /"""
    write_packages(directory, directory, directory)
    write_release(directory, label, {"Packages", "Packages.gz"})


def suite_index(repository: Path, codename: str, debs: Path) -> None:
    """deb URL CODENAME stable"""
    suite = repository / "dists" / codename
    pool = suite / "pool/stable/amd64"
    pool.mkdir(parents=True)
    for deb in debs.glob("*.deb"):
        os.link(deb, pool / deb.name)
    binary = suite / "stable/binary-amd64"
    binary.mkdir(parents=True)
    write_packages(binary, pool, repository)
    write_release(suite, "Docker CE", {"stable/binary-amd64/Packages", "stable/binary-amd64/Packages.gz"}, codename)


def write_packages(directory: Path, debs: Path, base: Path) -> None:
    text = "".join(stanza(deb, base) for deb in sorted(debs.glob("*.deb")))
    (directory / "Packages").write_text(text)
    (directory / "Packages.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def stanza(deb: Path, base: Path) -> str:
    control = subprocess.run(["dpkg-deb", "--field", str(deb)], check=True, capture_output=True, text=True).stdout
    size, checksum = deb.stat().st_size, cache.sha256(deb)
    return f"{control}Filename: ./{deb.relative_to(base)}\nSize: {size}\nSHA256: {checksum}\n\n"


def write_release(directory: Path, label: str, names: set[str], codename: str = "") -> None:
    fields = {"Origin": label, "Label": label, "Date": time.strftime("%a, %d %b %Y %H:%M:%S UTC", time.gmtime())}
    if codename:
        fields |= {"Suite": codename, "Codename": codename, "Components": "stable", "Architectures": "amd64"}
    sums = [f" {cache.sha256(directory / name)} {(directory / name).stat().st_size} {name}" for name in sorted(names)]
    lines = [f"{name}: {value}" for name, value in fields.items()]
    (directory / "Release").write_text("\n".join([*lines, "SHA256:", *sums]) + "\n")


# --- signing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signer:
    """gpg with one key."""

    home: Path

    def __call__(self, release: Path, suffix: str) -> None:
        """InRelease and Release.gpg beside a Release, their names with a suffix."""
        self.gpg("--clearsign", "--output", str(release.with_name(f"InRelease{suffix}")), str(release))
        self.gpg("--armor", "--detach-sign", "--output", str(release.with_name(f"Release.gpg{suffix}")), str(release))

    def export(self, file: Path) -> None:
        self.gpg("--armor", "--output", str(file), "--export")

    def gpg(self, *words: str) -> None:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--digest-algo", "SHA512"]
        done = subprocess.run([*command, *words], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise LabError(f"gpg could not sign the lab's repositories: {done.stderr.strip()}")


@contextmanager
def signing_key(owner: str) -> Iterator[Signer]:
    """A new key, until the end of the block. Its home has a short name: gpg-agent's socket lies in it."""
    with tempfile.TemporaryDirectory(prefix="llmhost-gpg-", dir="/tmp") as home:
        signer = Signer(Path(home))
        try:
            signer.gpg("--passphrase", "", "--quick-gen-key", f"{owner} <lab@invalid>", "rsa3072", "sign", "never")
            yield signer
        finally:
            subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False, capture_output=True)


# --- serving -----------------------------------------------------------------------------------------------------


class Repositories:
    """What the mirror offers, and what is wrong with it; prepared maybe after the server has started."""

    def __init__(self, cache_directory: Path) -> None:
        self.directory = folder(cache_directory)
        self.fault: dict[str, Any] = {}

    def file(self, path: str) -> Path | None:
        """The file at a URL's path, or None."""
        file = self.directory / path.lstrip("/")
        if self.fault.get("signed_by") == "another" and file.name in ("InRelease", "Release.gpg"):
            file = file.with_name(f"{file.name}.another")
        return file if file.is_file() and file.resolve().is_relative_to(self.directory.resolve()) else None


class VendorHandler(Handler):
    """The trees, and the faults."""

    def __init__(self, repositories: Repositories, *arguments: Any) -> None:
        self.repositories = repositories
        super().__init__(*arguments)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = json.loads(body) if self.path == "/_fault" else None
        if not isinstance(wanted, dict) or wanted.keys() - {"status", "signed_by"}:
            self.reply(HTTPStatus.BAD_REQUEST, {"error": "POST /_fault takes status or signed_by"})
            return
        self.repositories.fault = wanted
        self.reply(HTTPStatus.OK, {})

    def answer(self) -> None:
        if status := self.repositories.fault.get("status"):
            self.reply(HTTPStatus(status), "a fault that a test asked for\n")
            return
        path = unquote(self.path.partition("?")[0])
        file = self.repositories.file(path)
        if file is None:
            self.reply(HTTPStatus.NOT_FOUND, f"the lab's vendors have no {path}\n")
        else:
            self.send_file(file)
