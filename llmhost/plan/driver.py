"""Which NVIDIA driver a host gets: from where, which branch and flavour, with which packages. Pure.

The rules are those of field notes nvidia.md, sections 0 to 3; what is data lies in llmhost/catalog. A decision never
tells the state of the moment, but for `reboot_expected`: the plan of a converged host is the plan of the bare one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from llmhost.catalogue import Card, card, drivers
from llmhost.hardware import Hardware, Package
from llmhost.plan.kernels import Kernels, kernels, newest
from llmhost.plan.model import AptPin, AptSource, DriverPlan
from llmhost.plan.notes import Notes
from llmhost.plan.repositories import cuda_source, distribution, host_of, known_distribution
from llmhost.settings import Settings

ARCHIVE, CUDA, INSTALLED = "ubuntu-archive", "cuda-repository", "installed"
# CUDA of the wheels the engine is locked to (field notes 0.6): it sets the oldest branch.
WHEELS_CUDA = "13"
# What systemd-detect-virt calls containers whose kernel, and therefore driver, is another machine's. A lab's
# systemd-nspawn is none of them: its stand-ins are installed like a real driver.
CONTAINERS = ("docker", "podman", "lxc", "lxc-libvirt", "openvz", "rkt", "pouch", "proot", "container-other")
PASSED_THROUGH = "vfio-pci"
FREE_DRIVERS = ("nouveau", "nova", "nova_core", "nova-core")


def plan_driver(settings: Settings, hardware: Hardware, accelerator: str, notes: Notes) -> DriverPlan | None:
    """The driver's plan; None where none is wanted, or where the notes say why there can be none.

    `accelerator` is what the engine will compute on: "cpu" or "nvidia".
    """
    problems = len(notes.problems)
    if not _wanted(settings, hardware, accelerator, notes):
        return None
    cards = tuple(card(gpu.device) for gpu in hardware.nvidia_gpus)
    notes.decide(
        "driver", "gpus", _count(cards, hardware), "what the PCI bus shows" if cards else "what nvidia-smi shows"
    )
    host = Host(settings, hardware, accelerator, cards, notes)
    _check_cards(host)
    if len(notes.problems) > problems:
        return None
    source = _source(host)
    planned = _installed(host) if source == INSTALLED else _provisioned(host, source) if source else None
    return None if len(notes.problems) > problems else planned


@dataclass(frozen=True)
class Host:
    """What every decision here is taken from, and where it is written down."""

    settings: Settings
    hardware: Hardware
    accelerator: str
    cards: tuple[Card, ...]
    notes: Notes

    @property
    def given_branch(self) -> bool:
        return self.notes.given("driver_branch") != "the default"

    @property
    def outside(self) -> Outside | None:
        """Why this host's driver is none of ours to install, None where it is."""
        contained = {"container"} if self.hardware.virtualisation in CONTAINERS else set()
        return next((row for name, row in OUTSIDE.items() if name in contained | self.hardware.platform), None)


@dataclass(frozen=True)
class Outside:
    """A kind of host whose driver somebody else installs, and how it is brought up to date."""

    reason: str
    remedy: str


OUTSIDE = {
    "container": Outside(
        "a container uses the driver of the machine it runs on",
        "Install or update the driver on that machine, and pass its GPUs into the container",
    ),
    "dgx": Outside(
        "DGX OS brings its own driver",
        "Update DGX OS, its driver included: apt-get update && apt-get full-upgrade, then reboot",
    ),
    "wsl": Outside(
        "Windows brings the driver of WSL",
        "Install or update NVIDIA's driver in Windows, then run `wsl --shutdown` there",
    ),
}


# --- whether ----------------------------------------------------------------------------------------------------


def _wanted(settings: Settings, hardware: Hardware, accelerator: str, notes: Notes) -> bool:
    wish = settings.driver_source
    if "jetson" in hardware.platform and settings.accelerator != "cpu":
        notes.refuse(
            "machine",
            "a Jetson: its driver is part of JetPack, and the engine's wheels are not built for it",
            "Jetsons are not supported: use NVIDIA's JetPack containers, or a host with a PCI Express GPU",
        )
        return False
    if not has_gpu(hardware):
        without = "" if wish in ("auto", "none") else f"; driver_source ({notes.given('driver_source')}) has no effect"
        notes.decide("driver", "driver_source", "none", f"the host has no NVIDIA GPU{without}")
        return False
    if wish == "none":
        notes.decide("driver", "driver_source", "none", notes.given("driver_source"))
        if accelerator == "nvidia":
            notes.refuse(
                "driver_source",
                "is none, but the engine is to run on the GPU and needs a driver",
                'Set driver_source = "auto", or "installed" to keep the one that is there, or accelerator = "cpu"',
            )
        return False
    if wish == "auto" and accelerator == "cpu":
        notes.decide("driver", "driver_source", "none", "the engine runs on the CPU, the GPU is left alone")
        return False
    return True


def accelerator_of(settings: Settings, hardware: Hardware) -> str:
    """What the engine will compute on; plan/engine.py writes it down with its reason."""
    if settings.accelerator != "auto":
        return settings.accelerator
    return "nvidia" if has_gpu(hardware) else "cpu"


def has_gpu(hardware: Hardware) -> bool:
    """Whether the host has an NVIDIA GPU, on its PCI bus or, in WSL, as its nvidia-smi says."""
    return bool(hardware.nvidia_gpus) or ("wsl" in hardware.platform and bool(hardware.driver.smi_version))


def _count(cards: tuple[Card, ...], hardware: Hardware) -> str:
    if not cards:
        return ", ".join(gpu.name for gpu in hardware.driver.gpus) or "1 GPU"
    titles = dict.fromkeys(found.title for found in cards)
    return "; ".join(f"{[c.title for c in cards].count(title)} x {title}" for title in titles)


def _check_cards(host: Host) -> None:
    _check_passthrough(host)
    dead = [found for found in host.cards if not _flavours(found)]
    closed_only = [found for found in host.cards if found.closed and not found.open]
    newer = [found for found in host.cards if found.open]
    if dead:
        host.notes.refuse(
            "gpu",
            f"{_titles(dead)}: no living driver branch has it, the last (470) is end of life",
            "Use a Turing card or newer, or leave this one without a driver: "
            'accelerator = "cpu" and driver_source = "none"',
        )
    elif closed_only and newer and not (_run_closed(newer) and host.settings.driver_modules == "closed"):
        either = ', or set driver_modules = "closed" and accelerator = "cpu"' if _run_closed(newer) else ""
        host.notes.refuse(
            "gpu",
            f"mixed generations: {_titles(closed_only)} needs closed modules, {_titles(newer)} is driven by open ones, "
            "and a host has one driver",
            f"Take one of the two out of the host{either}",
        )
    elif host.accelerator == "nvidia" and (old := [found for found in host.cards if not found.generation.vllm]):
        host.notes.refuse(
            "accelerator",
            f"{_titles(old)}: current vLLM needs compute capability 7.5, this has {old[0].capability}",
            'Set accelerator = "cpu", or use a Turing card (GeForce RTX 20, T4) or newer',
        )


def _run_closed(cards: list[Card]) -> bool:
    return all(found.closed for found in cards)


def _check_passthrough(host: Host) -> None:
    if passed := [gpu.address for gpu in host.hardware.nvidia_gpus if gpu.driver == PASSED_THROUGH]:
        host.notes.refuse(
            "gpu",
            f"{', '.join(passed)} is bound to {PASSED_THROUGH}: this host passes it to virtual machines",
            "Deploy to the virtual machine that has the GPU, or give it back to this host: remove vfio-pci.ids from "
            "the kernel's command line and from /etc/modprobe.d, and reboot",
        )


def _titles(cards: list[Card]) -> str:
    return "; ".join(dict.fromkeys(found.title for found in cards))


# --- from where -------------------------------------------------------------------------------------------------


def _source(host: Host) -> str:
    """The driver's source; "" where the notes say why there is none."""
    wish, notes = host.settings.driver_source, host.notes
    if host.outside and wish in ("auto", INSTALLED):
        return notes.decide("driver", "driver_source", INSTALLED, host.outside.reason)
    if host.outside:
        notes.refuse(
            "driver_source", f"is {wish}, but {host.outside.reason}", 'Set driver_source = "installed", or leave it out'
        )
        return ""
    if "runfile" in host.hardware.platform and wish != INSTALLED:
        notes.refuse(
            "driver",
            "the host has a driver installed by NVIDIA's .run file: packages would overwrite half of it",
            "Remove it with `nvidia-uninstall` and reboot"
            + ("" if _unfit(host) else ', or keep it: driver_source = "installed"'),
        )
        return ""
    if wish == "auto":
        return _auto_source(host)
    if wish == ARCHIVE and host.hardware.os_id != "ubuntu":
        notes.refuse(
            "driver_source",
            f"is {ARCHIVE}, but the host runs {host.hardware.os_name}",
            'Set driver_source = "cuda-repository", or leave it out',
        )
        return ""
    return notes.decide("driver", "driver_source", wish, notes.given("driver_source"))


def _auto_source(host: Host) -> str:
    managed, notes = host.hardware.driver.managed_source, host.notes
    if not managed and _suits(host):
        reason = f"driver {_found_version(host)} was there and will do: llmhost does not change it"
        return notes.decide("driver", "driver_source", INSTALLED, reason)
    if host.hardware.os_id != "ubuntu":
        return notes.decide(
            "driver",
            "driver_source",
            CUDA,
            f"Debian's own drivers (535 in 12, 550 in 13) are older than {_floor()}, which wheels for CUDA "
            f"{WHEELS_CUDA} need",
        )
    if managed == CUDA:
        return notes.decide("driver", "driver_source", CUDA, "llmhost took it from there, and a driver has one origin")
    return notes.decide(
        "driver", "driver_source", ARCHIVE, "Ubuntu's archive has modules built and signed for Ubuntu's own kernels"
    )


def _suits(host: Host) -> bool:
    """Whether a driver that was there is what the settings ask for, and works."""
    found = host.hardware.driver
    wrong_branch = host.given_branch and _branch_of_version(_found_version(host)) != host.settings.driver_branch
    wrong_modules = host.settings.driver_modules not in ("auto", found.loaded_modules)
    return not (_unfit(host) or wrong_branch or wrong_modules)


def _unfit(host: Host) -> str:
    """Why the driver that is there will not do, "" where it will."""
    found, version = host.hardware.driver, _found_version(host)
    if not found.smi_version:
        return f"driver {version} is there, but nvidia-smi gives no answer" if version else "there is no driver"
    if found.loaded_version and found.loaded_version != found.smi_version:
        return f"the module loaded is {found.loaded_version}, the libraries are {found.smi_version}"
    least = _least_branch(host)
    if int(_branch_of_version(version) or 0) < least:
        wheels = f", which wheels for CUDA {WHEELS_CUDA} need" if least == int(_floor()) else ""
        return f"driver {version} is older than branch {least}{wheels}"
    wrong = [c for c in host.cards if found.loaded_modules and found.loaded_modules not in _flavours(c)]
    return f"{found.loaded_modules} modules do not run {_titles(wrong)}" if wrong else ""


def _found_version(host: Host) -> str:
    found = host.hardware.driver
    return found.smi_version or found.loaded_version or found.user_space_version


def _branch_of_version(version: str) -> str:
    digits = re.match(r"\d+", version)
    return digits[0] if digits else ""


def _floor() -> str:
    return drivers().least_branch[WHEELS_CUDA]


def _least_branch(host: Host) -> int:
    floor = [_floor()] if host.accelerator == "nvidia" else []
    return max([0, *(int(branch) for branch in (*floor, *(c.least_branch for c in host.cards)) if branch)])


def _flavours(found: Card) -> tuple[str, ...]:
    return tuple(name for name, runs in (("open", found.open), ("closed", found.closed)) if runs)


# --- a driver that is there -------------------------------------------------------------------------------------


def _installed(host: Host) -> DriverPlan | None:
    settings, hardware, notes = host.settings, host.hardware, host.notes
    if unfit := _unfit(host):
        notes.refuse("driver_source", f"the installed driver is to be used, but {unfit}", _update_remedy(host))
        return None
    version = notes.decide("driver", "driver_version", _found_version(host), "the installed one")
    branch = _branch_of_version(version)
    if host.given_branch and branch != settings.driver_branch:
        reason = f"the installed driver's; driver_branch = {settings.driver_branch} has no effect"
    else:
        reason = "the installed driver's"
    notes.decide("driver", "driver_branch", branch, reason)
    modules = hardware.driver.loaded_modules or "open"
    notes.decide("driver", "driver_modules", modules, "the installed driver's")
    fabric = _fabric_manager(host) if not host.outside or "dgx" in hardware.platform else False
    known = drivers().branches.get(branch)
    toolkit = _cuda_toolkit(host, hardware.driver.cuda_version or (known.cuda if known else ""))
    notes.decide("driver", "reboot_expected", False, "the installed driver is left as it is")
    return DriverPlan(
        branch=branch,
        version=version,
        modules=modules,
        source=INSTALLED,
        packages=toolkit.packages,
        fabric_manager=fabric,
        reboot_expected=False,
        generation=_generation(host),
        gpus=len(host.cards) or len(hardware.driver.gpus) or 1,
        prebuilt=False,
        repositories=toolkit.repositories,
        pins=(*toolkit.pins, *(_against_cuda(settings) if toolkit.repositories else ())),
        blacklist_nouveau=False,
        frozen=_frozen() if not host.outside or "dgx" in hardware.platform else (),
        cuda_toolkit=settings.cuda_toolkit,
        reboot_allowed=settings.reboot_allowed,
    )


def _update_remedy(host: Host) -> str:
    if host.outside:
        return host.outside.remedy
    if "runfile" in host.hardware.platform:
        return 'Remove it with `nvidia-uninstall`, reboot, and set driver_source = "auto"'
    return 'Set driver_source = "auto", so that llmhost provisions one'


def _generation(host: Host) -> str:
    if host.cards:
        return " + ".join(sorted({found.generation.name for found in host.cards}))
    names = {gpu.architecture.partition(" ")[0].lower() for gpu in host.hardware.driver.gpus}
    return " + ".join(sorted(names)) or "unknown"


# --- a driver that llmhost provisions ---------------------------------------------------------------------------


def _provisioned(host: Host, source: str) -> DriverPlan | None:
    settings, hardware, notes = host.settings, host.hardware, host.notes
    if not known_distribution(hardware):
        return None  # plan/host.py refuses the system
    modules = _modules(host)
    branch = _branch(host, source, modules)
    if not (modules and branch):
        return None
    version = drivers().branches[branch].version
    component = drivers().ubuntu_archive.components[branch]
    held = f"what Ubuntu's archive ({component}) held on 2026-11-20; its updates stay in the branch"
    pinned = "pinned" if source == CUDA else held
    notes.decide("driver", "driver_version", version, pinned)
    booted = kernels(hardware, notes)
    prebuilt = _prebuilt(host, source, modules, booted)
    _check_secure_boot(host, source, prebuilt)
    _check_origins(host, source)
    _check_holds(host, branch)
    fabric = _fabric_manager(host)
    toolkit = _cuda_toolkit(host, drivers().branches[branch].cuda)
    fill = {"<branch>": branch, "<version>": version, "<open>": "-open" if modules == "open" else ""}
    names = (
        _archive_packages(host, booted, prebuilt, fabric)
        if source == ARCHIVE
        else _cuda_packages(host, branch, booted, fabric)
    )
    packages = tuple(dict.fromkeys((*(_filled(name, fill) for name in names), *toolkit.packages)))
    notes.decide("driver", "driver_packages", " ".join(packages), _packages_reason(host, source))
    subnet_manager = fabric and any(found.nvlink5 for found in host.cards)
    return DriverPlan(
        branch=branch,
        version=version,
        modules=modules,
        source=source,
        packages=packages,
        fabric_manager=fabric,
        reboot_expected=_reboot_expected(host, source, branch, modules),
        generation=_generation(host),
        gpus=len(host.cards),
        prebuilt=prebuilt,
        repositories=_repositories(host, source == CUDA or subnet_manager or bool(toolkit.repositories)),
        pins=(*_pins(settings, hardware, source), *toolkit.pins),
        blacklist_nouveau=source == CUDA,
        frozen=_frozen(),
        cuda_toolkit=settings.cuda_toolkit,
        reboot_allowed=notes.decide("driver", "reboot_allowed", settings.reboot_allowed, notes.given("reboot_allowed")),
    )


def _frozen() -> tuple[str, ...]:
    return (*drivers().frozen["driver"], *drivers().frozen["kernel"])


# --- which modules, which branch ---


def _modules(host: Host) -> str:
    """The flavour of the kernel modules, "" where the notes say why none runs all cards."""
    wish, notes = host.settings.driver_modules, host.notes
    closed_only = [found for found in host.cards if not found.open]
    open_only = [found for found in host.cards if not found.closed]
    if (wish == "open" and closed_only) or (wish == "closed" and open_only):
        wrong, other = (closed_only, "closed") if wish == "open" else (open_only, "open")
        _refuse_modules(notes, f"is {wish}, but {_titles(wrong)} runs with {other} modules only", other)
        return ""
    if wish != "auto":
        return notes.decide("driver", "driver_modules", wish, notes.given("driver_modules"))
    if closed_only:
        return notes.decide("driver", "driver_modules", "closed", "cards before Turing have no other")
    unknown = any(found.generation.name == "unknown" for found in host.cards)
    reason = "an unknown card is a new one" if unknown else "Turing and newer"
    return notes.decide("driver", "driver_modules", "open", f"{reason}: NVIDIA's default, and all that Blackwell has")


def _refuse_modules(notes: Notes, message: str, other: str) -> None:
    notes.refuse("driver_modules", message, f'Set driver_modules = "{other}", or leave it out')


def _branch(host: Host, source: str, modules: str) -> str:
    """The driver branch, "" where the notes say why the one asked for cannot be."""
    settings, notes = host.settings, host.notes
    needed = max((found for found in host.cards if found.least_branch), key=lambda c: int(c.least_branch), default=None)
    wish = settings.driver_branch
    if needed and int(wish) < int(needed.least_branch):
        if host.given_branch:
            message = f"is {wish}, but {needed.title} needs {needed.least_branch}"
            return _refuse_branch(notes, message, needed.least_branch)
        wish = needed.least_branch
    branch = drivers().branches[wish]
    bounds = [found for found in host.cards if found.generation.most_branch]
    if bounds and int(wish) > int(bounds[0].generation.most_branch):
        most = bounds[0].generation.most_branch
        return _refuse_branch(notes, f"is {wish}, but the last branch for {bounds[0].title} is {most}", most)
    if modules and modules not in branch.modules:
        others = [name for name, row in drivers().branches.items() if modules in row.modules]
        instead = "" if needed else f", or driver_branch to {others[-1]}"
        notes.refuse(
            "driver_modules",
            f"is {modules}, but branch {wish} has {' and '.join(branch.modules)} modules only",
            f'Set driver_modules = "open"{instead}',
        )
        return ""
    if source == CUDA and distribution(host.hardware) in branch.unverified:
        system = host.hardware.os_name
        return _refuse_branch(
            notes, f"is {wish}, which NVIDIA's repository for {system} was not seen to have", "580 or 595"
        )
    life = f"supported until {branch.end_of_life}" if branch.end_of_life[-4:].isdigit() else branch.end_of_life
    if needed and wish == needed.least_branch and not host.given_branch:
        return notes.decide("driver", "driver_branch", wish, f"{needed.title} needs it; end of life {life}")
    return notes.decide("driver", "driver_branch", wish, f"{notes.given('driver_branch')}; {life}")


def _refuse_branch(notes: Notes, message: str, instead: str) -> Literal[""]:
    notes.refuse("driver_branch", message, f"Set driver_branch to {instead}")
    return ""


# --- modules for the host's kernels ---


def _prebuilt(host: Host, source: str, modules: str, booted: Kernels) -> bool:
    machines, notes = drivers().ubuntu_archive.prebuilt_closed_machines, host.notes
    if source == CUDA:
        return notes.decide("driver", "prebuilt", False, "NVIDIA's repository has sources only: DKMS builds")
    if modules == "closed" and host.hardware.machine not in machines:
        reason = f"no closed modules are prebuilt for {host.hardware.machine}: DKMS builds them"
        return notes.decide("driver", "prebuilt", False, reason)
    if not booted.flavours:
        kernel = booted.family or host.hardware.kernel
        reason = f"no modules are prebuilt for kernel {kernel}: DKMS builds them"
        return notes.decide("driver", "prebuilt", False, reason)
    names = " and ".join(booted.flavours)
    return notes.decide("driver", "prebuilt", True, f"signed modules for kernel flavour {names}, without a compiler")


def _check_secure_boot(host: Host, source: str, prebuilt: bool) -> None:
    if prebuilt or not host.hardware.secure_boot:
        return
    if source == CUDA and host.hardware.os_id == "ubuntu":
        instead = 'set driver_source = "ubuntu-archive", whose modules are signed'
    elif host.hardware.os_id == "ubuntu":
        instead = "boot a kernel of Ubuntu's own (linux-image-generic), whose modules are signed"
    else:
        instead = 'enrol a key and install the driver by hand, then set driver_source = "installed"'
    host.notes.refuse(
        "secure boot",
        "Secure Boot is on, and modules that DKMS builds here are signed with a key that somebody must confirm on the "
        "console at the next boot (MOK)",
        f"Turn Secure Boot off in the firmware, or {instead}",
    )


# --- one origin ---


def _check_origins(host: Host, source: str) -> None:
    """Packages of one driver from two origins do not fit together (field notes 1.1, 7.7)."""
    notes = host.notes
    for entry in host.hardware.apt:
        if "graphics-drivers" in entry.uri:
            notes.refuse(
                "driver_source",
                f"two origins: {entry.path} has the graphics-drivers PPA beside {source}",
                "Remove it and its packages: add-apt-repository --remove ppa:graphics-drivers/ppa; "
                "apt-get purge '*nvidia*'",
            )
        elif entry.uri.startswith("file:"):
            notes.refuse(
                "driver_source",
                f"two origins: {entry.path} has a local repository ({entry.uri}) beside {source}",
                "Remove the package that brought it: apt-get purge 'cuda-repo-*' 'nvidia-driver-local-repo-*'",
            )
    for origin, names in _origins(host).items():
        if origin != source:
            notes.refuse(
                "driver_source",
                f"two origins: driver packages from {_ORIGIN_NAMES[origin]} are installed ({', '.join(names[:3])}), "
                f"and {_ORIGIN_NAMES[source]} is planned",
                f"Remove them: apt-get purge {' '.join(_families(names))}{_or_keep(origin)}",
            )


_ORIGIN_NAMES = {
    ARCHIVE: "Ubuntu's archive",
    CUDA: "NVIDIA's repository",
    "debian-archive": "Debian's archive",
    "ppa": "the graphics-drivers PPA",
}


def _origins(host: Host) -> dict[str, list[str]]:
    """Installed driver packages by where their versions say they come from."""
    found: dict[str, list[str]] = {}
    for package in host.hardware.packages:
        if package.status in ("ii", "hi") and _is_driver(package.name) and _driver_version(package):
            found.setdefault(_origin(host, package), []).append(package.name)
    return found


def _origin(host: Host, package: Package) -> str:
    if "~gpu" in package.version:
        return "ppa"
    if re.search(r"ubuntu0\.\d\d\.\d\d", package.version):
        return ARCHIVE
    # A release's first driver has the form that NVIDIA's packages have: 595.58.03-0ubuntu1. What is known decides.
    if host.hardware.driver.managed_source:
        return host.hardware.driver.managed_source
    if host.hardware.os_id != "ubuntu":
        # Debian stops at 550, NVIDIA's repository for it starts above (field notes 0.7).
        return CUDA if int(_driver_version(package)) >= 560 else "debian-archive"
    return CUDA if any("/cuda/repos" in entry.uri for entry in host.hardware.apt) else ARCHIVE


def _is_driver(name: str) -> bool:
    known = drivers()
    return any(fnmatch(name, glob) for glob in known.driver_globs) and not any(
        fnmatch(name, glob) for glob in known.not_driver_globs
    )


def _driver_version(package: Package) -> str:
    """The branch in a package's version, "" where it is no driver's: prebuilt modules have their kernel's."""
    version = re.match(r"(?:\d+:)?(\d{3})\.\d+", package.version)
    return version[1] if version else ""


def _families(names: list[str]) -> list[str]:
    return [f"'{glob}'" for glob in drivers().driver_globs if any(fnmatch(name, glob) for name in names)]


def _or_keep(origin: str) -> str:
    return f'; or set driver_source = "{origin}"' if origin in (ARCHIVE, CUDA) else ""


def _check_holds(host: Host, branch: str) -> None:
    held = [p for p in host.hardware.packages if p.status.startswith("h") and _is_driver(p.name)]
    blocking = [p.name for p in held if _held_branch(p) not in ("", branch)]
    if blocking:
        host.notes.refuse(
            "driver_branch",
            f"is {branch}, but packages of another branch are on hold: {', '.join(blocking)}",
            f"Release them: apt-mark unhold {' '.join(blocking)}",
        )


def _held_branch(package: Package) -> str:
    named = re.search(r"-(\d{3})(?:-|$)", package.name)
    return named[1] if named else _driver_version(package)


# --- NVSwitch ---


def _fabric_manager(host: Host) -> bool:
    switches = host.hardware.nvswitches
    reason = f"{switches} NVSwitches" if switches else "no NVSwitch is visible: there is none, or its host manages it"
    return host.notes.decide("driver", "fabric_manager", switches > 0, reason)


# --- packages and where they come from ---


def _archive_packages(host: Host, booted: Kernels, prebuilt: bool, fabric: bool) -> list[str]:
    archive = drivers().ubuntu_archive
    ready = [archive.prebuilt.replace("<flavour>", flavour) for flavour in booted.flavours]
    modules = ready if prebuilt else [*archive.dkms, *booted.build]
    switches = [*archive.fabric_manager, *_nvlink5(host, booted)] if fabric else []
    return [*archive.packages, *modules, *switches]


def _cuda_packages(host: Host, branch: str, booted: Kernels, fabric: bool) -> list[str]:
    cuda, system = drivers().cuda_repository, host.hardware.os_id
    named = cuda.packages.get(f"{system} {branch}", cuda.packages[system])
    switches = [*cuda.fabric_manager, *_nvlink5(host, booted)] if fabric else []
    return [cuda.pinning, *named, *cuda.dkms, *booted.build, *switches]


def _nvlink5(host: Host, booted: Kernels) -> list[str]:
    if not any(found.nvlink5 for found in host.cards):
        return []
    extra = drivers().ubuntu_archive.extra_modules.get(booted.family, "")
    return [*drivers().cuda_repository.nvlink5, *([extra] if extra and host.hardware.os_id == "ubuntu" else [])]


def _filled(name: str, values: dict[str, str]) -> str:
    for word, value in values.items():
        name = name.replace(word, value)
    return name


def _packages_reason(host: Host, source: str) -> str:
    reason = "what computing needs, without a desktop"
    if source == CUDA and distribution(host.hardware) == "debian 12":
        # Secondary source (field notes 1.1): apt takes the newest dkms it is offered, or says what it lacks.
        reason += (
            "; whether Debian 12's dkms (3.0.10) is new enough is not verified: if not, apt stops before any change"
        )
    return reason


def _repositories(host: Host, cuda: bool) -> tuple[AptSource, ...]:
    return (cuda_source(host.settings, host.hardware),) if cuda else ()


def _pins(settings: Settings, hardware: Hardware, source: str) -> tuple[AptPin, ...]:
    if source == ARCHIVE:
        return _against_cuda(settings)
    if hardware.os_id == "ubuntu":
        why = "the driver comes from NVIDIA's repository, and from there only"
        return (AptPin(" ".join(drivers().driver_globs), "release o=Ubuntu", -1, why),)
    return ()  # Debian's are older, and the pinning package names the version


def _against_cuda(settings: Settings) -> tuple[AptPin, ...]:
    """NVIDIA's repository may bring tools, no driver. Its label and its host both tell it, mirrors keep either."""
    theirs = host_of(str(Settings.model_fields["mirror_cuda"].default))
    shared = (settings.mirror_apt_archive, settings.mirror_apt_security, settings.mirror_docker)
    # A host that serves other repositories too cannot be told by its name: what is wanted would be shut out.
    others = {host_of(url) for url in (*shared, settings.mirror_container_toolkit)}
    hosts = [host for host in dict.fromkeys((theirs, host_of(settings.mirror_cuda))) if host not in others]
    why = "the driver comes from elsewhere: never a second origin"
    globs = " ".join(drivers().driver_globs)
    return tuple(AptPin(globs, pin, -1, why) for pin in ("release l=NVIDIA CUDA", *(f"origin {h}" for h in hosts)))


# --- CUDA for those who compile ---


@dataclass(frozen=True)
class Toolkit:
    """What the CUDA toolkit adds to a plan."""

    packages: tuple[str, ...] = ()
    repositories: tuple[AptSource, ...] = ()
    pins: tuple[AptPin, ...] = ()


def _cuda_toolkit(host: Host, newest_cuda: str) -> Toolkit:
    settings, notes = host.settings, host.notes
    if settings.cuda_toolkit == "none":
        notes.decide("driver", "cuda_toolkit", "none", "the engine's wheels bring what they need")
        return Toolkit()
    version = settings.cuda_toolkit_version
    notes.decide("driver", "cuda_toolkit", f"{settings.cuda_toolkit} {version}", notes.given("cuda_toolkit"))
    _check_cuda(host, version, newest_cuda)
    if settings.cuda_toolkit == "venv" or not known_distribution(host.hardware):
        return Toolkit()
    name = f"cuda-toolkit-{version.replace('.', '-')}"  # never `cuda`, which brings a driver (field notes 3)
    pin = AptPin(name, f"version {version}.*", 1001, "a toolkit newer than the driver compiles what it cannot run")
    return Toolkit((name,), (cuda_source(settings, host.hardware),), (pin,))


def _check_cuda(host: Host, version: str, newest_cuda: str) -> None:
    if newest_cuda and _number(version) > _number(newest_cuda):
        able = [row.name for row in drivers().branches.values() if _number(row.cuda) >= _number(version)]
        branch = f", or driver_branch to {able[0]}" if able else ""
        host.notes.refuse(
            "cuda_toolkit_version",
            f"is {version}, but the driver runs CUDA {newest_cuda} at most",
            f"Set cuda_toolkit_version to {newest_cuda}{branch}",
        )
    young = [c for c in host.cards if c.generation.least_cuda and _number(c.generation.least_cuda) > _number(version)]
    if young:
        least = max((c.generation.least_cuda for c in young), key=_number)
        host.notes.refuse(
            "cuda_toolkit_version",
            f"is {version}, whose compiler does not know {_titles(young)}",
            f"Set cuda_toolkit_version to {least} or newer",
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


# --- of this moment ---


def _reboot_expected(host: Host, source: str, branch: str, modules: str) -> bool:
    expected, reason = _reboot(host, source, branch, modules)
    return host.notes.decide("driver", "reboot_expected", expected, reason)


def _reboot(host: Host, source: str, branch: str, modules: str) -> tuple[bool, str]:
    hardware, found = host.hardware, host.hardware.driver
    if free := [gpu.driver for gpu in hardware.nvidia_gpus if gpu.driver in FREE_DRIVERS]:
        return True, f"{free[0]} holds the GPU and lets go of it only when the host starts without it"
    version = drivers().branches[branch].version
    # Ubuntu's archive may have moved on within the branch: then module and libraries must agree, not the plan.
    target = version if source == CUDA else found.user_space_version or version
    if found.loaded_version and (found.loaded_version != target or _branch_of_version(target) != branch):
        return True, f"module {found.loaded_version} is loaded, {version} is planned: unloaded if nothing uses it"
    if found.loaded_modules and found.loaded_modules != modules:
        return True, f"{found.loaded_modules} modules are loaded, {modules} ones are planned"
    has_module = any(k.version == hardware.kernel and k.module_version for k in hardware.kernels)
    if not has_module and newest(hardware) != hardware.kernel:
        return True, f"{hardware.kernel} runs, but modules come for the newest kernel, {newest(hardware)}"
    return False, "the module can be loaded as the host runs"
