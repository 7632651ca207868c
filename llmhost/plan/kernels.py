"""Which kernel packages a driver's modules must follow on this host. Pure.

Ubuntu's prebuilt modules come for a flavour of kernel (field notes, nvidia.md, 0.2 and 2.3); the meta package of the
flavour, not the running kernel, is what the plan names: it is the same before and after a reboot into a newer kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llmhost.catalogue import drivers
from llmhost.hardware import Hardware
from llmhost.plan.notes import Notes
from llmhost.plan.repositories import installed


@dataclass(frozen=True)
class Kernels:
    """What the host boots. `flavours` are those of prebuilt modules, empty where there are none."""

    flavours: tuple[str, ...]  # "generic", "generic-hwe-24.04"
    family: str  # "generic", "aws", "amd64"; "" for a kernel of no distribution
    keep: tuple[str, ...]  # packages that prebuilt modules go with: the kernel's own, as the host has them
    build: tuple[str, ...]  # packages that modules are built with: image and headers, kept in step
    metas: tuple[str, ...]  # every package that moves these kernels, for holds


def kernels(hardware: Hardware, notes: Notes) -> Kernels:
    """The host's kernels; refuses where the next boot may start one that gets no modules."""
    if hardware.os_id == "ubuntu":
        return _ubuntu(hardware, notes)
    family = _debian_family(hardware.kernel)
    found = _kernels((), family, (family,) if family else (), hardware)
    # The metas are those of the release: a kernel of backports is newer, and has its headers from its own package only.
    backported = (f"linux-headers-{hardware.kernel}",) if family and "bpo" in hardware.kernel else ()
    return replace(found, build=(*found.build, *backported))


def newest(hardware: Hardware) -> str:
    """The newest kernel installed, which is what the next boot starts; the running one where none is seen."""
    return max((kernel.version for kernel in hardware.kernels), key=_order, default=hardware.kernel)


def _ubuntu(hardware: Hardware, notes: Notes) -> Kernels:
    family = _ubuntu_family(hardware.kernel)
    if family not in _families():
        headers = rf"linux-headers-{re.escape(family)}{_SERIES}"
        own = tuple(name for name in installed(hardware) if family and re.fullmatch(headers, name))
        return replace(_kernels((), "", (), hardware), build=own or _own_headers(hardware))
    metas = _metas(hardware, family)
    _check_next_boot(hardware, family, metas, notes)
    names = metas or (_by_series(hardware, family),)
    flavours = tuple(dict.fromkeys(name.replace("virtual", "generic") for name in names))
    prebuilt = {*drivers().ubuntu_archive.flavours, f"generic-hwe-{hardware.os_version}"}
    return _kernels(flavours if prebuilt.issuperset(flavours) else (), family, names, hardware)


# What tells the metas of one flavour apart: linux-image-aws-lts-24.04, -aws-6.8, -generic-hwe-24.04-edge, -oem-24.04d.
_SERIES = r"(?:-(?:lts-|hwe-)?\d+\.\d+[a-z]?)?(?:-edge)?"


def _families() -> tuple[str, ...]:
    return (*drivers().ubuntu_archive.flavours, *drivers().ubuntu_archive.other_flavours)


def _ubuntu_family(kernel: str) -> str:
    """ "generic" of 6.8.0-149-generic; "" of kernels that Ubuntu did not build for a release, such as mainline's."""
    parts = re.fullmatch(r"\d+\.\d+\.\d+-\d{1,4}-([a-z0-9-]+)", kernel)  # mainline builds count 070200
    return parts[1] if parts else ""


def _metas(hardware: Hardware, family: str) -> tuple[str, ...]:
    """Flavours of the installed kernel meta packages of one family, "virtual" being generic with fewer modules."""
    own = "generic|virtual" if family == "generic" else re.escape(family)
    pattern = re.compile(rf"linux-(?:image-)?((?:{own}){_SERIES})")
    found = (pattern.fullmatch(name) for name in installed(hardware))
    return tuple(sorted({match[1] for match in found if match}))


def _by_series(hardware: Hardware, family: str) -> str:
    """The flavour of a kernel that no meta package keeps: generic is the release's own, or a newer one."""
    if family == "oem":  # its metas all name a release
        return f"oem-{hardware.os_version}"
    series = drivers().ubuntu_archive.series.get(hardware.os_version, "")
    if family not in ("generic", "generic-64k") or hardware.kernel.startswith(f"{series}."):
        return family
    return f"{family}-hwe-{hardware.os_version}"


def _check_next_boot(hardware: Hardware, family: str, metas: tuple[str, ...], notes: Notes) -> None:
    others = [name for name in _families() if name != family and _metas(hardware, name)]
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


def _kernels(flavours: tuple[str, ...], family: str, names: tuple[str, ...], hardware: Hardware) -> Kernels:
    """The packages that go with meta packages of these names."""
    images = tuple(f"linux-image-{name}" for name in names)
    headers = tuple(f"linux-headers-{name}" for name in names)
    # Modules alone may bring a newer kernel's image without what its meta package adds to it: linux-modules-extra,
    # with drivers of network cards. Headers alone would be those of the archive's newest kernel, which need not be
    # installed.
    with_headers = any(name.startswith("linux-headers-") for name in installed(hardware))
    return Kernels(
        flavours=flavours,
        family=family,
        keep=(*images, *(headers if with_headers else ())),
        build=(*images, *headers) or _own_headers(hardware),
        metas=(*images, *headers, *(f"linux-{name}" for name in names)),
    )


def _own_headers(hardware: Hardware) -> tuple[str, ...]:
    return (f"linux-headers-{hardware.kernel}",)


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
