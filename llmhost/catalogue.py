"""The catalogue read from data files: models llmhost knows, and releases it has locks for."""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Mapping
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
    python: str
    machines: tuple[str, ...]
    untested_machines: tuple[str, ...]
    torch_index: bool
    os_packages: tuple[str, ...]
    alias: str  # a distribution that the installation also answers to: "vllm==0.32.0+cpu"
    download_mib: int
    disk_mib: int


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


def uv_version() -> str:
    """The version of uv that hosts get."""
    (version,) = find_locks("uv")
    return version


def _read(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


def _lock(name: str, row: Mapping[str, Any]) -> LockEntry:
    path = f"locks/{name}"
    alias = row.get("metadata_alias")
    return LockEntry(
        path=path,
        sha256=hashlib.sha256((ROOT / path).read_bytes()).hexdigest(),
        package=row["package"],
        version=row["version"],
        python=row["python"],
        machines=tuple(row["platforms_tested"]),
        untested_machines=tuple(row["platforms_untested"]),
        torch_index=row["torch_index"],
        os_packages=tuple(row["os_packages"]),
        alias=f"{alias['name']}=={alias['version']}" if alias else "",
        download_mib=row["download_mib"],
        disk_mib=row["disk_mib"],
    )
