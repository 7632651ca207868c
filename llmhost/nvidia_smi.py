"""What `nvidia-smi -q -x` prints, as frozen values. Tag names changed over the years: both are read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from xml.etree.ElementTree import Element

_END = "</nvidia_smi_log>"
_YES_NO = {"Enabled": True, "Yes": True, "Disabled": False, "No": False}
_IDLE = "gpu_idle"


@dataclass(frozen=True)
class SmiGpu:
    """A GPU as `nvidia-smi -q -x` describes it; None, or "" of texts, where it says N/A or nothing."""

    address: str  # as sysfs writes it: "0000:00:06.0"
    name: str
    uuid: str
    architecture: str  # "Hopper"
    memory_bytes: int | None  # None too where GPU and processor share it (GB10)
    compute_capability: str  # "9.0"; "" of every driver seen so far: it is only in --query-gpu
    ecc: bool | None
    mig: bool | None
    link_width: int | None  # lanes now
    link_width_max: int | None  # lanes the GPU has, not the slot
    power_limit_watts: float | None
    event_reasons: frozenset[str] | None  # active clocks event reasons but idleness ("sw_thermal_slowdown"), if told
    recovery_action: str  # "None" is well, "" where the driver does not say (before 570)
    persistence: bool | None
    power_draw_watts: float | None  # now, of the GPU
    temperature_celsius: float | None  # of the GPU, not its memory
    compute_mode: str  # "Default", "Exclusive_Process", "Prohibited"
    gsp_firmware: str  # version; "" where no GPU System Processor runs: closed modules on older cards
    ecc_errors_uncorrected: int | None  # volatile: since the driver was loaded
    remapped_rows_pending: bool | None  # memory rows (Turing and older: pages) wait for a GPU reset
    remapped_rows_failed: bool | None  # one could not be replaced: the GPU belongs exchanged
    fabric_state: str  # "Completed" where the NVLink fabric is ready, "" where there is none
    fabric_status: str  # "Success"


@dataclass(frozen=True)
class Smi:
    """One answer of nvidia-smi; empty where it gave none."""

    driver_version: str  # of the module in the kernel
    cuda_version: str  # newest that the driver runs
    gpus: tuple[SmiGpu, ...]


def parse(text: str) -> Smi:
    """Read the XML; text without any (nvidia-smi failed, or is missing) is an empty answer. Raises ValueError."""
    _, start, document = text.partition("<?xml")
    if not start:
        return Smi("", "", ())
    # What follows the document is a warning: "WARNING: infoROM is corrupted at gpu ...".
    body, end, _ = document.partition(_END)
    try:
        log = ElementTree.fromstring(start + body + end)
    except ElementTree.ParseError as error:
        raise ValueError(f"nvidia-smi's XML cannot be read: {error}") from None
    gpus = tuple(_gpu(gpu) for gpu in log.iterfind("gpu"))
    return Smi(_text(log, "driver_version"), _text(log, "cuda_version"), gpus)


def _gpu(gpu: Element) -> SmiGpu:
    return SmiGpu(
        address=_address(gpu.get("id", "")),
        name=_text(gpu, "product_name"),
        uuid=_text(gpu, "uuid"),
        architecture=_text(gpu, "product_architecture"),
        memory_bytes=_mebibytes(gpu, "fb_memory_usage/total"),
        compute_capability=_text(gpu, "compute_capability"),
        ecc=_flag(gpu, "ecc_mode/current_ecc"),
        mig=_flag(gpu, "mig_mode/current_mig"),
        link_width=_count(gpu, "pci/pci_gpu_link_info/link_widths/current_link_width"),
        link_width_max=_count(gpu, "pci/pci_gpu_link_info/link_widths/max_link_width"),
        power_limit_watts=_number(
            gpu,
            "gpu_power_readings/current_power_limit",
            "gpu_power_readings/power_limit",
            "power_readings/enforced_power_limit",
            "power_readings/power_limit",
        ),
        event_reasons=_event_reasons(gpu),
        # Here "None" is an answer.
        recovery_action=gpu.findtext("gpu_recovery_action", ""),
        persistence=_flag(gpu, "persistence_mode"),
        power_draw_watts=_number(
            gpu,
            "gpu_power_readings/instant_power_draw",
            "gpu_power_readings/power_draw",
            "gpu_power_readings/average_power_draw",
            "power_readings/power_draw",
        ),
        temperature_celsius=_number(gpu, "temperature/gpu_temp"),
        compute_mode=_text(gpu, "compute_mode"),
        gsp_firmware=_text(gpu, "gsp_firmware_version"),
        ecc_errors_uncorrected=_uncorrected(gpu.find("ecc_errors/volatile")),
        remapped_rows_pending=_flag(
            gpu,
            "remapped_rows/remapped_row_pending",
            "retired_pages/pending_retirement",
            "retired_pages/pending_blacklist",
        ),
        remapped_rows_failed=_flag(gpu, "remapped_rows/remapped_row_failure"),
        fabric_state=_text(gpu, "fabric/state"),
        fabric_status=_text(gpu, "fabric/status"),
    )


def _address(identity: str) -> str:
    """nvidia-smi's "00000000:0A:00.0" as sysfs's "0000:0a:00.0"."""
    found = re.fullmatch(r"([0-9A-F]{4,8}):([0-9A-F]{2}:[0-9A-F]{2}\.[0-7])", identity.upper())
    if not found:
        raise ValueError(f"nvidia-smi names a GPU {identity!r}, which is no PCI address")
    return f"{int(found[1], 16):04x}:{found[2].lower()}"


def _text(element: Element, *paths: str) -> str:
    """The first of these that says something."""
    found = (element.findtext(path, "").strip() for path in paths)
    return next((text for text in found if text not in ("", "N/A", "[N/A]", "None")), "")


def _flag(element: Element, *paths: str) -> bool | None:
    found = (_YES_NO.get(element.findtext(path, "").strip()) for path in paths)
    return next((flag for flag in found if flag is not None), None)


def _number(element: Element, *paths: str) -> float | None:
    """The first of these that is a number, whatever its unit."""
    found = (re.match(r"-?\d+(\.\d+)?", element.findtext(path, "").strip()) for path in paths)
    return next((float(number[0]) for number in found if number), None)


def _count(element: Element, path: str) -> int | None:
    number = _number(element, path)
    return None if number is None else int(number)


def _mebibytes(element: Element, path: str) -> int | None:
    number = _count(element, path)
    return None if number is None else number << 20


def _event_reasons(gpu: Element) -> frozenset[str] | None:
    """Before driver 535 they were called throttle reasons."""
    reasons = [*gpu.iterfind("clocks_event_reasons/*"), *gpu.iterfind("clocks_throttle_reasons/*")]
    if not reasons:
        return None
    active = {
        re.sub("^clocks_(event|throttle)_reason_", "", reason.tag) for reason in reasons if reason.text == "Active"
    }
    return frozenset(active - {_IDLE})


def _uncorrected(volatile: Element | None) -> int | None:
    """Of SRAM and DRAM together; cards before Ampere count double bit errors instead."""
    if volatile is None:
        return None
    places = [element.tag for element in volatile if "_uncorrectable" in element.tag] or ["double_bit/total"]
    counts = [count for place in places if (count := _count(volatile, place)) is not None]
    return sum(counts) if counts else None
