"""Which NVIDIA driver a host gets: from where, which branch and flavour, with which packages. Pure.

The rules are those of field notes nvidia.md, sections 0 to 3; what is data lies in llmhost/catalog. A decision never
tells the state of the moment, but for `reboot_expected`: the plan of a converged host is the plan of the bare one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llmhost.catalogue import Card, card, drivers, titles
from llmhost.hardware import Hardware
from llmhost.plan.cuda import plan_toolkit
from llmhost.plan.kernels import Kernels, kernels, newest
from llmhost.plan.model import AptSource, DriverPlan
from llmhost.plan.notes import Notes
from llmhost.plan.obstacles import check_cards, check_holds, check_origins, check_secure_boot, held
from llmhost.plan.repositories import (
    ARCHIVE,
    CUDA,
    against_cuda,
    cuda_directory,
    cuda_source,
    distribution,
    driver_pins,
    installed,
    known_distribution,
    missing,
)
from llmhost.settings import Settings

INSTALLED = "installed"
# CUDA of the wheels the engine is locked to (field notes 0.6): it sets the oldest branch.
WHEELS_CUDA = "13"
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
    check_cards(settings, hardware, accelerator, cards, notes)
    if len(notes.problems) > problems:
        return None
    source = _source(host)
    if source == CUDA:
        _check_repository(host)
    if not source or len(notes.problems) > problems:
        return None
    planned = _installed(host) if source == INSTALLED else _provisioned(host, source)
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
        contained = {"container"} if self.hardware.container else set()
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
        if hardware.driver.managed_source and settings.accelerator == "auto":
            notes.refuse(
                "gpu",
                "the GPU that was provisioned is gone: the PCI bus shows none, but llmhost installed its driver here",
                "Look at `lspci -d 10de:` and `dmesg`, and mend or reboot the host; if it is to go on without a GPU, "
                'set accelerator = "cpu"',
            )
            return False
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


def _check_repository(host: Host) -> None:
    hardware = host.hardware
    if known_distribution(hardware) and hardware.machine not in cuda_directory(hardware).architectures:
        host.notes.refuse(
            "driver_source",
            f"NVIDIA's repository for {hardware.os_name} has no packages for {hardware.machine}",
            "Use Ubuntu on this machine, whose archive has them; or install the driver by hand and set "
            'driver_source = "installed"',
        )


def _auto_source(host: Host) -> str:
    managed, notes = host.hardware.driver.managed_source, host.notes
    if not managed and (seen := _silent(host)):
        notes.refuse(
            "driver",
            f"the host has a driver that llmhost did not install, and nvidia-smi gives no answer: {seen}",
            "Mend it (`nvidia-smi` and `dmesg` say what is wrong, a reboot may do), then deploy again; or have llmhost "
            f'replace it: driver_source = "{ARCHIVE if host.hardware.os_id == "ubuntu" else CUDA}"',
        )
        return ""
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


def _silent(host: Host) -> str:
    """What there is of a driver that gives no answer, "" where one answers or there is none.

    It may be broken for a moment only: provisioning another over it is nothing to be done unasked.
    """
    found = host.hardware.driver
    if found.smi_version:
        return ""
    on_disk = [f"{k.module_version} lies on disk for {k.version}" for k in host.hardware.kernels if k.module_version]
    loaded = [f"module {found.loaded_version} is loaded"] if found.loaded_version else []
    libraries = [f"libraries {found.user_space_version} are installed"] if found.user_space_version else []
    return ", ".join([*loaded, *libraries, *on_disk])


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
    wrong = [c for c in host.cards if found.loaded_modules and found.loaded_modules not in c.flavours]
    return f"{found.loaded_modules} modules do not run {titles(wrong)}" if wrong else ""


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
    if fabric:
        _check_fabric_manager(host, version)
    known = drivers().branches.get(branch)
    newest_cuda = hardware.driver.cuda_version or (known.cuda if known else "")
    toolkit = plan_toolkit(settings, hardware, host.cards, newest_cuda, notes)
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
        pins=(*toolkit.pins, *(against_cuda(settings) if toolkit.repositories else ())),
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
    version = _version(source, branch, notes)
    booted = kernels(hardware, notes)
    prebuilt = _prebuilt(host, source, modules, booted)
    check_secure_boot(hardware, source, prebuilt, notes)
    check_origins(hardware, source, notes)
    check_holds(hardware, branch, booted, notes)
    fabric = _fabric_manager(host)
    toolkit = plan_toolkit(settings, hardware, host.cards, drivers().branches[branch].cuda, notes)
    names = (
        _archive_packages(host, booted, prebuilt, fabric)
        if source == ARCHIVE
        else _cuda_packages(host, branch, booted, fabric)
    )
    fill = {"<branch>": branch, "<version>": version, "<open>": "-open" if modules == "open" else ""}
    packages = _packages(host, source, booted, (*(_filled(name, fill) for name in names), *toolkit.packages))
    subnet_manager = fabric and any(found.nvlink5 for found in host.cards)
    return DriverPlan(
        branch=branch,
        version=version,
        modules=modules,
        source=source,
        packages=packages,
        fabric_manager=fabric,
        reboot_expected=_reboot_expected(host, source, branch, modules, packages, prebuilt),
        generation=_generation(host),
        gpus=len(host.cards),
        prebuilt=prebuilt,
        repositories=_repositories(host, source == CUDA or subnet_manager or bool(toolkit.repositories)),
        pins=(*driver_pins(settings, hardware, source), *toolkit.pins),
        blacklist_nouveau=source == CUDA,
        frozen=_frozen(),
        cuda_toolkit=settings.cuda_toolkit,
        reboot_allowed=notes.decide("driver", "reboot_allowed", settings.reboot_allowed, notes.given("reboot_allowed")),
    )


def _version(source: str, branch: str, notes: Notes) -> str:
    component = drivers().ubuntu_archive.components[branch]
    kept = f"what Ubuntu's archive ({component}) held on 2026-11-20; its updates stay in the branch"
    version = drivers().branches[branch].version
    return notes.decide("driver", "driver_version", version, "pinned" if source == CUDA else kept)


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
        _refuse_modules(notes, f"is {wish}, but {titles(wrong)} runs with {other} modules only", other)
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
        there = [row.name for row in drivers().branches.values() if distribution(host.hardware) not in row.unverified]
        message = f"is {wish}, which NVIDIA's repository for {host.hardware.os_name} was not seen to have"
        return _refuse_branch(notes, message, " or ".join(there))
    life = f"supported until {branch.end_of_life}" if branch.end_of_life[-4:].isdigit() else branch.end_of_life
    if needed and wish == needed.least_branch and not host.given_branch:
        return notes.decide("driver", "driver_branch", wish, f"{needed.title} needs it; end of life {life}")
    reason = f"{notes.given('driver_branch')}; {life}"
    newer = [name for name in drivers().branches if int(name) > int(wish)]
    if newer and any(found.generation.name == "unknown" for found in host.cards):
        reason += f"; an unknown card is a new one and may need {' or '.join(newer)}"
    return notes.decide("driver", "driver_branch", wish, reason)


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


# --- NVSwitch ---


def _fabric_manager(host: Host) -> bool:
    switches = host.hardware.nvswitches
    reason = f"{switches} NVSwitches" if switches else "no NVSwitch is visible: there is none, or its host manages it"
    return host.notes.decide("driver", "fabric_manager", switches > 0, reason)


def _check_fabric_manager(host: Host, version: str) -> None:
    """With a driver of other hands: its version and the fabric manager's must be equal, or neither starts."""
    there = {
        name: re.sub(r"^\d+:|-.*", "", found)
        for name, found in installed(host.hardware).items()
        if re.fullmatch(r"nvidia-fabricmanager(-\d+)?", name)
    }
    if version in there.values():
        return
    others = ", ".join(f"{name} {found}" for name, found in there.items())
    host.notes.refuse(
        "driver",
        f"the host has {host.hardware.nvswitches} NVSwitches and driver {version}, but not nvidia-fabricmanager "
        f"{version}" + (f" ({others} is installed)" if others else "") + ": without it CUDA answers 802",
        f"Install it from where the driver came: apt-get install nvidia-fabricmanager-{_branch_of_version(version)}="
        f"{version}-* (in NVIDIA's repository nvidia-fabricmanager={version}-*)",
    )


# --- packages and where they come from ---


def _archive_packages(host: Host, booted: Kernels, prebuilt: bool, fabric: bool) -> list[str]:
    archive = drivers().ubuntu_archive
    ready = [archive.prebuilt.replace("<flavour>", flavour) for flavour in booted.flavours]
    modules = [*ready, *booted.keep] if prebuilt else [*archive.dkms, *booted.build]
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


def _packages(host: Host, source: str, booted: Kernels, names: tuple[str, ...]) -> tuple[str, ...]:
    # A kernel on hold that has its modules stays as it is: packages of the plan are changed whatever is on hold.
    left = [name for name in held(host.hardware) if name in booted.metas]
    packages = tuple(name for name in dict.fromkeys(names) if name not in left)
    host.notes.decide("driver", "driver_packages", " ".join(packages), _packages_reason(host, source, left))
    return packages


def _packages_reason(host: Host, source: str, left: list[str]) -> str:
    reason = "what computing needs, without a desktop"
    if left:
        reason += f"; on hold, and left so: {', '.join(left)}"
    if source == CUDA and distribution(host.hardware) == "debian 12":
        # Secondary source (field notes 1.1): apt takes the newest dkms it is offered, or says what it lacks.
        reason += (
            "; whether Debian 12's dkms (3.0.10) is new enough is not verified: if not, apt stops before any change"
        )
    return reason


def _repositories(host: Host, cuda: bool) -> tuple[AptSource, ...]:
    return (cuda_source(host.settings, host.hardware),) if cuda else ()


# --- of this moment ---


def _reboot_expected(
    host: Host, source: str, branch: str, modules: str, packages: tuple[str, ...], prebuilt: bool
) -> bool:
    expected, reason = _reboot(host, source, branch, modules, prebuilt)
    if not expected and any(_KERNEL_PACKAGE.match(name) for name in missing(host.hardware, packages)):
        reason += ", unless apt brings a newer kernel"
    return host.notes.decide("driver", "reboot_expected", expected, reason)


_KERNEL_PACKAGE = re.compile("linux-(image|headers|modules)-")


def _reboot(host: Host, source: str, branch: str, modules: str, prebuilt: bool) -> tuple[bool, str]:
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
    last = newest(hardware)
    has_module = any(k.version == hardware.kernel and k.module_version for k in hardware.kernels)
    if not has_module and last != hardware.kernel:
        return True, f"{hardware.kernel} runs, but modules come for the newest kernel, {last}"
    if not prebuilt and last != hardware.kernel and f"linux-headers-{hardware.kernel}" not in installed(hardware):
        return True, f"{hardware.kernel} runs without its headers: modules are built for the newest kernel, {last}"
    return False, "the module can be loaded as the host runs"
