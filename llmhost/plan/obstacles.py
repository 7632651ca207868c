"""What of a host stands in the way of a driver: its cards, firmware, packages of another origin, holds. Pure.

Each check refuses with what an operator can do about it; none decides anything.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch

from llmhost.catalogue import Card, drivers, titles
from llmhost.hardware import Hardware, Package
from llmhost.plan.kernels import Kernels, newest
from llmhost.plan.notes import Notes
from llmhost.plan.repositories import ARCHIVE, CUDA
from llmhost.settings import Settings

PASSED_THROUGH = "vfio-pci"

# --- cards ------------------------------------------------------------------------------------------------------


def check_cards(
    settings: Settings, hardware: Hardware, accelerator: str, cards: tuple[Card, ...], notes: Notes
) -> None:
    """GPUs that no driver runs, or not together, or not for this engine, or that are not this host's to use."""
    _check_passthrough(hardware, notes)
    if accelerator == "nvidia":
        _check_mig(hardware, notes)
    dead = [found for found in cards if not found.flavours]
    closed_only = [found for found in cards if found.closed and not found.open]
    newer = [found for found in cards if found.open]
    if dead:
        last = dead[0].generation.most_branch
        notes.refuse(
            "gpu",
            f"{titles(dead)}: no living driver branch has it, the last ({last}) is end of life",
            "Use a Turing card or newer, or leave this one without a driver: "
            'accelerator = "cpu" and driver_source = "none"',
        )
    elif closed_only and newer and not (_run_closed(newer) and settings.driver_modules == "closed"):
        either = ', or set driver_modules = "closed" and accelerator = "cpu"' if _run_closed(newer) else ""
        notes.refuse(
            "gpu",
            f"mixed generations: {titles(closed_only)} needs closed modules, {titles(newer)} is driven by open ones, "
            "and a host has one driver",
            f"Take one of the two out of the host{either}",
        )
    elif accelerator == "nvidia" and (old := [found for found in cards if not found.generation.vllm]):
        notes.refuse(
            "accelerator",
            f"{titles(old)}: current vLLM needs compute capability 7.5, this has {old[0].capability}",
            'Set accelerator = "cpu", or use a Turing card (GeForce RTX 20, T4) or newer',
        )


def _run_closed(cards: list[Card]) -> bool:
    return all(found.closed for found in cards)


def _check_passthrough(hardware: Hardware, notes: Notes) -> None:
    if passed := [gpu.address for gpu in hardware.nvidia_gpus if gpu.driver == PASSED_THROUGH]:
        notes.refuse(
            "gpu",
            f"{', '.join(passed)} is bound to {PASSED_THROUGH}: this host passes it to virtual machines",
            "Deploy to the virtual machine that has the GPU, or give it back to this host: remove vfio-pci.ids from "
            "the kernel's command line and from /etc/modprobe.d, and reboot",
        )


def _check_mig(hardware: Hardware, notes: Notes) -> None:
    divided = [gpu.address for gpu in hardware.driver.gpus if gpu.mig]
    if divided:
        notes.refuse(
            "gpu",
            f"MIG is enabled on {', '.join(divided)}, which llmhost does not support yet: the engine takes whole GPUs",
            "Stop what uses the GPU, then turn it off: nvidia-smi -mig 0 (a reset or a reboot may be due)",
        )


# --- firmware ---------------------------------------------------------------------------------------------------


def check_secure_boot(hardware: Hardware, source: str, prebuilt: bool, notes: Notes) -> None:
    """Modules that DKMS signs with a key which somebody would have to confirm first."""
    if prebuilt or not hardware.secure_boot or hardware.mok_enrolled:
        return
    if source == CUDA and hardware.os_id == "ubuntu":
        instead = 'set driver_source = "ubuntu-archive", whose modules are signed'
    elif hardware.os_id == "ubuntu":
        instead = "boot a kernel of Ubuntu's own (linux-image-generic), whose modules are signed"
    else:
        instead = "turn Secure Boot off in the firmware"
    notes.refuse(
        "secure boot",
        "Secure Boot is on, and modules that DKMS builds here are signed with a key that somebody must confirm on the "
        "console at the next boot (MOK)",
        f"Enrol the key once by hand: {_ENROL[hardware.os_id]}, reboot, choose Enroll MOK on the console; then deploy "
        f"again. Or {instead}",
    )


# With openssl, because `dkms generate_mok` is newer than Debian 12's dkms.
_ENROL = {
    "ubuntu": "apt-get install mokutil shim-signed; update-secureboot-policy --new-key; "
    "mokutil --import /var/lib/shim-signed/mok/MOK.der",
    "debian": "apt-get install mokutil openssl; mkdir -p /var/lib/dkms; openssl req -new -x509 -newkey rsa:2048 -nodes "
    "-days 36500 -subj /CN=DKMS/ -keyout /var/lib/dkms/mok.key -outform DER -out /var/lib/dkms/mok.pub; "
    "mokutil --import /var/lib/dkms/mok.pub",
}


# --- one origin -------------------------------------------------------------------------------------------------

_ORIGIN_NAMES = {
    ARCHIVE: "Ubuntu's archive",
    CUDA: "NVIDIA's repository",
    "debian-archive": "Debian's archive",
    "ppa": "the graphics-drivers PPA",
}


def check_origins(hardware: Hardware, source: str, notes: Notes) -> None:
    """Packages of one driver from two origins do not fit together (field notes, nvidia.md, 1.1 and 7.7)."""
    for entry in hardware.apt:
        if "graphics-drivers" in entry.uri:
            notes.refuse(
                "driver_source",
                f"two origins: {entry.path} has the graphics-drivers PPA beside {source}",
                "Remove it and its packages: add-apt-repository --remove ppa:graphics-drivers/ppa; "
                "apt-get purge '*nvidia*'",
            )
        elif entry.uri.startswith("file:") and re.search("cuda|nvidia-driver", entry.uri):
            notes.refuse(
                "driver_source",
                f"two origins: {entry.path} has a local repository ({entry.uri}) beside {source}",
                "Remove the package that brought it: apt-get purge 'cuda-repo-*' 'nvidia-driver-local-repo-*'",
            )
    for origin, names in _origins(hardware).items():
        if origin != source:
            keep = f'; or set driver_source = "{origin}"' if origin in (ARCHIVE, CUDA) else ""
            notes.refuse(
                "driver_source",
                f"two origins: driver packages from {_ORIGIN_NAMES[origin]} are installed ({', '.join(names[:3])}), "
                f"and {_ORIGIN_NAMES[source]} is planned",
                f"Remove them: apt-get purge {' '.join(names)}{keep}",
            )


def _origins(hardware: Hardware) -> dict[str, list[str]]:
    """Installed driver packages by where their versions say they come from."""
    found: dict[str, list[str]] = {}
    for package in hardware.packages:
        if package.status in ("ii", "hi") and _is_driver(package.name) and _driver_version(package):
            found.setdefault(_origin(hardware, package), []).append(package.name)
    return found


def _origin(hardware: Hardware, package: Package) -> str:
    if "~gpu" in package.version:
        return "ppa"
    if re.search(r"ubuntu0\.\d\d\.\d\d", package.version):
        return ARCHIVE
    # A release's first driver has the form that NVIDIA's packages have: 595.58.03-0ubuntu1. What is known decides.
    if hardware.driver.managed_source:
        return hardware.driver.managed_source
    if hardware.os_id != "ubuntu":
        # Debian stops at 550, NVIDIA's repository for it starts above (field notes 0.7).
        return CUDA if int(_driver_version(package)) >= 560 else "debian-archive"
    return CUDA if any("/cuda/repos" in entry.uri for entry in hardware.apt) else ARCHIVE


def _is_driver(name: str) -> bool:
    known = drivers()
    return any(fnmatch(name, glob) for glob in known.driver_globs) and not any(
        fnmatch(name, glob) for glob in known.not_driver_globs
    )


def _driver_version(package: Package) -> str:
    """The branch in a package's version, "" where it is no driver's: prebuilt modules have their kernel's."""
    version = re.match(r"(?:\d+:)?(\d{3})\.\d+", package.version)
    return version[1] if version else ""


# --- holds ------------------------------------------------------------------------------------------------------


def held(hardware: Hardware) -> list[str]:
    """Installed packages that an operator told apt to leave as they are."""
    return [package.name for package in hardware.packages if package.status == "hi"]


def refuse_held(setting: str, message: str, names: list[str], notes: Notes) -> None:
    """Refuse because packages on hold would have to change; `message` says why."""
    notes.refuse(
        setting, f"{message}: {', '.join(names)}", f"Release them: apt-mark unhold {' '.join(names)}, then deploy again"
    )


def check_holds(hardware: Hardware, branch: str, kernels: Kernels, notes: Notes) -> None:
    """Packages of another branch on hold, and kernels on hold that still lack their modules."""
    others = [p.name for p in hardware.packages if p.status == "hi" and _is_driver(p.name) and _other(p, branch)]
    if others:
        refuse_held("driver_branch", f"is {branch}, but packages of another branch are on hold", others, notes)
    metas = [name for name in held(hardware) if name in kernels.metas]
    if metas and not _has_modules(hardware, branch):
        message = "the driver's modules come with the newest kernel, but the kernel's packages are on hold"
        refuse_held("kernel", message, metas, notes)


def _other(package: Package, branch: str) -> bool:
    named = re.search(r"-(\d{3})(?:-|$)", package.name)
    return (named[1] if named else _driver_version(package)) not in ("", branch)


def _has_modules(hardware: Hardware, branch: str) -> bool:
    last = newest(hardware)
    return any(k.version == last and k.module_version.partition(".")[0] == branch for k in hardware.kernels)
