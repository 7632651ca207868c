"""What must be true of GPUs, their driver, and containers that use them: rows for hosts whose plan has those.

A card that does not report a value (consumer cards without ECC) neither fails nor passes silently: what is expected
says "or not reported by this card", and what was seen says that it was not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from llmhost.evidence import DEPLOY, Check, CouldNotLook, Plan, ServiceFailed, find, includes
from llmhost.nvidia_smi import SmiGpu, parse
from llmhost.plan.model import of_another_system

NOT_REPORTED = "not reported by this card"
OFF_BY_OTHERS = "off: the driver was installed by others (nvidia-smi -pm 1)"
BEFORE_HOPPER = "not reported before Hopper (gpu.fabric_manager and gpu.cuda_init tell)"
REPLACE = "the card is failing: drain this host, run NVIDIA's field diagnostic, have the card replaced"
RESET = "reset the card (stop what uses it, then nvidia-smi --gpu-reset), or reboot"
LOG = "see journalctl --dmesg --boot"
UPGRADE = "pyinfra INVENTORY upgrade.py"
CDI_REFRESH = "nvidia-ctk cdi generate --output=/var/run/cdi/nvidia.yaml (systemctl restart nvidia-cdi-refresh.service)"

# What cuInit returns (CUDA driver API, enum CUresult), of those that a broken host gives.
CUDA_RESULTS = {
    0: "success",
    2: "out of memory",
    3: "not initialised",
    34: "stub library",
    46: "device unavailable",
    100: "no device",
    101: "invalid device",
    802: "system not ready: the NVLink fabric is not initialised",
    803: "system driver mismatch: the library is not of the loaded module's version",
    804: "compatibility not supported on this device",
    999: "unknown error",
}

# Xids after which a card, its link or its firmware is not to be trusted: those whose immediate action is a reset, a
# reboot or the workflow for ECC or NVLink errors in NVIDIA's catalogue for Ampere and newer
# (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html). Not 155 and 156, which tell of links taken down on
# purpose and of parts taken out of use. 57 and 58 it has as unused: older cards have them (Azure's node health checks).
# All others are shown: an application's (13, 31, 43, 45, 94...), or judged by another row: 63, a row that was replaced,
# by the remapped rows, 154 by the recovery action.
FATAL_XIDS = {
    46: "GPU stopped processing",
    48: "double bit ECC error",
    57: "error programming the video memory interface",
    58: "unstable video memory interface",
    62: "internal microcontroller halt",
    64: "page retirement or row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    109: "context switch timed out",
    110: "security fault",
    119: "GSP firmware does not answer",
    120: "GSP firmware error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "GPU initialisation failed",
    **dict.fromkeys(range(144, 151), "NVLink 5 error"),
    158: "GPU timed out",
}

OTHER_NODES = ["nvidiactl", "nvidia-uvm"]

# Reasons for lower clocks that are a fault of cooling or power supply. A software power cap is normal under load.
THROTTLED = {"hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown"}


# --- views: what lies in the evidence, condensed -----------------------------------------------------------------


def holds(expected: dict[str, Any], seen: dict[str, Any]) -> bool:
    return expected.items() <= seen.items()


def part(gpu: dict[str, Any], look: str) -> Any:
    """Another part of the GPU's evidence; raises as a row that looks there would."""
    return find({"gpu": gpu}, f"gpu/{look}")[0]


def planned_cards(plan: Plan) -> dict[str, int]:
    """Of a driver of another system, the bus shows no card (WSL), or also those that are not ours (containers)."""
    driver = plan["driver"]
    places = ("nvidia-smi",) if is_of_another_system(driver) else ("sysfs", "nvidia-smi")
    return dict.fromkeys(places, driver["gpus"])


def counted(gpu: dict[str, Any], plan: Plan) -> dict[str, int]:
    return {"sysfs": len(part(gpu, "pci/gpus")), "nvidia-smi": len(parse(part(gpu, "smi/xml")).gpus)}


def every_version(gpu: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return {
        "loaded": part(gpu, "versions/loaded") or "none",
        "on disk": part(gpu, "versions/on_disk/version") or "none",
        "user space": user_space(gpu),
    }


def user_space(gpu: dict[str, Any]) -> list[str]:
    """Versions of the installed packages, and of the libcuda that a program gets; one of both will do."""
    found: set[str] = set()
    reasons = []
    for look in ("packages/user_space", "cuda/library"):
        try:
            seen = part(gpu, look)
        except (ServiceFailed, CouldNotLook) as reason:
            reasons.append(reason)
        else:
            found |= set(seen.values()) if isinstance(seen, dict) else {seen}
    if len(reasons) == 2:
        raise reasons[0]
    return sorted(found - {""})


def one_version(expected: Any, seen: dict[str, Any]) -> bool:
    loaded = seen["loaded"]
    return bool(loaded == seen["on disk"] != "none" and seen["user space"] == [loaded])


def branch(xml: str, plan: Plan) -> str:
    return parse(xml).driver_version.partition(".")[0]


def next_boot(gpu: dict[str, Any], plan: Plan) -> dict[str, Any]:
    seen = part(gpu, "newest_kernel")
    return {
        "kernel": seen["kernel"],
        "modules": seen["modules"] or "none",
        "user space": user_space(gpu),
        "reboot required by": seen["reboot_required_by"],
    }


def device_nodes(nodes: list[str], plan: Plan) -> dict[str, Any]:
    """A card's number is not its place in the order: a machine with one of a host's eight may have /dev/nvidia5."""
    return {
        "cards": sum(bool(re.fullmatch(r"nvidia\d+", node)) for node in nodes),
        "others": [node for node in OTHER_NODES if node in nodes],
    }


def initialised(cuda: dict[str, Any], plan: Plan) -> dict[str, Any]:
    result = cuda["init"]
    named = CUDA_RESULTS.get(result, "see CUresult")
    return {"cuInit": named if result == 0 else f"{result}, {named}", "devices": cuda["devices"]}


def in_container(seen: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return {**initialised(seen["cuda"], plan), "nvidia-smi": seen["gpus"]}


def trouble(log: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The log's events, each once: those that condemn a card or link, and those that an application causes.

    What a log has not kept is no evidence of health, but a fault in what it has kept is one.
    """
    events = [event(line) for line in log["lines"]]
    fatal = list(dict.fromkeys(words for words, fatal in events if fatal))
    hours = {name: log[f"{name}_seconds"] / 3600 for name in ("covers", "asked")}
    span = f"{hours['covers']:.1f} of the last {hours['asked']:.1f} h"
    if not fatal and hours["covers"] < hours["asked"]:
        raise CouldNotLook(f"the kernel's log reaches back {span}: what was before that is not known")
    others = list(dict.fromkeys(words for words, fatal in events if not fatal))
    return {"fatal": fatal, "others": others, "covers": span}


def event(line: str) -> tuple[str, bool]:
    """(what happened, whether it is fatal) of one line of the kernel's log."""
    fatal = not re.search("non-?fatal", line, re.IGNORECASE)
    if match := re.search(r"SXid \((.+?)\): (\d+)(.*)", line):
        return f"SXid {match[2]} at {match[1]}{match[3]}"[:120], fatal
    if match := re.search(r"Xid \((.+?)\): (\d+)", line):
        number, words = int(match[2]), f"Xid {match[2]} at {match[1]}"
        if number not in FATAL_XIDS:
            return words, False
        # NVLink 5's say so themselves: those that need a reset all the same make the driver ask for it, too.
        return (f"{words}: {FATAL_XIDS[number]}", True) if fatal else (f"{words}, not fatal", False)
    return line[-120:], True


def ecc(gpu: SmiGpu) -> str:
    if gpu.ecc is False:
        return "ECC is off"
    if gpu.ecc_errors_uncorrected is None:
        return NOT_REPORTED
    return f"{gpu.ecc_errors_uncorrected} uncorrected errors since the driver was loaded"


def remapped_rows(gpu: SmiGpu) -> str:
    if gpu.remapped_rows_failed:
        return "a row could not be replaced"
    if gpu.remapped_rows_pending:
        return "a row waits for a reset"
    return NOT_REPORTED if gpu.remapped_rows_failed is gpu.remapped_rows_pending is None else "none"


def link_widths(gpu: dict[str, Any], plan: Plan) -> dict[str, str]:
    """Lanes in use, of those the card has; a slot with fewer is how the machine is built. Idleness lowers the speed
    of a link, not its width."""
    slots = part(gpu, "pci/slot_lanes")
    return {card.address: link_width(card, slots.get(card.address)) for card in parse(part(gpu, "smi/xml")).gpus}


def link_width(card: SmiGpu, slot: int | None) -> str:
    if card.link_width is None or card.link_width_max is None:
        return NOT_REPORTED
    lanes = f"{card.link_width} of {card.link_width_max} lanes"
    return f"{lanes}, its slot has {slot}" if slot and slot < card.link_width_max else lanes


def full_width(expected: Any, seen: dict[str, str]) -> bool:
    return bool(seen) and all(said == NOT_REPORTED or is_full(said) for said in seen.values())


def is_full(said: str) -> bool:
    used, *possible = map(int, re.findall(r"\d+", said))
    return used >= min(possible)


def throttling(gpu: SmiGpu) -> str:
    return NOT_REPORTED if gpu.event_reasons is None else ", ".join(sorted(gpu.event_reasons & THROTTLED)) or "no"


def persistence(gpu: SmiGpu) -> str:
    return {True: "on", False: "off", None: NOT_REPORTED}[gpu.persistence]


def persistence_of_others(gpu: SmiGpu) -> str:
    return OFF_BY_OTHERS if gpu.persistence is False else persistence(gpu)


def recovery_action(gpu: SmiGpu) -> str:
    return NOT_REPORTED if gpu.recovery_action in ("", "N/A") else gpu.recovery_action


def fabric(gpu: SmiGpu) -> str:
    """NVML has it for Hopper and newer (nvmlDeviceGetGpuFabricInfo); Volta and Ampere have NVSwitches as well."""
    if not gpu.fabric_state and gpu.architecture in ("Volta", "Ampere"):
        return BEFORE_HOPPER
    return f"{gpu.fabric_state or 'no state'}, {gpu.fabric_status or 'no status'}"


def torch_devices(torch: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return {"devices": len(torch["devices"]), "names": torch["devices"], "torch": torch["version"]}


def not_older(expected: str, seen: str) -> bool:
    """ "29.2.0" for "26.1 or newer" """
    return numbers(seen) >= numbers(expected.split()[0]) > []


def numbers(version: str) -> list[int]:
    return [int(word) for word in re.split(r"[-+~]", version)[0].split(".") if word.isdigit()]


def specification(gpu: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return {**part(gpu, "specifications/files"), "loaded": part(gpu, "versions/loaded") or "none"}


def fresh(expected: Any, seen: dict[str, Any]) -> bool:
    files = [versions for name, versions in seen.items() if name != "loaded"]
    return bool(files) and all(versions == [seen["loaded"]] for versions in files)


def waiting(gpu: dict[str, Any], patterns: list[str]) -> str:
    """The updates that are left to somebody, in words: nothing depends on them."""
    try:
        found = part(gpu, "updates/packages")
    except (ServiceFailed, CouldNotLook) as reason:
        return str(reason)
    suites = [suite for name, suite in found.items() if any(re.match(pattern, name) for pattern in patterns)]
    if not suites:
        return "none wait"
    secure = sum("-security" in suite for suite in suites)
    return f"{len(suites)} wait, {secure} of them for security: {UPGRADE}"


# --- the rows -----------------------------------------------------------------------------------------------------


def of_cards(name: str, view: Callable[[SmiGpu], str], *good: str, remedy: str) -> Check:
    """What nvidia-smi says of each card is one of `good`; no card at all is no pass."""
    return Check(
        f"gpu.{name}",
        XML,
        f"{', '.join(good[:-1])}, or {good[-1]}",
        view=lambda xml, plan: {gpu.address: view(gpu) for gpu in parse(xml).gpus},
        agrees=lambda expected, seen: bool(seen) and set(seen.values()) <= set(good),
        remedy=remedy,
    )


def driver_rows(plan: Plan) -> tuple[Check, ...]:
    driver = plan.get("driver")
    if not driver:
        return ()
    rows: tuple[Check, ...] = CARDS
    installed = driver["source"] == "installed"
    if not is_of_another_system(driver):
        rows += OWN_KERNEL + (INSTALLED_PERSISTENCE if installed else PERSISTENCE)
    if driver["fabric_manager"] or not installed:
        rows += (FABRIC_MANAGER,)
    if driver["fabric_manager"]:
        rows += (FABRIC_STATE,)
    if "nvlsm" in driver["packages"]:
        rows += (IB_UMAD,)
    if driver["frozen"]:
        rows += (frozen("driver"),)
    engine = plan.get("engine")
    if engine and engine["accelerator"] == "nvidia" and engine["runtime"] == "venv":
        rows += (TORCH,)
    return rows


def is_of_another_system(driver: Plan) -> bool:
    return of_another_system(driver["source"], driver["frozen"])


def container_rows(plan: Plan) -> tuple[Check, ...]:
    containers, driver = plan.get("containers"), plan.get("driver")
    if not containers:
        return ()
    rows: tuple[Check, ...] = (DOCKER,)
    if containers["frozen"]:
        rows += (frozen("containers"),)
    if containers["toolkit_version"]:
        rows += TOOLKIT
        # Libraries that come from another system have versions of their own.
        rows += () if driver and is_of_another_system(driver) else (CDI_FRESH,)
    return rows


def frozen(concern: str) -> Check:
    return Check(
        f"{concern}.frozen",
        "gpu",
        lambda plan: plan[concern]["frozen"],
        view=lambda gpu, plan: {
            "patterns": part(gpu, "frozen/patterns"),
            "updates": waiting(gpu, plan[concern]["frozen"]),
        },
        agrees=lambda expected, seen: includes(expected, seen["patterns"]),
        remedy=f"an unattended upgrade could swap it under the running engine: {DEPLOY}",
    )


XML = "gpu/smi/xml"

# Of every driver, wherever it is installed.
CARDS = (
    Check(
        "gpu.count",
        "gpu",
        planned_cards,
        view=counted,
        agrees=holds,
        remedy=f"a card that sysfs has and nvidia-smi lacks did not start: {LOG}; one that both lack fell off the bus "
        "or was removed: power the machine off and on, or deploy again where it is meant to be gone",
    ),
    Check(
        "gpu.branch",
        XML,
        lambda plan: plan["driver"]["branch"],
        view=branch,
        remedy=f"another branch of the driver is loaded than driver_branch asks for: {DEPLOY}",
    ),
    Check(
        "gpu.cuda_init",
        "gpu/cuda",
        lambda plan: {"cuInit": "success", "devices": plan["driver"]["gpus"]},
        view=initialised,
        agrees=holds,
        remedy="no CUDA program can run, whatever nvidia-smi says: for 802 systemctl status nvidia-fabricmanager, for "
        f"803 reload the driver, for 999 modprobe nvidia-uvm; {LOG}",
    ),
    of_cards(
        "ecc",
        ecc,
        "0 uncorrected errors since the driver was loaded",
        "ECC is off",
        NOT_REPORTED,
        remedy=f"{RESET}; where they come back, {REPLACE}",
    ),
    of_cards(
        "remapped_rows",
        remapped_rows,
        "none",
        NOT_REPORTED,
        remedy=f"{RESET}; where a row could not be replaced, {REPLACE}",
    ),
    Check(
        "gpu.link_width",
        "gpu",
        f"all lanes that card and slot have, or {NOT_REPORTED}",
        view=link_widths,
        agrees=full_width,
        remedy="the card runs on fewer PCIe lanes than it could: reseat it, look at risers and the BIOS's bifurcation",
    ),
    of_cards(
        "recovery_action", recovery_action, "None", NOT_REPORTED, remedy=f"the driver asks for this itself: {RESET}"
    ),
    of_cards(
        "not_throttled",
        throttling,
        "no",
        NOT_REPORTED,
        remedy="clocks are held down by heat or power supply: look at fans, airflow, power cables; nvidia-smi -q -d "
        "PERFORMANCE,TEMPERATURE",
    ),
)

# Of a driver whose modules run in this system's own kernel.
OWN_KERNEL = (
    Check(
        "gpu.versions",
        "gpu",
        "one version: loaded, on disk, in user space",
        view=every_version,
        agrees=one_version,
        remedy=f'half an upgrade (NVML says "Driver/library version mismatch"): {DEPLOY}, which reloads or reboots',
    ),
    Check(
        "gpu.flavour",
        "gpu/versions/flavour",
        lambda plan: plan["driver"]["modules"],
        remedy="these cards need the other kernel modules: Blackwell and Grace the open ones, before Turing the "
        f"closed ones; {DEPLOY}",
    ),
    Check(
        "gpu.newest_kernel",
        "gpu",
        "modules of the installed user space for the kernel that boots next",
        view=next_boot,
        agrees=lambda expected, seen: seen["user space"] == [seen["modules"]],
        remedy=f"the next boot would come up without GPUs: {DEPLOY}, or remove that kernel",
    ),
    Check(
        "gpu.device_nodes",
        "gpu/devices/nodes",
        lambda plan: {"cards": plan["driver"]["gpus"], "others": OTHER_NODES},
        view=device_nodes,
        remedy="modprobe nvidia-uvm: udev's rules of the driver make the nodes as its modules are loaded",
    ),
    Check(
        "gpu.no_xid",
        "gpu/kernel_log",
        "no fatal Xid or SXid, no lost GPU, in this boot's last 24 h",
        view=trouble,
        agrees=lambda expected, seen: seen["fatal"] == [],
        remedy=f"{LOG} --grep 'NVRM|SXid'; once it is mended, reboot, or wait until the line is older than 24 h; a "
        "card that repeats this after a reboot is failing. Where the log does not reach back far enough, wait until it "
        "does, or give the journal more room (SystemMaxUse in journald.conf)",
    ),
)

# Images of clouds have it enabled on every machine, and it fails where it finds no switch: only running is wrong there.
WITHOUT_SWITCHES = "inactive or failed"
FABRIC_MANAGER = Check(
    "gpu.fabric_manager",
    "gpu/units/nvidia-fabricmanager.service",
    lambda plan: "active" if plan["driver"]["fabric_manager"] else WITHOUT_SWITCHES,
    agrees=lambda expected, seen: seen in expected.split(" or "),
    remedy="it must run exactly where NVSwitches are, at the driver's own version: "
    f"see journalctl -u nvidia-fabricmanager -b; {DEPLOY}",
)

UNLOADS = "the driver unloads whenever nothing uses a card, and takes seconds to come back"
PERSISTENCE = (
    of_cards("persistence", persistence, "on", NOT_REPORTED, remedy=f"{UNLOADS}: {DEPLOY}"),
    Check(
        "gpu.persistence_daemon",
        "gpu/units/nvidia-persistenced.service",
        "active",
        remedy="persistence mode is gone after the next reload or boot: see journalctl -u nvidia-persistenced -b; "
        + DEPLOY,
    ),
)
# Of a driver that llmhost left as it was: it may have no daemon that a deployment could start.
INSTALLED_PERSISTENCE = (
    of_cards(
        "persistence",
        persistence_of_others,
        "on",
        OFF_BY_OTHERS,
        NOT_REPORTED,
        remedy=f"{UNLOADS}: nvidia-smi -pm 1 (until the next boot), or install nvidia-persistenced and enable it",
    ),
)
FABRIC_STATE = of_cards(
    "fabric_state",
    fabric,
    "Completed, Success",
    BEFORE_HOPPER,
    remedy="cards do not reach each other, and CUDA answers 802: see journalctl -u nvidia-fabricmanager -b",
)
IB_UMAD = Check(
    "gpu.ib_umad",
    "gpu/modules/ib_umad",
    "loaded",
    remedy="the subnet manager of NVLink 5 (nvlsm) reaches the switches through it, and CUDA answers 802 without them: "
    f"{DEPLOY}; where this kernel has no such module: apt-get install linux-modules-extra-$(uname -r)",
)
TORCH = Check(
    "gpu.torch",
    "gpu/torch",
    lambda plan: {"devices": plan["driver"]["gpus"]},
    view=torch_devices,
    agrees=holds,
    remedy=f"the engine's Python does not see what the driver sees: compare with gpu.cuda_init; {DEPLOY}",
)
DOCKER = Check(
    "containers.docker",
    "gpu/docker/version",
    lambda plan: f"{plan['containers']['docker_minimum']} or newer",
    agrees=not_older,
    remedy=f"see systemctl status docker.service; {DEPLOY}",
)


def gpu_in_container(plan: Plan) -> dict[str, Any]:
    return {"cuInit": "success", "devices": plan["driver"]["gpus"], "nvidia-smi": plan["driver"]["gpus"]}


TOOLKIT = (
    Check(
        "containers.toolkit",
        "gpu/packages/toolkit",
        lambda plan: {
            pinned.partition("=")[0]: plan["containers"]["toolkit_version"]
            for pinned in plan["containers"]["toolkit_packages"]
        },
        remedy=f"the four packages work at one version only: {DEPLOY}",
    ),
    Check(
        "containers.cdi",
        "gpu/cdi/devices",
        ["nvidia.com/gpu=all"],
        agrees=includes,
        remedy=f"containers cannot ask for GPUs: {CDI_REFRESH}",
    ),
    Check(
        "containers.gpu",
        "gpu/container/before",
        gpu_in_container,
        view=in_container,
        agrees=holds,
        remedy=f"no container gets the GPUs: {CDI_REFRESH}; /usr/local/lib/llmhost/gpu-image build where the image is "
        "missing",
    ),
    Check(
        "containers.gpu_after_reload",
        "gpu/container/after_reload",
        gpu_in_container,
        view=in_container,
        agrees=holds,
        remedy="running containers lose their GPUs when systemd reads its units again, as every apt upgrade has it do: "
        "use CDI (--device nvidia.com/gpu=all), not --gpus or --runtime nvidia",
    ),
)
CDI_FRESH = Check(
    "containers.cdi_fresh",
    "gpu",
    "each specification is of the loaded driver's version",
    view=specification,
    agrees=fresh,
    remedy=f"the specification names another driver's libraries: {CDI_REFRESH}; remove files of other versions",
)
