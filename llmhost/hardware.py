"""What a host is: the fact script's JSON (runtime/facts.sh) parsed into frozen values. No decisions here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmhost import nvidia_smi
from llmhost.nvidia_smi import SmiGpu

FACTS_VERSION = "3"
NVIDIA = "0x10de"
# PCI classes of things that compute: VGA controller and 3D controller (field notes, nvidia.md); audio is 0x0403.
GPU_CLASSES = ("0x0300", "0x0302")
# What systemd-detect-virt calls containers whose kernel, and therefore driver, is another machine's. wsl, which it
# counts among them, is a platform of its own here; a lab's systemd-nspawn gets stand-ins like a real driver.
CONTAINERS = frozenset({"docker", "lxc", "lxc-libvirt", "openvz", "podman", "pouch", "proot", "rkt", "container-other"})


class FactsError(ValueError):
    """Recorded facts that cannot be read; the message says what was expected."""


@dataclass(frozen=True)
class Gpu:
    """A display or 3D controller seen on the PCI bus, with or without a driver."""

    address: str
    vendor: str
    device: str
    driver: str  # kernel driver bound to it: "nvidia", "nouveau", "vfio-pci"; "none" without


@dataclass(frozen=True)
class Kernel:
    """An installed kernel, and the nvidia module on disk for it."""

    version: str  # as `uname -r` would say: "6.8.0-149-generic"
    module_version: str  # "580.178.04", "" without a module
    module_licence: str  # "Dual MIT/GPL" is the open flavour, "NVIDIA" the closed


@dataclass(frozen=True)
class Package:
    """A package of interest (kernels, NVIDIA, Docker) that dpkg knows."""

    name: str
    version: str
    status: str  # dpkg's two letters: "ii" installed, "hi" installed and held, "rc" removed, "iF" half-configured


@dataclass(frozen=True)
class DriverState:
    """The NVIDIA driver as it is on the host; versions "" where there is none."""

    loaded_version: str  # of the module in the kernel
    loaded_modules: str  # "open" | "closed" | ""
    user_space_version: str  # of nvidia-smi's and libcuda's packages, or of the libcuda that a .run file left
    smi_version: str  # driver version in nvidia-smi's answer, "" where it gave none
    cuda_version: str  # newest CUDA the driver runs: "13.0"
    gpus: tuple[SmiGpu, ...]
    managed_source: str  # "ubuntu-archive" | "cuda-repository" where llmhost provisioned it, else ""


@dataclass(frozen=True)
class DockerState:
    """Docker as it is on the host; versions "" where it lacks them."""

    command: bool  # whether there is a `docker` at all
    version: str  # the daemon's, "" where none answers
    compose_version: str  # of the plugin
    snap: bool  # installed as a snap, whose Docker the container toolkit does not support
    toolkit_version: str  # nvidia-ctk's
    kubernetes: str  # "k3s", "rke2", "kubelet" where the host is a node of a cluster


@dataclass(frozen=True)
class AptEntry:
    """A repository of a vendor that the host knows already."""

    path: str  # "/etc/apt/sources.list.d/docker.list"
    uri: str  # without user and password


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
    nvswitches: int  # PCI bridges of class 0680, else management ports of NVLink 5 switches
    secure_boot: bool | None  # None where the firmware does not say (no EFI)
    mok_enrolled: bool  # the firmware trusts the key with which modules are signed that DKMS builds here
    platform: frozenset[str]  # of "wsl", "jetson", "dgx", "runfile" (a driver installed by NVIDIA's .run)
    kernels: tuple[Kernel, ...]
    packages: tuple[Package, ...]
    driver: DriverState
    docker: DockerState
    apt: tuple[AptEntry, ...]
    listeners: tuple[Listener, ...]
    clock_offset_seconds: int
    time_synchronised: bool | None
    user: str
    elevates: bool
    installed: Installed

    @property
    def nvidia_gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.vendor == NVIDIA)

    @property
    def container(self) -> bool:
        """Whether this is a container, whose driver is its machine's; virtual machines have their own."""
        return self.virtualisation in CONTAINERS

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
        nvswitches=int(facts["nvswitches"]),
        secure_boot={"1": True, "0": False}.get(facts["secure_boot"]),
        mok_enrolled=facts["mok"] == "enrolled",
        platform=frozenset(facts["platform"].split()),
        kernels=tuple(_kernel(line) for line in facts["kernels"].splitlines()),
        packages=tuple(_package(line) for line in facts["packages"].splitlines()),
        driver=_driver(facts),
        docker=_docker(_pairs(facts["docker"])),
        apt=tuple(_apt_entry(line) for line in facts["apt"].splitlines()),
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


def _kernel(line: str) -> Kernel:
    version, module_version, licence = line.split(" ", 2)
    return Kernel(version, _said(module_version), _said(licence))


def _said(text: str) -> str:
    return "" if text == "-" else text


def _package(line: str) -> Package:
    name, version, status = line.split()
    return Package(name, version, status)


def _driver(facts: Mapping[str, str]) -> DriverState:
    loaded = _pairs(facts["nvidia"])
    smi = nvidia_smi.parse(facts["nvidia_smi"])
    return DriverState(
        loaded_version=loaded.get("loaded", ""),
        loaded_modules=loaded.get("modules", ""),
        user_space_version=loaded.get("user_space", ""),
        smi_version=smi.driver_version,
        cuda_version=smi.cuda_version,
        gpus=smi.gpus,
        managed_source=loaded.get("managed", ""),
    )


def _docker(found: Mapping[str, str]) -> DockerState:
    return DockerState(
        command="server" in found,
        version=found.get("server", ""),
        compose_version=found.get("compose", ""),
        snap=found.get("snap") == "yes",
        toolkit_version=found.get("toolkit", ""),
        kubernetes=found.get("kubernetes", ""),
    )


def _apt_entry(line: str) -> AptEntry:
    path, uri = line.rsplit(" ", 1)
    return AptEntry(path, uri)


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
