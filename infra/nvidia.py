"""The NVIDIA kernel modules: loaded as installed, by the least that will do, at most one reboot."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from pyinfra import host, logger
from pyinfra.api import FunctionCommand, QuoteString, StringCommand, operation

from infra.facts import JsonFact, failed_look
from infra.halt import halt
from infra.reboot import is_this_machine, rebooted
from infra.systemd import UnitStates
from llmhost.modules import Action, Due, Module, ModuleState, due
from llmhost.plan.model import DriverPlan

PERSISTENCE = "nvidia-persistenced.service"
BLACKLIST = "/etc/modprobe.d/llmhost-nouveau.conf"
# In the order in which they come out, and the modules that use each of them.
MODULES: dict[str, tuple[str, ...]] = {
    "nvidia_uvm": (),
    "nvidia_drm": (),
    "nvidia_modeset": ("nvidia_drm",),
    "nvidia_peermem": (),
    "nvidia": ("nvidia_uvm", "nvidia_modeset", "nvidia_peermem"),
}

Commands = Generator[StringCommand | FunctionCommand]


class NvidiaModules(JsonFact):
    """What llmhost.modules.ModuleState holds, as JSON; one round trip."""

    program = r"""
import glob, json, os, re, subprocess, sys
blacklist, used_by = json.loads(sys.argv[1])
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
def uses(name):
    return int(text("/sys/module/%s/refcnt" % name) or 0) - sum(loaded(other) for other in used_by[name])
def holder(pid):
    unit = re.findall(r"([^/]+\.(?:service|scope))(?:/|$)", text("/proc/%s/cgroup" % pid))
    return unit[-1] if unit else text("/proc/%s/comm" % pid)
def opened(pid):
    for fd in glob.glob("/proc/%s/fd/*" % pid):
        try:
            if os.readlink(fd).startswith("/dev/nvidia"): return True
        except OSError: pass
    return False
def bound():
    for device in glob.glob("/sys/bus/pci/devices/*"):
        driver = os.path.basename(os.path.realpath(device + "/driver"))
        is_gpu = text(device + "/vendor") == "0x10de" and text(device + "/class")[:6] in ("0x0300", "0x0302")
        if is_gpu and driver not in ("driver", "nvidia"): yield driver
def stale():
    images = glob.glob("/boot/initrd.img-*")
    return os.path.exists(blacklist) and any(os.stat(image).st_mtime < os.stat(blacklist).st_mtime for image in images)
running = said("uname", "-r")
newest = kernels(running)[-1]
print(json.dumps({"boot_id": text("/proc/sys/kernel/random/boot_id"), "kernel": running, "newest_kernel": newest,
    "loaded": module(text("/sys/module/nvidia/version"), "Open Kernel Module" in text("/proc/driver/nvidia/version")),
    "uvm": loaded("nvidia_uvm"), "disk": on_disk(running), "newest": on_disk(newest),
    "user_space": user_space(), "references": sum(max(0, uses(name)) for name in used_by),
    "bound": sorted(set(bound())), "initramfs_stale": stale(),
    "holders": sorted({holder(pid) for pid in listed("/proc") if pid.isdigit() and opened(pid)})}))
"""


def brings_persistence(driver: DriverPlan) -> bool:
    """Whether the driver has its persistence daemon: those that are installed here do, others (WSL's) may not.

    Asked before the run, which is early enough: the run does not change an installed driver.
    """
    if driver.source != "installed":
        return True
    seen = host.get_fact(UnitStates, argument=json.dumps({PERSISTENCE: []})) or {}
    return bool(seen.get(PERSISTENCE, {}).get("enabled"))


@operation()
def module_running(driver: DriverPlan, drain: tuple[str, ...]) -> Commands:
    """The planned driver in the kernel: loaded, or unloaded and loaded, or by one reboot; looked at after each.

    + drain: services that use the GPU and are started again by their own steps
    """
    tried: list[Action] = []
    while (seen := _look()) is not None:
        step = due(seen, driver, tried)
        if step.action == "nothing":
            if not tried:
                host.noop(step.reason)
            return
        _announce(step, tried)
        tried.append(step.action)
        yield from _act(step, seen, driver, drain)
    if not failed_look(seen):  # before the run: the host has no Python yet
        yield _load()


def _look() -> ModuleState | None:
    seen: dict[str, Any] | None = host.get_fact(NvidiaModules, argument=json.dumps([BLACKLIST, MODULES]))
    if seen is None:
        return None
    modules = {name: Module(**seen[name]) for name in ("loaded", "disk", "newest")}
    several = {name: tuple(seen[name]) for name in ("holders", "bound")}
    return ModuleState(**{**seen, **modules, **several})


def _act(step: Due, seen: ModuleState, driver: DriverPlan, drain: tuple[str, ...]) -> Commands:
    if step.action == "stop":
        yield halt(f"{step.reason}. See docs/driver.md, when a host stops")
    elif step.action == "initramfs":
        yield StringCommand("update-initramfs", "-u", "-k", "all")
    elif step.action == "load":
        yield _load()
    elif step.action == "reload":
        yield from _reload(drain)
    elif refusal := _refusal(step, seen, driver):
        yield halt(refusal)
    else:
        yield from rebooted(seen.boot_id)


# NoNewPrivileges keeps the engine from nvidia-modprobe, which would load nvidia_uvm and make its node on demand.
_LOAD = r"""
said=$(modprobe nvidia 2>&1 && modprobe nvidia_uvm 2>&1) || {
    echo "modprobe: $said" >&2
    case $said in *"rejected by service"* | *"Required key not available"*)
        echo "Secure Boot refuses the module: it is signed by no key that this machine trusts (docs/driver.md)" >&2 ;;
    esac
    journalctl --dmesg --grep=NVRM --lines=10 --output=cat --no-pager >&2
    exit 1
}
if command -v nvidia-modprobe >/dev/null; then nvidia-modprobe -u -c=0; fi
nvidia-smi -L >/dev/null || { nvidia-smi >&2; exit 1; }
"""


def _load() -> StringCommand:
    return StringCommand("sh", "-c", QuoteString(_LOAD))


# A module that is still in use stays: the next look sees it, and a reboot follows.
_UNLOAD = r"""
for module in {modules}; do
    [ -d "/sys/module/$module" ] || continue
    modprobe -r "$module" || exit 0
done
"""


def _reload(drain: tuple[str, ...]) -> Commands:
    services = (*drain, PERSISTENCE, "nvidia-fabricmanager.service")
    # A service that is not there needs no stopping.
    yield StringCommand("systemctl", "stop", *map(QuoteString, services), "2>/dev/null", "||", "true")
    seen = _look()
    if seen is None or seen.references:
        return  # the next step is a reboot
    unload = QuoteString(_UNLOAD.format(modules=" ".join(MODULES)))
    yield StringCommand("sh", "-c", unload)
    seen = _look()
    if seen and not seen.loaded.version:
        yield _load()


def _refusal(step: Due, seen: ModuleState, driver: DriverPlan) -> str:
    """Why a reboot that is due may not be done from here, and what to do instead; "" where it may."""
    if is_this_machine(host, seen.boot_id):
        return (
            f"A reboot is due: {step.reason}. pyinfra runs on this machine, so it is not rebooted from here. "
            "Reboot it (systemctl reboot), then deploy again: it goes on from there"
        )
    if driver.reboot_allowed == "never":
        return (
            f"A reboot is due: {step.reason}. reboot_allowed is never. "
            "Reboot the host when it suits (systemctl reboot), then deploy again; or set reboot_allowed to auto"
        )
    return ""


def _announce(step: Due, tried: list[Action]) -> None:
    words = {"initramfs": "update the initial file system", "load": "load the modules", "reload": "reload the modules"}
    after = f" (after {', '.join(tried)})" if tried else ""
    logger.info(f"{host.print_prefix}{words.get(step.action, step.action)}: {step.reason}{after}")
