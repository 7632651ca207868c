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

NOT_REPORTED = "not reported by this card"
REPLACE = "the card is failing: drain this host, run NVIDIA's field diagnostic, have the card replaced"
RESET = "reset the card (stop what uses it, then nvidia-smi --gpu-reset), or reboot"
LOG = "see journalctl --dmesg --boot"
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

# Xids after which a card, its link or its firmware is not to be trusted; others (13, 31, 43, 45) are an application's.
# Azure's node health checks have most, NVIDIA's Xid catalogue the words, and 46, 61, 95, 140 and 143 besides.
FATAL_XIDS = {
    46: "GPU stopped processing",
    48: "double bit ECC error",
    56: "display engine error",
    57: "error programming the video memory interface",
    58: "unstable video memory interface",
    61: "internal microcontroller warning",
    62: "internal microcontroller halt",
    63: "memory page retired or row remapped",
    64: "page retirement or row remapping failed",
    65: "video processor exception",
    68: "NVDEC exception",
    69: "graphics engine class error",
    73: "NVENC exception",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    80: "corrupted data sent to the GPU",
    81: "VGA subsystem error",
    92: "high rate of single bit ECC errors",
    95: "uncontained ECC error",
    119: "GSP firmware does not answer",
    120: "GSP firmware error",
    140: "unrecovered ECC error",
    143: "GPU initialisation failed",
}

# Reasons for lower clocks that are a fault of cooling or power supply. A software power cap is normal under load.
THROTTLED = {"hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown"}


# --- views: what lies in the evidence, condensed -----------------------------------------------------------------


def per_card(view: Callable[[SmiGpu], str]) -> Callable[[str, Plan], dict[str, str]]:
    """address -> what nvidia-smi says of that card."""
    return lambda xml, plan: {gpu.address: view(gpu) for gpu in parse(xml).gpus}


def only(*good: str) -> Callable[[Any, dict[str, str]], bool]:
    """Every card says one of these; no card at all is no pass."""
    return lambda expected, seen: bool(seen) and set(seen.values()) <= set(good)


def holds(expected: dict[str, Any], seen: dict[str, Any]) -> bool:
    return expected.items() <= seen.items()


def part(gpu: dict[str, Any], look: str) -> Any:
    """Another part of the GPU's evidence; raises as a row that looks there would."""
    return find({"gpu": gpu}, f"gpu/{look}")[0]


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


def branch(version: str, plan: Plan) -> str:
    return version.partition(".")[0]


def next_boot(gpu: dict[str, Any], plan: Plan) -> dict[str, Any]:
    seen = part(gpu, "newest_kernel")
    return {
        "kernel": seen["kernel"],
        "modules": seen["modules"] or "none",
        "user space": user_space(gpu),
        "reboot required by": seen["reboot_required_by"],
    }


def every_node(expected: list[str], nodes: list[str]) -> bool:
    """A card's number is not its place in the order: a machine with one of a host's eight may have /dev/nvidia5."""
    cards = [node for node in nodes if re.fullmatch(r"nvidia\d+", node)]
    wanted = [node for node in expected if re.fullmatch(r"nvidia\d+", node)]
    return len(cards) == len(wanted) > 0 and {"nvidiactl", "nvidia-uvm"} <= set(nodes)


def planned_nodes(plan: Plan) -> list[str]:
    return [*(f"nvidia{number}" for number in range(plan["driver"]["gpus"])), "nvidiactl", "nvidia-uvm"]


def initialised(cuda: dict[str, Any], plan: Plan) -> dict[str, Any]:
    result = cuda["init"]
    named = CUDA_RESULTS.get(result, "see CUresult")
    return {"cuInit": named if result == 0 else f"{result}, {named}", "devices": cuda["devices"]}


def in_container(seen: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return {**initialised(seen["cuda"], plan), "nvidia-smi": seen["gpus"]}


def trouble(log: dict[str, Any], plan: Plan) -> dict[str, list[str]]:
    """The log's events, each once: those that condemn a card or link, and those that an application causes."""
    events = [event(line) for line in log["lines"]]
    return {
        "fatal": list(dict.fromkeys(words for words, fatal in events if fatal)),
        "others": list(dict.fromkeys(words for words, fatal in events if not fatal)),
    }


def event(line: str) -> tuple[str, bool]:
    """(what happened, whether it is fatal) of one line of the kernel's log."""
    if match := re.search(r"SXid \((.+?)\): (\d+)(.*)", line):
        return f"SXid {match[2]} at {match[1]}{match[3]}"[:120], "non-fatal" not in line.lower()
    if match := re.search(r"Xid \((.+?)\): (\d+)", line):
        number = int(match[2])
        words = f": {FATAL_XIDS[number]}" if number in FATAL_XIDS else ""
        return f"Xid {number} at {match[1]}{words}", number in FATAL_XIDS
    return line[-120:], True


def ecc(gpu: SmiGpu) -> str:
    if gpu.ecc is False:
        return "ECC is off"
    if gpu.ecc_errors_uncorrected is None:
        return NOT_REPORTED
    return f"{gpu.ecc_errors_uncorrected} uncorrected errors"


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


def throttling(xml: str, plan: Plan) -> dict[str, str]:
    if not re.search(r"<clocks_(event|throttle)_reason_", xml):
        return {gpu.address: NOT_REPORTED for gpu in parse(xml).gpus}
    return {gpu.address: ", ".join(sorted(gpu.event_reasons & THROTTLED)) or "no" for gpu in parse(xml).gpus}


def persistence(gpu: SmiGpu) -> str:
    return {True: "on", False: "off", None: NOT_REPORTED}[gpu.persistence]


def recovery_action(gpu: SmiGpu) -> str:
    return NOT_REPORTED if gpu.recovery_action in ("", "N/A") else gpu.recovery_action


def fabric(gpu: SmiGpu) -> str:
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


# --- the rows -----------------------------------------------------------------------------------------------------


def driver_rows(plan: Plan) -> tuple[Check, ...]:
    driver = plan.get("driver")
    if not driver:
        return ()
    rows: tuple[Check, ...] = DRIVER
    if driver["source"] != "installed":
        rows += (PERSISTENCE_DAEMON,)
    if driver["fabric_manager"]:
        rows += (FABRIC_STATE,)
    if driver["frozen"]:
        rows += (FROZEN_DRIVER,)
    engine = plan.get("engine")
    if engine and engine["accelerator"] == "nvidia" and engine["runtime"] == "venv":
        rows += (TORCH,)
    return rows


def container_rows(plan: Plan) -> tuple[Check, ...]:
    containers = plan.get("containers")
    if not containers:
        return ()
    rows: tuple[Check, ...] = (DOCKER,)
    if containers["frozen"]:
        rows += (FROZEN_CONTAINERS,)
    return rows + TOOLKIT if containers["toolkit_version"] else rows


XML = "gpu/smi/xml"

DRIVER = (
    Check(
        "gpu.count",
        "gpu",
        lambda plan: {"sysfs": plan["driver"]["gpus"], "nvidia-smi": plan["driver"]["gpus"]},
        view=counted,
        remedy=f"a card that sysfs has and nvidia-smi lacks did not start: {LOG}; one that both lack fell off the bus "
        "or was removed: power the machine off and on, or deploy again where it is meant to be gone",
    ),
    Check(
        "gpu.versions",
        "gpu",
        "one version: loaded, on disk, in user space",
        view=every_version,
        agrees=one_version,
        remedy=f'half an upgrade (NVML says "Driver/library version mismatch"): {DEPLOY}, which reloads or reboots',
    ),
    Check(
        "gpu.branch",
        "gpu/versions/loaded",
        lambda plan: plan["driver"]["branch"],
        view=branch,
        remedy=f"another branch of the driver is loaded than driver_branch asks for: {DEPLOY}",
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
        planned_nodes,
        agrees=every_node,
        remedy="modprobe nvidia-uvm: udev's rules of the driver make the nodes as its modules are loaded",
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
    Check(
        "gpu.no_xid",
        "gpu/kernel_log",
        "no fatal Xid or SXid, no lost GPU, in this boot's last 24 h",
        view=trouble,
        agrees=lambda expected, seen: seen["fatal"] == [],
        remedy=f"{LOG} --grep 'NVRM|SXid'; a card that repeats this after a reboot is failing",
    ),
    Check(
        "gpu.ecc",
        XML,
        f"0 uncorrected errors since the driver was loaded, ECC is off, or {NOT_REPORTED}",
        view=per_card(ecc),
        agrees=only("0 uncorrected errors", "ECC is off", NOT_REPORTED),
        remedy=f"{RESET}; where they come back, {REPLACE}",
    ),
    Check(
        "gpu.remapped_rows",
        XML,
        f"none waiting or failed, or {NOT_REPORTED}",
        view=per_card(remapped_rows),
        agrees=only("none", NOT_REPORTED),
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
    Check(
        "gpu.recovery_action",
        XML,
        f"None, or {NOT_REPORTED}",
        view=per_card(recovery_action),
        agrees=only("None", NOT_REPORTED),
        remedy=f"the driver asks for this itself: {RESET}",
    ),
    Check(
        "gpu.not_throttled",
        XML,
        f"no, or {NOT_REPORTED}",
        view=throttling,
        agrees=only("no", NOT_REPORTED),
        remedy="clocks are held down by heat or power supply: look at fans, airflow, power cables; nvidia-smi -q -d "
        "PERFORMANCE,TEMPERATURE",
    ),
    Check(
        "gpu.persistence",
        XML,
        f"on, or {NOT_REPORTED}",
        view=per_card(persistence),
        agrees=only("on", NOT_REPORTED),
        remedy=f"the driver unloads whenever nothing uses a card, and takes seconds to come back: {DEPLOY}",
    ),
    Check(
        "gpu.fabric_manager",
        "gpu/units/nvidia-fabricmanager.service",
        lambda plan: "active" if plan["driver"]["fabric_manager"] else "inactive",
        remedy="it must run exactly where NVSwitches are, at the driver's own version: "
        f"see journalctl -u nvidia-fabricmanager -b; {DEPLOY}",
    ),
)

PERSISTENCE_DAEMON = Check(
    "gpu.persistence_daemon",
    "gpu/units/nvidia-persistenced.service",
    "active",
    remedy="persistence mode is gone after the next reload or boot: see journalctl -u nvidia-persistenced -b; "
    + DEPLOY,
)
FABRIC_STATE = Check(
    "gpu.fabric_state",
    XML,
    "Completed, Success",
    view=per_card(fabric),
    agrees=only("Completed, Success"),
    remedy="cards do not reach each other, and CUDA answers 802: see journalctl -u nvidia-fabricmanager -b",
)
TORCH = Check(
    "gpu.torch",
    "gpu/torch",
    lambda plan: {"devices": plan["driver"]["gpus"]},
    view=torch_devices,
    agrees=holds,
    remedy=f"the engine's Python does not see what the driver sees: compare with gpu.cuda_init; {DEPLOY}",
)
FROZEN_REMEDY = f"an unattended upgrade could swap it under the running engine: {DEPLOY}"
FROZEN_DRIVER = Check(
    "driver.frozen",
    "gpu/frozen/patterns",
    lambda plan: plan["driver"]["frozen"],
    agrees=includes,
    remedy=FROZEN_REMEDY,
)
FROZEN_CONTAINERS = Check(
    "containers.frozen",
    "gpu/frozen/patterns",
    lambda plan: plan["containers"]["frozen"],
    agrees=includes,
    remedy=FROZEN_REMEDY,
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
        "containers.cdi_fresh",
        "gpu",
        "each specification is of the loaded driver's version",
        view=specification,
        agrees=fresh,
        remedy=f"the specification names another driver's libraries: {CDI_REFRESH}; remove files of other versions",
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
