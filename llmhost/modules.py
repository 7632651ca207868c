"""What a host's NVIDIA kernel modules need so that the installed driver runs. Pure; infra/nvidia.py looks and acts.

No NVIDIA package writes /var/run/reboot-required: whether to load, reload or reboot is found by comparing what is
loaded, what lies on disk and what user space has (field notes, nvidia.md, 0.4 and 2.5).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from llmhost.plan.model import DriverPlan

Action = Literal["nothing", "initramfs", "load", "reload", "reboot", "stop"]

# Services that llmhost may stop to free the modules: each is started again, by the step that runs it.
OWN_HOLDERS = frozenset({"vllm.service", "nvidia-persistenced.service", "nvidia-fabricmanager.service"})
# Where a reboot is written down before it is done; it goes when the modules are right.
REBOOT_RECORD = "/var/lib/llmhost/reboot.json"


@dataclass(frozen=True)
class Module:
    """An nvidia kernel module: in the kernel, or on disk for a kernel. All "" where there is none."""

    version: str = ""  # "580.178.04"
    modules: str = ""  # "open" | "closed"


@dataclass(frozen=True)
class ModuleState:
    """A host's kernel modules at one moment."""

    boot_id: str
    kernel: str  # running: "6.8.0-149-generic"
    newest_kernel: str  # the newest installed, which the next boot takes
    loaded: Module
    uvm: bool  # nvidia_uvm is loaded, without which cuInit fails
    disk: Module  # for the running kernel
    newest: Module  # for the newest installed kernel
    user_space: str  # version of nvidia-smi's and libcuda's packages, "" where unknown
    references: int  # uses of the loaded modules, beside those by each other
    holders: tuple[str, ...]  # services, processes and other modules that have a device or a module of the driver open
    bound: tuple[str, ...]  # other kernel drivers that hold a GPU: "nouveau"
    initramfs_stale: bool  # that of the running or the newest kernel was made before our blacklist was written
    lacking: tuple[str, ...] = ()  # those of `extra_modules` that are not loaded
    rebooted: Reboot | None = None  # the reboot that llmhost did and that has not helped yet


@dataclass(frozen=True)
class Reboot:
    """A reboot that llmhost did, as it lies on the host until the modules are right."""

    reason: str
    boot_id: str  # of the boot that it ended


@dataclass(frozen=True)
class Due:
    """What to do next, and why, in words for the operator."""

    action: Action
    reason: str
    obstacle: str = ""  # why nothing less will do, where that changes from one look to the next

    @property
    def words(self) -> str:
        """All of it."""
        return f"{self.reason}, and {self.obstacle}" if self.obstacle else self.reason


def extra_modules(driver: DriverPlan) -> tuple[str, ...]:
    """Modules that the planned driver needs beside its own: NVLink 5's subnet manager talks by way of ib_umad.

    Without it the fabric never comes up: CUDA error 802 (gpu-operator #2781; field notes, nvidia.md, 2.7).
    """
    return ("ib_umad",) if driver.fabric_manager and "nvlsm" in driver.packages else ()


def due(state: ModuleState, driver: DriverPlan, tried: Collection[Action] = ()) -> Due:
    """The next step towards the planned driver in the kernel; `stop` where none is left.

    + tried: what this run has done already: nothing is done twice, and what did not help is followed by the next
    """
    if driver.source == "installed":
        return _kept(state, tried)
    wanted = Module(state.user_space or state.newest.version, driver.modules)
    if unbootable := _unbootable(state, wanted):
        return Due("stop", unbootable)
    found = _next(state, wanted, tried)
    if found.action == "reload" and "reload" in tried:
        found = Due("reboot", found.reason, f"could not be unloaded: {_users(state)}")
    if found.action == "reboot" and (useless := _useless(state, found)):
        return Due("stop", useless)
    if found.action in tried:
        return Due("stop", f"after {_done(tried)} {found.words}")
    return found


def stranding(state: ModuleState, driver: DriverPlan, upgrade: bool = False) -> Due | None:
    """The reboot that a change of packages would call for, where somebody holds the loaded module; None where none.

    Once the packages are another version's, what starts from then on does not talk to the old module.

    + upgrade: any loaded driver is about to change: what apt has newer is known only once its lists are fetched
    """
    loaded, user_space = state.loaded.version, state.user_space
    exact = driver.source == "cuda-repository"  # Ubuntu's archive has its own say within a branch
    stays = loaded == driver.version if exact else loaded.partition(".")[0] == driver.branch
    if driver.source == "installed" or not loaded or (stays and not upgrade) or user_space != loaded:
        return None
    if not set(state.holders) - OWN_HOLDERS:
        return None
    planned = "an upgrade may replace it" if stays else f"planned is {driver.version}"
    return Due("reboot", f"{_words(state.loaded)} is loaded, {planned}", f"{_users(state)} uses it")


def _useless(state: ModuleState, due: Due) -> str:
    """Why a reboot that is due would change nothing, "" where it may help: a host is not rebooted at every deploy."""
    last = state.rebooted
    if last is None or last.boot_id == state.boot_id or last.reason != due.reason:
        return ""
    if state.disk != state.newest:
        why = (
            f"it came up with {state.kernel} again. Is its boot loader held to that kernel? "
            "(grep GRUB_DEFAULT /etc/default/grub; grub-editenv list)"
        )
    elif state.bound:
        why = (
            f"{state.bound[0]} took the GPU again. What loads it? (cat /proc/cmdline; "
            f"lsinitramfs /boot/initrd.img-{state.kernel} | grep {state.bound[0]}; "
            f"grep -rs {state.bound[0]} /etc/modules /etc/modules-load.d)"
        )
    else:
        why = (
            f"{_words(state.loaded)} was loaded again. Is it in the initial file system? "
            f"(lsinitramfs /boot/initrd.img-{state.kernel} | grep nvidia; update-initramfs -u -k all makes it again)"
        )
    return (
        f"{due.reason}. llmhost rebooted the host for that, and {why} Mend that and reboot it yourself "
        f"(systemctl reboot), or remove {REBOOT_RECORD} to have it rebooted once more"
    )


def _kept(state: ModuleState, tried: Collection[Action]) -> Due:
    """Somebody else's driver (DGX OS, WSL, a container's): loaded where it can be, never replaced or rebooted into."""
    if state.loaded.version and state.uvm and not state.lacking:
        return Due("nothing", f"{_words(state.loaded)} is loaded")
    if not state.disk.version:
        return Due("nothing", "the driver's modules are not this system's to load")
    missing = _missing(state) if state.loaded.version else f"{_words(state.disk)} is not loaded"
    return Due("stop", f"after modprobe {missing}") if "load" in tried else Due("load", missing)


def _unbootable(state: ModuleState, wanted: Module) -> str:
    """Why the next boot would come up without the driver: it must not be found out then."""
    kernel = state.newest_kernel
    if not state.newest.version:
        return (
            f"there is no nvidia module for {kernel}, the newest installed kernel: its next boot would have no GPU. "
            f"Install the modules of that kernel (its headers, where DKMS builds them), or remove that kernel"
        )
    if state.newest.version != wanted.version:
        return (
            f"the packages do not fit together: user space is {wanted.version}, the module for {kernel} is "
            f"{state.newest.version}. Finish the upgrade: apt-get -f install, then deploy again"
        )
    if state.newest.modules != wanted.modules:
        return (
            f"the module for {kernel} is the {state.newest.modules} flavour, planned is {wanted.modules}: "
            "set driver_modules, or remove the packages of the other flavour"
        )
    return ""


def _next(state: ModuleState, wanted: Module, tried: Collection[Action]) -> Due:
    # One that stays old matters only where it lets another driver take the GPU.
    if state.initramfs_stale and ("initramfs" not in tried or state.bound):
        return Due("initramfs", "the initial file system was made before nouveau was blacklisted")
    if state.loaded == wanted:
        if state.uvm and not state.lacking:
            return Due("nothing", f"{_words(wanted)} is loaded")
        return Due("load", _missing(state))
    if state.disk != wanted:
        return Due("reboot", f"{_words(wanted)} is there for {state.newest_kernel}, running is {state.kernel}")
    if state.bound:
        return Due("reboot", f"{' and '.join(state.bound)} holds the GPU")
    if not state.loaded.version:
        return Due("load", f"{_words(wanted)} is not loaded")
    differs = f"{_words(state.loaded)} is loaded, installed is {_words(wanted)}"
    if set(state.holders) - OWN_HOLDERS:
        return Due("reboot", differs, f"{_users(state)} uses it")
    return Due("reload", differs)


def _missing(state: ModuleState) -> str:
    names = [*([] if state.uvm else ["nvidia_uvm"]), *state.lacking]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not loaded"


def _words(module: Module) -> str:
    return f"the driver {module.version} ({module.modules} modules)"


def _users(state: ModuleState) -> str:
    others = sorted(set(state.holders) - OWN_HOLDERS)
    return ", ".join(others) or (f"the kernel ({state.references} uses)" if state.references else "modprobe -r refuses")


def _done(tried: Collection[Action]) -> str:
    words = {"initramfs": "making the initial file system again", "load": "modprobe", "reload": "a reload"}
    return " and ".join(words.get(action, "a reboot") for action in tried)


# --- packages that stand in the driver's way --------------------------------------------------------------------

# dpkg's patterns for packages of any driver, and what is none of it.
DRIVER_GLOBS = ("*nvidia*", "cuda-drivers*", "libcuda1")
_PINNING = "nvidia-driver-pinning-"
_MODULES = r"linux-(modules|objects|signatures)-nvidia-(?P<branch>\d{3})(-server)?(-open)?-.+"
# Packages of one branch: its number stands right after the words of the family, and nothing else is a driver's.
# linux-modules-nvidia-fs-6.8.0-149-generic is a file system's, linux-image-5.15.0-203-nvidia a kernel.
_OF_A_BRANCH = re.compile(
    rf"{_MODULES}|((lib|xserver-xorg-video-)?nvidia|cuda-drivers)(-[a-z][a-z0-9]*)*?-(?P<number>\d{{3}})(-.+)?"
)
# Packages of which there is one for each flavour of the modules, in Ubuntu's archive and in NVIDIA's repository.
_OF_A_FLAVOUR = re.compile(
    rf"{_MODULES}"
    r"|nvidia-(dkms|kernel-source|headless(-no-dkms)?)(-\d{3})?(-server)?(-open)?"
    r"|nvidia-driver-(\d{3}(-server)?(-open)?|open)|nvidia-open(-\d{3})?|nvidia-kernel(-open)?-dkms|cuda-drivers(-\d{3})?"
)
_BUILT_HERE = re.compile(r"nvidia-(dkms|kernel-source|headless(?!-no-dkms)|kernel(-open)?-dkms)\b.*")
_PREBUILT = re.compile(_MODULES)


# Packages that in NVIDIA's repository always have the driver's own version.
_OF_THE_VERSION = re.compile(
    r"libcuda1|libnvidia-compute(-\d{3})?|nvidia-dkms(-\d{3})?(-open)?|nvidia-kernel(-open)?-dkms"
)


def other_versions(installed: Mapping[str, str], driver: DriverPlan) -> list[str]:
    """Those of the installed packages that are the driver's, but not yet of the planned version.

    A run that lost its power between the package that pins and the rest leaves nothing lacking. Ubuntu's archive has
    one version at a time, whatever it is: there the plan pins none.
    """
    if driver.source != "cuda-repository":
        return []
    versions = {name: full for name, full in installed.items() if _OF_THE_VERSION.fullmatch(name)}
    return sorted(name for name, full in versions.items() if _upstream(full) != driver.version)


def _upstream(version: str) -> str:
    return version.rpartition(":")[2].rpartition("-")[0] or version


def gives_way(name: str, driver: DriverPlan) -> bool:
    """Whether an installed package must go in the transaction that brings the planned driver.

    Packages of another branch or of the other flavour, modules built here beside prebuilt ones (or the other way), and
    pins to another version. What packages themselves declare to be in conflict, apt resolves. Never a kernel, nor what
    is only named like the driver.
    """
    if name in {package.partition("=")[0] for package in driver.packages}:
        return False
    if name.startswith(_PINNING):
        return True
    branch = _OF_A_BRANCH.fullmatch(name)
    if branch and driver.branch not in branch.group("branch", "number"):
        return True
    if not _OF_A_FLAVOUR.fullmatch(name):
        return False
    flavour = "open" if "-open" in name else "closed"
    return flavour != driver.modules or bool((_BUILT_HERE if driver.prebuilt else _PREBUILT).fullmatch(name))
