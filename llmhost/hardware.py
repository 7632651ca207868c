"""What a host is: the fact script's JSON (runtime/facts.sh) parsed into frozen values. No decisions here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FACTS_VERSION = "2"
NVIDIA = "0x10de"
# PCI classes of things that compute: VGA controller and 3D controller (field notes, nvidia.md); audio is 0x0403.
GPU_CLASSES = ("0x0300", "0x0302")


class FactsError(ValueError):
    """Recorded facts that cannot be read; the message says what was expected."""


@dataclass(frozen=True)
class Gpu:
    """A display or 3D controller seen on the PCI bus, with or without a driver."""

    address: str
    vendor: str
    device: str
    driver: str  # kernel driver bound to it, "none" without


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket and who holds it; fields are "-" where unknown."""

    address: str
    port: int
    pid: str
    process: str
    unit: str


@dataclass(frozen=True)
class Disk:
    """The file system that holds `path`; two paths on one file system have equal `mount`."""

    path: str
    mount: str
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Installed:
    """What an earlier run of llmhost left on the host."""

    engine_release: str
    webui_release: str
    releases: frozenset[str]
    models: frozenset[str]
    active_units: frozenset[str]
    foreign_units: frozenset[str]  # units of our names that somebody else wrote
    plan_hash: str


@dataclass(frozen=True)
class Hardware:
    """One host, as recorded at one moment. Memory and disks in bytes, the clock's offset in seconds."""

    hostname: str
    os_id: str
    os_version: str
    os_name: str
    kernel: str
    machine: str
    init: str
    virtualisation: str
    cpu_model: str
    cpu_count: int
    cpu_flags: frozenset[str]
    memory_bytes: int
    memory_available_bytes: int
    disks: tuple[Disk, ...]
    gpus: tuple[Gpu, ...]
    listeners: tuple[Listener, ...]
    clock_offset_seconds: int
    time_synchronised: bool | None
    user: str
    elevates: bool
    installed: Installed

    @property
    def nvidia_gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.vendor == NVIDIA)

    def disk_for(self, path: str) -> Disk:
        """The file system that holds `path`: the recorded path with the longest matching prefix."""
        holders = [d for d in self.disks if path == d.path or path.startswith(d.path.rstrip("/") + "/")]
        return max(holders, key=lambda disk: len(disk.path))


def parse(text: str) -> Hardware:
    """Hardware from the JSON that the fact script prints. Raises FactsError."""
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise FactsError(f"expected the JSON that `llmhost facts HOST` prints: {error}") from None
    if not isinstance(facts, dict) or facts.get("facts_version") != FACTS_VERSION:
        raise FactsError(f"expected the JSON that `llmhost facts HOST` prints, with facts_version {FACTS_VERSION}")
    try:
        return _hardware(facts)
    except (KeyError, ValueError, IndexError) as error:
        raise FactsError(f"the facts lack something or hold it in another form: {error!r}") from None


def _hardware(facts: Mapping[str, str]) -> Hardware:
    os_release = _shell_assignments(facts["os_release"])
    cpu = _pairs(facts["cpu"])
    memory = {name: int(value.split()[0]) * 1024 for name, value in _pairs(facts["meminfo"], ":").items()}
    return Hardware(
        hostname=facts["hostname"],
        os_id=os_release.get("ID", ""),
        os_version=os_release.get("VERSION_ID", ""),
        os_name=os_release.get("PRETTY_NAME", "an unknown system"),
        kernel=facts["kernel"],
        machine=facts["machine"],
        init=facts["init"],
        virtualisation=facts["virtualisation"],
        cpu_model=cpu.get("model name", ""),
        cpu_count=int(cpu["count"]),
        cpu_flags=frozenset((cpu.get("flags") or cpu.get("Features", "")).split()),
        memory_bytes=memory["MemTotal"],
        memory_available_bytes=memory["MemAvailable"],
        disks=_disks(facts["disks"]),
        gpus=_gpus(facts["pci"]),
        listeners=tuple(_listener(line) for line in facts["listeners"].splitlines()),
        clock_offset_seconds=int(facts["host_time"]) - int(facts["controller_time"] or facts["host_time"]),
        time_synchronised={"yes": True, "no": False}.get(facts["time_synchronised"]),
        user=facts["user"],
        elevates=facts["elevates"] == "0",
        installed=_installed(facts["installed"], facts["plan"]),
    )


def _pairs(text: str, separator: str = "=") -> dict[str, str]:
    split = (line.partition(separator) for line in text.splitlines() if separator in line)
    return {name.strip(): value.strip() for name, _, value in split}


def _shell_assignments(text: str) -> dict[str, str]:
    return {name: "".join(shlex.split(value)) for name, value in _pairs(text).items()}


def _disks(text: str) -> tuple[Disk, ...]:
    rows = [line.split(" ", 3) for line in text.splitlines()]
    if not any(row[0] == "/" for row in rows):
        raise ValueError("no file system for /")
    return tuple(Disk(path, mount, int(total), int(available)) for path, total, available, mount in rows)


def _gpus(pci: str) -> tuple[Gpu, ...]:
    rows = (line.split() for line in pci.splitlines())
    return tuple(
        Gpu(address, vendor, device, driver)
        for address, vendor, device, class_id, driver in rows
        if class_id.startswith(GPU_CLASSES)
    )


def _listener(line: str) -> Listener:
    rest, _, unit = line.rpartition(" ")
    socket, pid, process = rest.split(" ", 2)  # a process name may hold spaces
    address, _, port = socket.rpartition(":")
    return Listener(address.strip("[]"), int(port), pid, process, unit)


def _installed(text: str, plan: str) -> Installed:
    lines = [line.partition("=")[::2] for line in text.splitlines()]
    named = dict(lines)
    return Installed(
        engine_release=named.get("current", ""),
        webui_release=named.get("current-open-webui", ""),
        releases=frozenset(value for name, value in lines if name == "release"),
        models=frozenset(value for name, value in lines if name == "model"),
        foreign_units=frozenset(value for name, value in lines if name == "foreign"),
        active_units=frozenset(name for name, value in lines if value == "active"),
        plan_hash=_plan_hash(plan),
    )


def _plan_hash(plan: str) -> str:
    try:
        found: Any = json.loads(plan)
        return str(found["hash"])
    except (ValueError, KeyError, TypeError):
        return ""
