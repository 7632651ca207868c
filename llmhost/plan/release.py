"""Which locked requirement set becomes which directory on the host."""

from __future__ import annotations

import hashlib

from llmhost.catalogue import LockEntry
from llmhost.hardware import Hardware
from llmhost.plan.model import Release
from llmhost.plan.notes import Notes
from llmhost.plan.systems import system_of

RELEASES = "/opt/llmhost/releases"
# Where NVIDIA's wheels for CUDA 13 put the toolkit: bin/nvcc, include, nvvm, lib.
CUDA_WHEELS = "nvidia/cu13"


def plan_release(lock: LockEntry, hardware: Hardware, current: str, notes: Notes) -> Release:
    """One immutable installation; refuses machines without wheels."""
    _check_machine(lock, hardware, notes)
    system = system_of(hardware)
    source = "system" if system and system.python in lock.pythons else "managed"
    python = system.python if system and source == "system" else lock.managed_python
    notes.decide("python", f"{lock.package}_python", f"{python} ({source})", _python_reason(lock, source))
    identity = f"{lock.package}-{lock.version}-{_digest(lock.sha256, python, source, lock.alias)}"
    path = f"{RELEASES}/{identity}"
    return Release(
        package=lock.package,
        version=lock.version,
        lock=lock.path,
        lock_sha256=lock.sha256,
        python=python,
        python_source=source,
        torch_index=lock.torch_index,
        alias=lock.alias,
        cuda_home=f"{path}/venv/lib/python{python}/site-packages/{CUDA_WHEELS}" if lock.cuda else "",
        os_packages=lock.os_packages + (lock.system_python_packages if source == "system" else ()),
        identity=identity,
        path=path,
        current=f"/opt/llmhost/{current}",
        download_mib=lock.download_mib,
        disk_mib=lock.disk_mib,
    )


def _check_machine(lock: LockEntry, hardware: Hardware, notes: Notes) -> None:
    if hardware.machine in lock.untested_machines:
        notes.decide(
            "host", "machine", hardware.machine, f"untested: {lock.path} has wheels for it, no run has been seen"
        )
    elif hardware.machine not in lock.machines:
        known = ", ".join(lock.machines + lock.untested_machines)
        notes.refuse(
            "machine",
            f"{lock.path} holds no Python wheels of {lock.package} {lock.version} for {hardware.machine}",
            f"Use a host with one of: {known}",
        )


def _python_reason(lock: LockEntry, source: str) -> str:
    wanted = f"{lock.path} is locked for Python {', '.join(lock.pythons)}"
    return f"{wanted}, the distribution's own" if source == "system" else f"{wanted}; the distribution's own is another"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
