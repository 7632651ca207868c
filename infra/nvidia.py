"""The NVIDIA kernel modules: loaded as installed, by the least that will do, at most one reboot."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import Any

from pyinfra import host, logger
from pyinfra.api import FunctionCommand, QuoteString, StringCommand, operation

from infra.facts import JsonFact, failed_look
from infra.halt import halt
from infra.reboot import is_this_machine, rebooted
from infra.systemd import UnitStates
from llmhost.modules import (
    OWN_HOLDERS,
    REBOOT_RECORD,
    Action,
    Due,
    Module,
    ModuleState,
    Reboot,
    due,
    extra_modules,
    stranding,
)
from llmhost.plan.model import DriverPlan

PERSISTENCE = "nvidia-persistenced.service"
FABRIC_MANAGER = "nvidia-fabricmanager.service"
BLACKLIST = "/etc/modprobe.d/llmhost-nouveau.conf"
# In the order in which they come out.
MODULES = ("nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia_peermem", "nvidia")

Commands = Generator[StringCommand | FunctionCommand]


class NvidiaModules(JsonFact):
    """What llmhost.modules.ModuleState holds, as JSON; one round trip."""

    program = r"""
import glob, json, os, re, subprocess, sys, time
blacklist, names, extra, record, own = json.loads(sys.argv[1])
os.environ["PATH"] += ":/usr/sbin:/sbin"
def text(path):
    try: return open(path, errors="replace").read().strip()
    except OSError: return ""
def said(*command):
    try: return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError: return ""
def listed(path):
    try: return os.listdir(path)
    except OSError: return []
def by_number(name):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]
def module(version, is_open):
    return {"version": version, "modules": ("open" if is_open else "closed") if version else ""}
def on_disk(kernel):
    about = ("modinfo", "-k", kernel, "-F")
    return module(said(*about, "version", "nvidia"), "GPL" in said(*about, "license", "nvidia"))
def kernels(running):
    images = ("/boot/vmlinuz-%s", "/lib/modules/%s/vmlinuz")
    found = [name for name in listed("/lib/modules") if any(os.path.exists(image % name) for image in images)]
    return sorted({*found, running}, key=by_number)
def user_space():
    shown = "${Package} ${Version} ${db:Status-Abbrev}\\n"
    packages = said("dpkg-query", "--show", "--showformat", shown, "*nvidia*", "libcuda1").splitlines()
    library = re.compile(r"(libnvidia-compute|nvidia-utils)(-\d\S*)? |libcuda1 ")
    found = [line.split() for line in packages if library.match(line)]
    unpacked = [words[1] for words in found if len(words) == 3 and words[2][1] not in "ncH"]
    return max((full.rpartition(":")[2].partition("-")[0] for full in unpacked), key=by_number, default="")
def loaded(name): return os.path.exists("/sys/module/" + name)
# A module's users are counted among its references (lsmod: nvidia 3 nvidia_uvm,nvidia_drm,nvidia_modeset).
def users(name): return listed("/sys/module/%s/holders" % name)
def uses(name): return int(text("/sys/module/%s/refcnt" % name) or 0) - len(users(name))
def strangers(): return ["the module " + other for name in names for other in users(name) if other not in names]
def holder(pid):
    unit = re.findall(r"([^/]+\.(?:service|scope))(?:/|$)", text("/proc/%s/cgroup" % pid))
    return unit[-1] if unit else text("/proc/%s/comm" % pid)
def opened(pid):
    for fd in glob.glob("/proc/%s/fd/*" % pid):
        try:
            if os.readlink(fd).startswith("/dev/nvidia"): return True
        except OSError: pass
    return False
def holders():
    processes = ((pid, holder(pid)) for pid in listed("/proc") if pid.isdigit() and opened(pid))
    return {*processes, *(("", other) for other in strangers())}
# Whoever asks nvidia-smi for a figure is gone in a second; only those that stay count.
def staying():
    found = holders()
    for again in range(2):
        if {name for pid, name in found} <= set(own): break
        time.sleep(2)
        found &= holders()
    return sorted({name for pid, name in found})
def bound():
    for device in glob.glob("/sys/bus/pci/devices/*"):
        driver = os.path.basename(os.path.realpath(device + "/driver"))
        is_gpu = text(device + "/vendor") == "0x10de" and text(device + "/class")[:6] in ("0x0300", "0x0302")
        if is_gpu and driver not in ("driver", "nvidia"): yield driver
def written(path):
    try: return os.stat(path).st_mtime
    except OSError: return None
def stale(kernels):
    made = [written("/boot/initrd.img-" + kernel) for kernel in kernels]
    since = written(blacklist)
    return since is not None and any(time < since for time in made if time is not None)
def rebooted():
    try:
        told = json.loads(text(record))
        return {"reason": told["reason"], "boot_id": told["boot_id"]}
    except (ValueError, KeyError, TypeError): return None
running = said("uname", "-r")
installed = kernels(running)
newest = installed[-1]
held = staying() # before the references are counted
print(json.dumps({"boot_id": text("/proc/sys/kernel/random/boot_id"), "kernel": running, "newest_kernel": newest,
    "loaded": module(text("/sys/module/nvidia/version"), "Open Kernel Module" in text("/proc/driver/nvidia/version")),
    "uvm": loaded("nvidia_uvm"), "disk": on_disk(running), "newest": on_disk(newest),
    "user_space": user_space(), "references": sum(max(0, uses(name)) for name in names),
    "bound": sorted(set(bound())), "initramfs_stale": stale([running, newest]), "rebooted": rebooted(),
    "lacking": [name for name in extra if not loaded(name)],
    "holders": held}))
"""


def brings_persistence(driver: DriverPlan) -> bool:
    """Whether the driver has its persistence daemon: those that are installed here do, others (WSL's) may not.

    Asked before the run, which is early enough: the run does not change an installed driver.
    """
    if driver.source != "installed":
        return True
    seen = host.get_fact(UnitStates, argument=json.dumps({PERSISTENCE: []})) or {}
    return bool(seen.get(PERSISTENCE, {}).get("enabled"))


_STALE = (
    "the initial file system is still older than the blacklist of nouveau, although update-initramfs was run. No other "
    "driver holds the GPU now; one may at the next boot"
)


@operation()
def module_running(driver: DriverPlan, drain: tuple[str, ...]) -> Commands:
    """The planned driver in the kernel: loaded, or unloaded and loaded, or by one reboot; looked at after each.

    + drain: services that use the GPU and are started again by their own steps
    """
    tried: list[Action] = []
    while (seen := _look(driver)) is not None:
        step = due(seen, driver, tried)
        if step.action == "nothing":
            if "initramfs" in tried and seen.initramfs_stale:
                logger.warning(f"{host.print_prefix}{_STALE}")
            if seen.rebooted:
                yield StringCommand("rm", "-f", REBOOT_RECORD)
            elif not tried:
                host.noop(step.reason)
            return
        if step.action != "stop":  # which says it itself
            _announce(step, tried)
        tried.append(step.action)
        yield from _act(step, seen, driver, drain, tried)
    if not failed_look(seen):  # before the run: the host has no Python yet
        yield _load(driver)


@operation()
def replaceable(driver: DriverPlan, upgrade: bool = False) -> Commands:
    """Stop before the packages change, where the loaded module could not follow them and no reboot may.

    + upgrade: newer packages of the same branch will be installed, if there are any
    """
    seen = _look(driver)
    step = stranding(seen, driver, upgrade) if seen else None
    if seen and step and (refusal := _refusal(step, seen, driver)):
        yield halt(f"{refusal}. No package was changed")
        return
    host.noop("the packages may change" if step else "the loaded module stays, or nobody else uses it")


def _look(driver: DriverPlan) -> ModuleState | None:
    asked = json.dumps([BLACKLIST, MODULES, extra_modules(driver), REBOOT_RECORD, sorted(OWN_HOLDERS)])
    seen: dict[str, Any] | None = host.get_fact(NvidiaModules, argument=asked)
    if seen is None:
        return None
    modules = {name: Module(**seen[name]) for name in ("loaded", "disk", "newest")}
    several = {name: tuple(seen[name]) for name in ("holders", "bound", "lacking")}
    rebooted = Reboot(**seen["rebooted"]) if seen["rebooted"] else None
    return ModuleState(**{**seen, **modules, **several, "rebooted": rebooted})


def _act(step: Due, seen: ModuleState, driver: DriverPlan, drain: tuple[str, ...], tried: list[Action]) -> Commands:
    if step.action == "stop":
        yield halt(f"{step.words}. See docs/driver.md, when a host stops")
    elif step.action == "initramfs":
        yield StringCommand("update-initramfs", "-u", "-k", "all")
    elif step.action == "load":
        yield _load(driver)
    elif step.action == "reload":
        yield from _reload(driver, drain, tried)
    elif refusal := _refusal(step, seen, driver):
        yield halt(refusal)
    else:
        yield from rebooted(REBOOT_RECORD, step.reason, seen.boot_id)


# NoNewPrivileges keeps the engine from nvidia-modprobe, which would load nvidia_uvm and make its node on demand.
_LOAD = r"""
for module in {modules}; do
    said=$(timeout 300 modprobe "$module" 2>&1) && continue
    echo "modprobe $module: ${{said:-no end within 300 s}}" >&2
    case $said in *"rejected by service"* | *"Required key not available"*)
        echo "Secure Boot refuses the module: it is signed by no key that this machine trusts (docs/driver.md)" >&2 ;;
    esac
    journalctl --dmesg --grep=NVRM --lines=10 --output=cat --no-pager >&2
    exit 1
done
if command -v nvidia-modprobe >/dev/null; then timeout 60 nvidia-modprobe -u -c=0; fi
# A GPU that fell off the bus keeps nvidia-smi for ever; eight of them initialise in a minute.
said=$(timeout 300 nvidia-smi -L 2>&1) || {{ echo "nvidia-smi -L: ${{said:-no answer within 300 s}}" >&2; exit 1; }}
"""


def _load(driver: DriverPlan) -> StringCommand:
    modules = " ".join(("nvidia", "nvidia_uvm", *extra_modules(driver)))
    return StringCommand("sh", "-c", QuoteString(_LOAD.format(modules=modules)))


# A module that is still in use stays: the next look sees it, and a reboot follows.
_UNLOAD = r"""
for module in {modules}; do
    [ -d "/sys/module/$module" ] || continue
    timeout 120 modprobe -r "$module" || exit 0
done
"""


def _reload(driver: DriverPlan, drain: tuple[str, ...], tried: list[Action]) -> Commands:
    """Out and in again; where they stay, and no reboot may follow, the services that were stopped are started again."""
    services = (*drain, PERSISTENCE, FABRIC_MANAGER)
    stopped = _running(services)
    # A service that is not there needs no stopping.
    yield StringCommand("systemctl", "stop", *map(QuoteString, services), "2>/dev/null", "||", "true")
    seen = _look(driver)
    if seen and not seen.references:
        yield StringCommand("sh", "-c", QuoteString(_UNLOAD.format(modules=" ".join(MODULES))))
        seen = _look(driver)
    if seen is None:
        return
    if not seen.loaded.version:
        yield _load(driver)
        return
    step = due(seen, driver, tried)
    why = step.words if step.action == "stop" else _refusal(step, seen, driver)
    if why:
        yield from _started_again(stopped, why)


def _running(units: Sequence[str]) -> list[str]:
    states = host.get_fact(UnitStates, argument=json.dumps(dict.fromkeys(units, ()))) or {}
    return [unit for unit in units if states.get(unit, {}).get("active") in ("active", "activating", "reloading")]


def _started_again(units: Sequence[str], why: str) -> Commands:
    """The host is left as it was found as far as it can be, and then the run on it ends."""
    if not units:
        yield halt(why)
        return
    _tell(f"start {', '.join(units)} again")
    yield StringCommand("systemctl", "start", *map(QuoteString, units), "||", "true")
    running = _running(units)
    down = [unit for unit in units if unit not in running]
    told = f" Running again: {', '.join(running)}." if running else ""
    # Programs of the new version do not talk to the module of the old one.
    told += f" Not starting until then: {', '.join(down)} (journalctl --unit={down[0]})." if down else ""
    yield halt(f"{why}.{told}")


def _refusal(step: Due, seen: ModuleState, driver: DriverPlan) -> str:
    """Why a reboot that is due may not be done from here, and what to do instead; "" where it may."""
    if is_this_machine(host, seen.boot_id):
        return (
            f"A reboot is due: {step.words}. pyinfra runs on this machine, so it is not rebooted from here. "
            "Reboot it (systemctl reboot), then deploy again: it goes on from there"
        )
    if driver.reboot_allowed == "never":
        return (
            f"A reboot is due: {step.words}. reboot_allowed is never. "
            "Reboot the host when it suits (systemctl reboot), then deploy again; or set reboot_allowed to auto"
        )
    return ""


def _announce(step: Due, tried: list[Action]) -> None:
    words = {"initramfs": "update the initial file system", "load": "load the modules", "reload": "reload the modules"}
    after = f" (after {', '.join(tried)})" if tried else ""
    _tell(f"{words.get(step.action, step.action)}: {step.words}{after}")


def _tell(text: str) -> None:
    logger.info(f"{host.print_prefix}{text}")
