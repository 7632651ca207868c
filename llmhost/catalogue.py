"""The catalogue read from data files: models, releases with locks, GPUs, and packages of drivers and Docker."""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ModelEntry:
    """A model of llmhost/catalog/models.toml."""

    name: str
    repository: str
    revision: str
    licence: str
    parameters: int
    weights_bytes: int
    layers: int
    kv_heads: int
    head_size: int
    context_tokens: int
    proof_question: str
    proof_answer: str

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in a 2-byte cache (field notes, vllm.md, section 3)."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2


@dataclass(frozen=True)
class LockEntry:
    """A lock of locks/index.toml: what it installs, where, and how large it is."""

    path: str
    sha256: str
    package: str
    version: str
    accelerator: str  # "cpu", "nvidia", "" where it does not matter
    cuda: str  # CUDA it was built with, whose compiler it brings along: "13.0", "" for none
    pythons: tuple[str, ...]  # oldest first
    managed_python: str  # of these, the one that uv fetches for a host whose own is none of them
    machines: tuple[str, ...]
    untested_machines: tuple[str, ...]
    torch_index: bool
    os_packages: tuple[str, ...]
    system_python_packages: tuple[str, ...]  # where the host's own Python runs it; uv's builds bring their headers
    alias: str  # a distribution that the installation also answers to: "vllm==0.32.0+cpu"
    download_mib: int
    disk_mib: int

    @property
    def least_branch(self) -> str:
        """The oldest driver branch that runs its CUDA, "" where it needs no driver."""
        return drivers().least_branch[self.cuda.partition(".")[0]] if self.cuda else ""


@dataclass(frozen=True)
class Generation:
    """A row of [generations] in llmhost/catalog/gpus.toml; its first lines say what each column means."""

    name: str
    open: bool
    closed: bool
    most_branch: str
    least_cuda: str
    vllm: bool


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU by its PCI device id. `memory_gib` is None and `name` "" where the id is in no table."""

    device: str  # "2504", capitals
    name: str
    memory_gib: int | None
    generation: Generation
    capability: str  # compute capability, "" where not known
    least_branch: str  # a branch it needs, "" where any living one does
    open: bool  # whether open modules run it
    closed: bool
    nvlink5: bool

    @property
    def flavours(self) -> tuple[str, ...]:
        """Kernel modules that run it, of "open" and "closed"; none where no living branch does."""
        return tuple(name for name, runs in (("open", self.open), ("closed", self.closed)) if runs)

    @property
    def title(self) -> str:
        """The card in a sentence: "NVIDIA GeForce RTX 3060 (10de:2504), ampere"."""
        name = self.name or ("an unknown card" if self.generation.name == "unknown" else "an NVIDIA GPU")
        return f"{name} (10de:{self.device.lower()}), {self.generation.name}"


def titles(cards: Iterable[Card]) -> str:
    """Cards in a sentence, equal ones once."""
    return "; ".join(dict.fromkeys(found.title for found in cards))


@dataclass(frozen=True)
class Branch:
    """A living driver branch."""

    name: str
    version: str
    end_of_life: str
    modules: tuple[str, ...]
    cuda: str  # newest CUDA it runs
    unverified: tuple[str, ...]  # distributions for which NVIDIA's repository was not seen to have it


@dataclass(frozen=True)
class CudaDirectory:
    """The CUDA repository of one distribution: its directory and the key that signs it."""

    directory: str
    key: str
    fingerprint: str
    architectures: Mapping[str, str]  # its name for each machine that it has packages for
    toolkits: tuple[str, ...]  # versions of CUDA: "13.0"


@dataclass(frozen=True)
class CudaRepository:
    """NVIDIA's repository: names with <branch>, <version> and <open> to be filled in."""

    pinning: str
    packages: Mapping[str, tuple[str, ...]]  # by "ubuntu 580", else "ubuntu"
    dkms: tuple[str, ...]
    fabric_manager: tuple[str, ...]
    nvlink5: tuple[str, ...]
    distributions: Mapping[str, CudaDirectory]  # by "ubuntu 24.04"


@dataclass(frozen=True)
class UbuntuArchive:
    """Ubuntu's own driver packages: names with <branch>, <open> and <flavour> to be filled in."""

    packages: tuple[str, ...]
    prebuilt: str
    dkms: tuple[str, ...]
    fabric_manager: tuple[str, ...]
    prebuilt_closed_machines: tuple[str, ...]
    components: Mapping[str, str]  # by branch
    flavours: tuple[str, ...]
    other_flavours: tuple[str, ...]
    series: Mapping[str, str]
    extra_modules: Mapping[str, str]


@dataclass(frozen=True)
class DistributionDocker:
    """Docker as a distribution packages it."""

    version: str
    packages: tuple[str, ...]
    codename: str


@dataclass(frozen=True)
class DockerPackages:
    """Docker's own packages and key, and what each distribution has."""

    minimum: str
    packages: tuple[str, ...]
    conflicts: tuple[str, ...]
    key: str
    fingerprint: str
    architectures: Mapping[str, str]
    distribution: Mapping[str, DistributionDocker]  # by "ubuntu 24.04"


@dataclass(frozen=True)
class ToolkitPackages:
    """The container toolkit's packages and key."""

    versions: tuple[str, ...]  # those that were looked at
    packages: tuple[str, ...]
    key: str
    fingerprint: str


@dataclass(frozen=True)
class Drivers:
    """All of llmhost/catalog/drivers.toml."""

    branches: Mapping[str, Branch]
    ended: Mapping[str, str]  # branches that are no more, and their successors
    least_branch: Mapping[str, str]  # by CUDA major version
    ubuntu_archive: UbuntuArchive
    cuda_repository: CudaRepository
    debian_flavours: tuple[str, ...]
    frozen: Mapping[str, tuple[str, ...]]
    driver_globs: tuple[str, ...]
    not_driver_globs: tuple[str, ...]
    docker: DockerPackages
    toolkit: ToolkitPackages


@functools.cache
def models() -> Mapping[str, ModelEntry]:
    """All catalogue models by name."""
    table = _read("llmhost/catalog/models.toml")
    return {name: ModelEntry(name=name, **row) for name, row in table.items()}


@functools.cache
def locks() -> tuple[LockEntry, ...]:
    """All locks: engines, Open WebUI, and uv itself."""
    return tuple(_lock(name, row) for name, row in _read("locks/index.toml").items())


def find_locks(package: str) -> Mapping[str, LockEntry]:
    """The locks that install `package`, by version."""
    return {lock.version: lock for lock in locks() if lock.package == package}


@functools.cache
def card(device: str) -> Card:
    """The GPU with a PCI device id as sysfs writes it ("0x2504"). Ids no row knows are cards too."""
    table = _read("llmhost/catalog/gpus.toml")
    key = device.removeprefix("0x").upper().zfill(4)
    found = next((r for r in table["ranges"] if r["first"] <= int(key, 16) <= r["last"]), None)
    name = found["generation"] if found else "unknown"
    generation = Generation(name=name, **table["generations"][name])
    capability = found["capability"] if found else ""
    known = table["cards"].get(key, {"name": "", "memory_gib": None})
    return Card(
        device=key,
        name=known["name"],
        memory_gib=known["memory_gib"],
        generation=generation,
        capability=capability,
        least_branch=table["needs_branch"].get(key, ""),
        open=generation.open,
        closed=generation.closed and key not in table["open_only"]["ids"],
        nvlink5=capability in table["nvlink5"]["capabilities"],
    )


@functools.cache
def drivers() -> Drivers:
    """Driver branches and every package name and key that goes with them, with Docker's."""
    table = _tuples(_read("llmhost/catalog/drivers.toml"))
    cuda, docker = table["cuda-repository"], table["docker"]
    directories = {name: CudaDirectory(**row) for name, row in cuda["distributions"].items()}
    own = {name: DistributionDocker(**row) for name, row in docker["distribution"].items()}
    return Drivers(
        branches={name: Branch(name=name, **row) for name, row in table["branches"].items()},
        ended=table["ended"],
        least_branch=table["least_branch"],
        ubuntu_archive=UbuntuArchive(**table["ubuntu-archive"]),
        cuda_repository=CudaRepository(**{**cuda, "distributions": directories}),
        debian_flavours=table["debian"]["flavours"],
        frozen=table["frozen"],
        driver_globs=table["driver_packages"]["globs"],
        not_driver_globs=table["driver_packages"]["others"],
        docker=DockerPackages(**{**docker, "distribution": own}),
        toolkit=ToolkitPackages(**table["toolkit"]),
    )


def uv_version() -> str:
    """The version of uv that hosts get."""
    (version,) = find_locks("uv")
    return version


@functools.cache
def _read(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


def _tuples(value: Any) -> Any:
    """The same values, with tuples for TOML's lists: what is read is frozen."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def _lock(name: str, row: Mapping[str, Any]) -> LockEntry:
    path = f"locks/{name}"
    alias = row.get("metadata_alias")
    return LockEntry(
        path=path,
        sha256=hashlib.sha256((ROOT / path).read_bytes()).hexdigest(),
        package=row["package"],
        version=row["version"],
        accelerator=row.get("accelerator", ""),
        cuda=row.get("cuda", ""),
        pythons=tuple(row["pythons"]),
        managed_python=row["managed_python"],
        machines=tuple(row["platforms_tested"]),
        untested_machines=tuple(row["platforms_untested"]),
        torch_index=row["torch_index"],
        os_packages=tuple(row["os_packages"]),
        system_python_packages=tuple(row.get("system_python_packages", ())),
        alias=f"{alias['name']}=={alias['version']}" if alias else "",
        download_mib=row["download_mib"],
        disk_mib=row["disk_mib"],
    )
