"""Which kernel packages a driver's modules must follow on this host. Pure.

Ubuntu's prebuilt modules come for a flavour of kernel (field notes, nvidia.md, 0.2 and 2.3); the meta package of the
flavour, not the running kernel, is what the plan names: it is the same before and after a reboot into a newer kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmhost.catalogue import drivers
from llmhost.hardware import Hardware
from llmhost.plan.notes import Notes
from llmhost.plan.repositories import installed


@dataclass(frozen=True)
class Kernels:
    """What the host boots. `flavours` are those of prebuilt modules, empty where there are none."""

    flavours: tuple[str, ...]  # "generic", "generic-hwe-24.04"
    family: str  # "generic", "aws", "amd64"; "" for a kernel of no distribution
    build: tuple[str, ...]  # packages that modules are built with: image and headers, kept in step


def kernels(hardware: Hardware, notes: Notes) -> Kernels:
    """The host's kernels; refuses where the next boot may start one that gets no modules."""
    if hardware.os_id == "ubuntu":
        return _ubuntu(hardware, notes)
    family = _debian_family(hardware.kernel)
    return Kernels((), family, _build((family,) if family else (), hardware))


def newest(hardware: Hardware) -> str:
    """The newest kernel installed, which is what the next boot starts; the running one where none is seen."""
    return max((kernel.version for kernel in hardware.kernels), key=_order, default=hardware.kernel)


def _ubuntu(hardware: Hardware, notes: Notes) -> Kernels:
    family = _ubuntu_family(hardware.kernel)
    if family not in (*drivers().ubuntu_archive.flavours, *drivers().ubuntu_archive.other_flavours):
        return Kernels((), "", _build((), hardware))
    metas = _metas(hardware, family)
    _check_next_boot(hardware, family, metas, notes)
    names = metas or (_by_series(hardware, family),)
    flavours = tuple(dict.fromkeys(name.replace("virtual", "generic") for name in names))
    prebuilt = {*drivers().ubuntu_archive.flavours, f"generic-hwe-{hardware.os_version}"}
    return Kernels(flavours if prebuilt.issuperset(flavours) else (), family, _build(names, hardware))


def _ubuntu_family(kernel: str) -> str:
    """ "generic" of 6.8.0-149-generic; "" of kernels that Ubuntu did not build for a release, such as mainline's."""
    parts = re.fullmatch(r"\d+\.\d+\.\d+-\d{1,4}-([a-z0-9-]+)", kernel)  # mainline builds count 070200
    return parts[1] if parts else ""


def _metas(hardware: Hardware, family: str) -> tuple[str, ...]:
    """Flavours of the installed kernel meta packages of one family, "virtual" being generic with fewer modules."""
    own = "generic|virtual" if family == "generic" else re.escape(family)
    pattern = re.compile(rf"linux-(?:image-)?((?:{own})(?:-hwe-\d\d\.\d\d)?)")
    found = (pattern.fullmatch(name) for name in installed(hardware))
    return tuple(sorted({match[1] for match in found if match}))


def _by_series(hardware: Hardware, family: str) -> str:
    """The flavour of a kernel that no meta package keeps: generic is the release's own, or a newer one."""
    series = drivers().ubuntu_archive.series.get(hardware.os_version, "")
    if family != "generic" or hardware.kernel.startswith(f"{series}."):
        return family
    return f"generic-hwe-{hardware.os_version}"


def _check_next_boot(hardware: Hardware, family: str, metas: tuple[str, ...], notes: Notes) -> None:
    others = [name for name in drivers().ubuntu_archive.flavours if name != family and _metas(hardware, name)]
    if others and not metas:
        notes.refuse(
            "kernel",
            f"{hardware.kernel} runs, but the kernel that the host keeps current is {' and '.join(others)}: the next "
            "boot may start one that has no modules",
            f"Reboot into the {others[0]} kernel, or install linux-image-{family} and remove linux-image-{others[0]}",
        )
        return
    last = newest(hardware)
    if _ubuntu_family(last) != family:
        notes.refuse(
            "kernel",
            f"{hardware.kernel} runs, but the newest kernel installed is {last}, of another flavour: the next boot may "
            "start it, and it would have no modules",
            f"Reboot into {last} first, or remove it",
        )


def _debian_family(kernel: str) -> str:
    return next((name for name in drivers().debian_flavours if re.fullmatch(rf"\d[^-]*(-\d+)?-{name}", kernel)), "")


def _build(names: tuple[str, ...], hardware: Hardware) -> tuple[str, ...]:
    # Headers alone would be those of the archive's newest kernel, which need not be installed.
    metas = tuple(f"linux-{part}-{name}" for name in names for part in ("image", "headers"))
    return metas or (f"linux-headers-{hardware.kernel}",)


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
