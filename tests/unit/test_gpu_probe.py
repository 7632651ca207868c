"""A GPU host, looked at by the real runtime/gpu-probe: healthy it passes every check, and each fault fails its own."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmhost.certificate import text
from llmhost.checks_gpu import BEFORE_HOPPER, container_rows, driver_rows, is_of_another_system
from llmhost.evidence import FAILED, PASSED, SKIPPED, Result, evaluate
from llmhost.plan.model import ContainersPlan, DriverPlan, EnginePlan, HostPlan
from tests.unit import stand_ins
from tests.unit.gpu_stand_ins import CARD, KERNEL, NEWER, TOOLKIT, VERSION, GpuHost
from tests.unit.stand_ins import HostFiles

GOLDEN = Path(__file__).resolve().parents[1] / "plan/golden/drivers"
RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
OF_EACH_CARD = {f"gpu.{name}" for name in ("ecc", "remapped_rows", "recovery_action", "not_throttled", "persistence")}
OF_NVIDIA_SMI = OF_EACH_CARD | {"gpu.branch", "gpu.count", "gpu.link_width"}
IN_CONTAINERS = {"containers.gpu", "containers.gpu_after_reload"}


@pytest.fixture
def host(tmp_path: Path) -> GpuHost:
    return GpuHost(tmp_path)


def look(host: GpuHost) -> dict[str, Any]:
    """What the probe makes of the host: the part `gpu` of the evidence."""
    done = subprocess.run(
        [sys.executable, str(RUNTIME / "gpu-probe"), "--plan", "/dev/stdin"],
        input=json.dumps(host.plan),
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        env=host.variables,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def results(host: GpuHost) -> dict[str, Result]:
    evidence = {"gpu": look(host)}
    rows = (*driver_rows(host.plan), *container_rows(host.plan))
    return {check.id: evaluate(check, host.plan, evidence) for check in rows}


# --- faults -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is broken, the check that fails of it, the words it shows, and what else fails as a consequence."""

    broken: str
    do: Callable[[GpuHost], None]
    check: str
    words: str
    also: frozenset[str] = frozenset()


def fault(broken: str, do: Callable[[GpuHost], Any], check: str, words: str, also: set[str] | None = None) -> Fault:
    return Fault(broken, do, check, words, frozenset(also or ()))


def smi(old: str, new: str) -> Callable[[GpuHost], None]:
    return lambda host: host.smi(old, new)


def element(name: str, value: str) -> Callable[[GpuHost], None]:
    """The recorded answer with this element's value changed."""

    def change(host: GpuHost) -> None:
        xml = (host.answers / "smi.xml").read_text()
        before = xml.partition(f"<{name}>")[2].partition("<")[0]
        host.smi(f"<{name}>{before}</{name}>", f"<{name}>{value}</{name}>")

    return change


def fails(program: str, words: str, code: int = 1) -> Callable[[GpuHost], None]:
    return lambda host: host.program(program, f'echo "{words}" >&2; exit {code}')


def log(line: str) -> Callable[[GpuHost], None]:
    return lambda host: host.says("kernel-log", f"2026-11-20T08:01:00+00:00 host kernel: {line}\n")


def environment(**variables: str) -> Callable[[GpuHost], None]:
    return lambda host: host.environment.update(variables)


def second_card(host: GpuHost) -> None:
    host.file("sys/bus/pci/devices/0000:00:08.0/vendor", "0x10de\n")
    host.file("sys/bus/pci/devices/0000:00:08.0/class", "0x030200\n")


def card_gone(host: GpuHost) -> None:
    host.remove(f"sys/bus/pci/devices/{CARD}")


def older_module_loaded(host: GpuHost) -> None:
    host.file("sys/module/nvidia/version", "580.95.05\n")


def newer_user_space(host: GpuHost) -> None:
    packages = (host.answers / "packages").read_text()
    host.says("packages", packages.replace(VERSION, "580.178.04"))


def other_branch_planned(host: GpuHost) -> None:
    host.plan["driver"]["branch"] = "595"


def closed_modules(host: GpuHost) -> None:
    host.file("proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {VERSION}\n")


def file_in_place_of_a_node(host: GpuHost) -> None:
    host.remove("dev/nvidia0")
    host.file("dev/nvidia0", "")


def switches(state: str, status: str, unit: str = "active") -> Callable[[GpuHost], None]:
    """A host with NVSwitches, its fabric in this state."""

    def change(host: GpuHost) -> None:
        host.plan["driver"]["fabric_manager"] = True
        host.units("active", unit)
        host.smi("<state>N/A</state>", f"<state>{state}</state>")
        host.smi("<status>N/A</status>", f"<status>{status}</status>")

    return change


def of_generation(architecture: str, change: Callable[[GpuHost], None]) -> Callable[[GpuHost], None]:
    def both(host: GpuHost) -> None:
        element("product_architecture", architecture)(host)
        change(host)

    return both


def subnet_manager(module: str) -> Callable[[GpuHost], None]:
    """A B200's host, its fabric ready: the manager needs nvlsm, and that the module."""

    def change(host: GpuHost) -> None:
        switches("Completed", "Success")(host)
        host.plan["driver"]["packages"] = ["nvidia-fabricmanager", "nvlsm"]
        if module:
            host.file(f"sys/module/{module}/refcnt", "2\n")

    return change


def without(answer: str, line: str) -> Callable[[GpuHost], None]:
    def change(host: GpuHost) -> None:
        lines = (host.answers / answer).read_text().splitlines(keepends=True)
        assert [one for one in lines if line in one]
        host.says(answer, "".join(one for one in lines if line not in one))

    return change


def older_docker(host: GpuHost) -> None:
    script = (host.bin / "docker").read_text()
    (host.bin / "docker").write_text(script.replace("29.7.2", "24.0.9"))


def older_library_of_the_toolkit(host: GpuHost) -> None:
    said = (host.answers / "packages").read_text()
    host.says("packages", said.replace("libnvidia-container1 1.20.0-1", "libnvidia-container1 1.19.0-1"))


def image_missing(host: GpuHost) -> None:
    script = (host.bin / "docker").read_text()
    missing = 'run) echo "Unable to find image llmhost/gpu-check:latest locally" >&2; exit 125 ;;'
    (host.bin / "docker").write_text(script.replace("run) echo 0123456789ab ;;", missing))


XID = "NVRM: Xid (PCI:0000:00:06): "
SXID = "nvidia-nvswitch0: SXid (PCI:0000:c1:00.0): "

FAULTS = [
    fault("a card that did not start", second_card, "gpu.count", '"sysfs": 2, "nvidia-smi": 1'),
    fault(
        "a card that fell off the bus",
        lambda host: host.remove(f"sys/bus/pci/devices/{CARD}"),
        "gpu.count",
        '"sysfs": 0',
    ),
    fault(
        "user space newer than the module",
        fails("nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch", 18),
        "gpu.count",
        "nvidia-smi -q ended with 18: Failed to initialize NVML: Driver/library version mismatch",
        OF_NVIDIA_SMI | IN_CONTAINERS,
    ),
    fault(
        "a driver that sees no card",
        lambda host: host.says("smi.xml", "No devices were found\n"),
        "gpu.count",
        '"nvidia-smi": 0',
        OF_NVIDIA_SMI,
    ),
    fault(
        "a module not reloaded", older_module_loaded, "gpu.versions", '"loaded": "580.95.05"', {"containers.cdi_fresh"}
    ),
    fault(
        "no module loaded",
        lambda host: host.remove("sys/module/nvidia/version"),
        "gpu.versions",
        '"loaded": "none"',
        {"containers.cdi_fresh"},
    ),
    fault(
        "no module for this kernel",
        lambda host: (host.answers / f"modinfo-{KERNEL}").unlink(),
        "gpu.versions",
        '"none"',
    ),
    fault("half an upgrade", newer_user_space, "gpu.versions", '"580.178.04"]', {"gpu.newest_kernel"}),
    fault("the wrong branch", other_branch_planned, "gpu.branch", "580"),
    fault("closed modules", closed_modules, "gpu.flavour", "closed"),
    fault(
        "a kernel without modules",
        lambda host: host.forget(f"modinfo-{NEWER}"),
        "gpu.newest_kernel",
        f'"kernel": "{NEWER}", "modules": "none"',
    ),
    fault("no nvidia-uvm", lambda host: host.remove("dev/nvidia-uvm"), "gpu.device_nodes", '"others": ["nvidiactl"]'),
    fault("a file for a device", file_in_place_of_a_node, "gpu.device_nodes", '"cards": 0'),
    fault("no fabric", environment(STAND_IN_CUINIT="802"), "gpu.cuda_init", "802, system not ready", IN_CONTAINERS),
    fault("CUDA's unknown error", environment(STAND_IN_CUINIT="999"), "gpu.cuda_init", "999, unknown", IN_CONTAINERS),
    fault("a crash in CUDA", environment(STAND_IN_CUINIT="crashes"), "gpu.cuda_init", "with signal 6", IN_CONTAINERS),
    fault("CUDA sees no card", environment(STAND_IN_DEVICES="0"), "gpu.cuda_init", '"devices": 0', IN_CONTAINERS),
    fault(
        "no libcuda",
        environment(LD_LIBRARY_PATH=""),
        "gpu.cuda_init",
        "libcuda.so.1: cannot open shared object file",
        IN_CONTAINERS,
    ),
    fault(
        "Xid 79", log(f"{XID}79, GPU has fallen off the bus."), "gpu.no_xid", "Xid 79 at PCI:0000:00:06: GPU has fallen"
    ),
    *[
        fault(f"Xid {number}", log(f"{XID}{number}, {words}"), "gpu.no_xid", f"Xid {number} at PCI:0000:00:06: ")
        for number, words in (
            *((46, "GPU stopped"), (48, "DBE"), (57, "FB"), (58, "FB"), (62, "halt"), (64, "Row"), (74, "NVLink")),
            *((95, "Uncontained"), (109, "Ch 1"), (110, "SEC"), (119, "Timeout"), (120, "GSP"), (136, "ALI")),
            *((140, "ECC"), (143, "init"), (158, "Timeout")),
            *((number, "NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x004505c6 0x0)") for number in range(144, 151)),
        )
    ],
    fault("a lost card", log("NVRM: GPU 0000:00:06.0: GPU has fallen off the bus"), "gpu.no_xid", "fallen off the bus"),
    fault("a fatal SXid", log(f"{SXID}20034, Fatal, Link 30"), "gpu.no_xid", "SXid 20034 at PCI:0000:c1:00.0, Fatal"),
    fault("no start", log("NVRM: RmInitAdapter failed! (0x22:0x56:897)"), "gpu.no_xid", "RmInitAdapter failed"),
    fault("memory errors", element("dram_uncorrectable", "3"), "gpu.ecc", "3 uncorrected errors"),
    fault("a row to replace", element("remapped_row_pending", "Yes"), "gpu.remapped_rows", "waits for a reset"),
    fault("no spare row", element("remapped_row_failure", "Yes"), "gpu.remapped_rows", "could not be replaced"),
    fault("a loose card", element("current_link_width", "8x"), "gpu.link_width", "8 of 16 lanes"),
    fault("a reset due", element("gpu_recovery_action", "GPU Reset"), "gpu.recovery_action", "GPU Reset"),
    *[
        fault(
            f"throttled: {reason}",
            element(f"clocks_event_reason_{reason}", "Active"),
            "gpu.not_throttled",
            reason,
        )
        for reason in ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
    ],
    fault("persistence off", element("persistence_mode", "Disabled"), "gpu.persistence", "off"),
    fault("no daemon", lambda host: host.units("inactive", "inactive"), "gpu.persistence_daemon", "inactive"),
    fault("a needless manager", lambda host: host.units("active", "active"), "gpu.fabric_manager", "active"),
    fault("a dead manager", switches("Completed", "Success", "failed"), "gpu.fabric_manager", "failed"),
    fault("no manager", switches("Completed", "Success", "inactive"), "gpu.fabric_manager", "inactive"),
    fault("a fabric that trains", switches("In Progress", "N/A"), "gpu.fabric_state", "In Progress, no status"),
    fault("a fabric that failed", switches("Completed", "Failure"), "gpu.fabric_state", "Completed, Failure"),
    fault("a fabric that says nothing", switches("N/A", "N/A"), "gpu.fabric_state", "no state, no status"),
    fault(
        "an A100's fabric that trains",
        of_generation("Ampere", switches("In Progress", "N/A")),
        "gpu.fabric_state",
        "In Progress, no status",
    ),
    fault("no InfiniBand for nvlsm", subnet_manager("ib_core"), "gpu.ib_umad", "not loaded"),
    fault(
        "torch without CUDA",
        lambda host: host.says("torch", '{"version": "2.14.0+cpu", "cuda": null, "devices": []}'),
        "gpu.torch",
        '"devices": 0, "names": [], "torch": "2.14.0+cpu"',
    ),
    fault(
        "torch that does not import",
        lambda host: (host.directory / "release/venv/bin/python").unlink(),
        "gpu.torch",
        "venv/bin/python is not installed",
    ),
    fault("a thawed driver", without("apt-config", '^nvidia-"'), "driver.frozen", "^libnvidia-"),
    fault("a thawed Docker", without("apt-config", "docker-ce"), "containers.frozen", "^nvidia-container-toolkit"),
    fault("an old Docker", older_docker, "containers.docker", "24.0.9"),
    fault(
        "Docker down",
        fails("docker", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock"),
        "containers.docker",
        "docker version ended with 1: Cannot connect to the Docker daemon",
        IN_CONTAINERS,
    ),
    fault("a mixed toolkit", older_library_of_the_toolkit, "containers.toolkit", '"libnvidia-container1": "1.19.0"'),
    fault("no toolkit", without("packages", "nvidia-container-toolkit-base"), "containers.toolkit", 'base": ""'),
    fault("no CDI device", lambda host: host.says("cdi", ""), "containers.cdi", "[]"),
    fault(
        "no nvidia-ctk", fails("nvidia-ctk", "no such command", 127), "containers.cdi", "nvidia-ctk cdi ended with 127"
    ),
    fault(
        "a stale specification",
        lambda host: host.specification("run/cdi/nvidia.yaml", "580.95.05"),
        "containers.cdi_fresh",
        '"/run/cdi/nvidia.yaml": ["580.95.05"], "loaded": "580.159.04"',
    ),
    fault(
        "a forgotten specification",
        lambda host: host.specification("etc/cdi/nvidia.yaml", "550.54.15"),
        "containers.cdi_fresh",
        '"/etc/cdi/nvidia.yaml": ["550.54.15"]',
    ),
    fault("no specification", lambda host: host.remove("run/cdi"), "containers.cdi_fresh", "loaded"),
    fault("no image", image_missing, "containers.gpu", "Unable to find image llmhost/gpu-check", IN_CONTAINERS),
    fault(
        "GPUs lost at daemon-reload",
        lambda host: host.says("loses-gpus", ""),
        "containers.gpu_after_reload",
        "nvidia-smi in a container ended with 255: Failed to initialize NVML: Unknown Error",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.broken)
def test_each_fault_fails_its_check_with_its_words(host: GpuHost, fault: Fault) -> None:
    fault.do(host)
    found = results(host)
    assert {name for name, result in found.items() if result.state != PASSED} == {fault.check, *fault.also}
    result = found[fault.check]
    assert result.state == FAILED
    assert fault.words in text(result.seen)
    assert result.remedy


def test_healthy_host_passes_and_every_check_is_shown_to_fail(host: GpuHost) -> None:
    found = results(host)
    assert {name: result.seen for name, result in found.items() if result.state != PASSED} == {}
    assert set(found) | {"gpu.fabric_state", "gpu.ib_umad"} == {fault.check for fault in FAULTS}


@pytest.mark.parametrize(
    ("do", "seen"),
    [
        (switches("Completed", "Success"), "Completed, Success"),
        (subnet_manager("ib_umad"), "Completed, Success"),
        (of_generation("Ampere", switches("Completed", "Success")), "Completed, Success"),
        (of_generation("Ampere", switches("N/A", "N/A")), BEFORE_HOPPER),
    ],
    ids=["H200", "B200", "A100 of the lab", "A100"],
)
def test_a_ready_fabric_passes(host: GpuHost, do: Callable[[GpuHost], None], seen: str) -> None:
    do(host)
    found = results(host)
    assert {name for name, result in found.items() if result.state != PASSED} == set()
    assert found["gpu.fabric_state"].seen == {CARD: seen}


# --- what is no fault -------------------------------------------------------------------------------------------


def test_what_a_card_does_not_report_passes_and_is_said(host: GpuHost) -> None:
    """As of consumer cards: no ECC, no remapped rows, no recovery action, no link width, no reasons."""
    xml = (host.answers / "smi.xml").read_text()
    for part in ("ecc_errors", "remapped_rows", "retired_pages", "clocks_event_reasons", "pci_gpu_link_info"):
        before, start, rest = xml.partition(f"<{part}>")
        xml = before + rest.partition(f"</{part}>")[2]
        assert start
    xml = xml.replace("<current_ecc>Enabled", "<current_ecc>N/A").replace("action>None<", "action>N/A<")
    host.says("smi.xml", xml)
    found = results(host)
    assert {name for name, result in found.items() if result.state != PASSED} == set()
    silent = {name for name, result in found.items() if result.seen == {CARD: "not reported by this card"}}
    assert silent == {"gpu.ecc", "gpu.remapped_rows", "gpu.recovery_action", "gpu.link_width", "gpu.not_throttled"}
    assert all("not reported by this card" in found[name].expected for name in silent)


def test_ecc_that_is_off_is_said(host: GpuHost) -> None:
    element("current_ecc", "Disabled")(host)
    result = results(host)["gpu.ecc"]
    assert (result.state, result.seen) == (PASSED, {CARD: "ECC is off"})


def test_a_narrow_slot_is_how_the_machine_is_built(host: GpuHost) -> None:
    """sysfs as it is: the card's directory lies below that of the bridge it is plugged into."""
    bridge = host.root / "sys/devices/pci0000:00/0000:00:01.0"
    devices = host.root / "sys/bus/pci/devices"
    bridge.mkdir(parents=True)
    (bridge / "max_link_width").write_text("8\n")
    (devices / CARD).rename(bridge / CARD)
    (devices / CARD).symlink_to(bridge / CARD)
    element("current_link_width", "8x")(host)
    result = results(host)["gpu.link_width"]
    assert (result.state, result.seen) == (PASSED, {CARD: "8 of 16 lanes, its slot has 8"})
    element("current_link_width", "4x")(host)
    assert results(host)["gpu.link_width"].state == FAILED


def test_an_applications_trouble_is_shown_and_passes(host: GpuHost) -> None:
    lines = (
        f"{XID}31, pid=4711, MMU Fault",
        f"{XID}31, pid=4712, MMU Fault",
        f"{SXID}12028, Non-fatal, Link 46",
        f"{XID}145, RLW_REMAP Nonfatal XC0 i0 Link -1 (0x00000082 0x00000001)",
    )
    host.says("kernel-log", "\n".join(f"host kernel: {line}" for line in lines))
    result = results(host)["gpu.no_xid"]
    assert result.state == PASSED
    others = ["Xid 31 at PCI:0000:00:06", "SXid 12028 at PCI:0000:c1:00.0, Non-fatal, Link 46"]
    assert result.seen["fatal"] == []
    assert result.seen["others"] == [*others, "Xid 145 at PCI:0000:00:06, not fatal"]
    assert result.seen["covers"] == "24.0 of the last 24.0 h"


@pytest.mark.parametrize("number", [8, 13, 31, 43, 45, 63, 68, 69, 80, 92, 94, 137, 154])
def test_an_xid_that_another_check_or_nobody_judges_passes(host: GpuHost, number: int) -> None:
    """Of applications; 63, a row that was replaced, is judged by remapped rows, 154 by the recovery action."""
    log(f"{XID}{number}, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)")(host)
    result = results(host)["gpu.no_xid"]
    assert (result.state, result.seen["others"]) == (PASSED, [f"Xid {number} at PCI:0000:00:06"])


def at(hours: float, words: str) -> str:
    """A line of the kernel's, this long after its start."""
    return f"[{hours * 3600:12.6f}] {words}"


def journal_since(hours: float) -> Callable[[GpuHost], None]:
    """The journal's oldest line of the kernel's is of then; what came before was rotated away, or never kept."""
    return lambda host: host.says("kernel-log-kept", at(hours, "host kernel: something\n"))


def ring_buffer(*lines: str) -> Callable[[GpuHost], None]:
    said = "\n".join(lines)
    return lambda host: host.program("dmesg", f"cat <<'END'\n{said}\nEND")


def test_a_journal_that_is_too_young_is_no_evidence(host: GpuHost) -> None:
    """98 of 100 hours: what happened in the 22 before that nobody knows."""
    journal_since(98)(host)
    result = results(host)["gpu.no_xid"]
    assert result.state == SKIPPED
    assert "the kernel's log reaches back 2.0 of the last 24.0 h" in result.seen
    log(f"{XID}79, GPU has fallen off the bus.")(host)
    assert results(host)["gpu.no_xid"].state == FAILED


def test_where_the_journal_is_too_young_the_ring_buffer_is_read(host: GpuHost) -> None:
    journal_since(98)(host)
    ring_buffer(at(1, "Linux version"), at(80, f"{XID}79, GPU has fallen off the bus."))(host)
    result = results(host)["gpu.no_xid"]
    assert result.state == FAILED
    assert result.seen == {
        "fatal": ["Xid 79 at PCI:0000:00:06: GPU has fallen off the bus"],
        "others": [],
        "covers": "24.0 of the last 24.0 h",
    }
    # A fault that was mended without a reboot is over after a day, in the ring buffer, too.
    ring_buffer(at(1, "Linux version"), at(75, f"{XID}79, GPU has fallen off the bus."))(host)
    assert results(host)["gpu.no_xid"].state == PASSED


def test_neither_log_reaches_far_enough(host: GpuHost) -> None:
    journal_since(98)(host)
    ring_buffer(at(97, "something"))(host)
    result = results(host)["gpu.no_xid"]
    assert (result.state, "3.0 of the last 24.0 h" in result.seen) == (SKIPPED, True)


def test_a_line_without_a_time_covers_nothing(host: GpuHost) -> None:
    host.says("kernel-log-kept", "")
    ring_buffer("Linux version 6.8.0-99-generic")(host)
    assert results(host)["gpu.no_xid"].state == SKIPPED


def test_a_host_that_has_just_started_is_covered_since_then(host: GpuHost) -> None:
    """Its journal begins when journald did, seconds after the kernel."""
    host.file("proc/uptime", "1800.00 1.00\n")
    host.says("kernel-log-kept", "[    4.125000] host kernel: systemd[1]: Inserted module\n")
    result = results(host)["gpu.no_xid"]
    assert (result.state, result.seen["covers"]) == (PASSED, "0.5 of the last 0.5 h")


def test_a_container_answers_for_its_own_boot_only(host: GpuHost) -> None:
    """As lab hosts are: they read the ring buffer of the machine's kernel, which began long before them."""
    host.says("kernel-log-kept", "")
    host.started(99.5 * 3600)
    ring_buffer(at(98, "something"), at(99, f"{XID}79, GPU has fallen off the bus."))(host)
    result = results(host)["gpu.no_xid"]
    assert (result.state, result.seen["covers"]) == (PASSED, "0.5 of the last 0.5 h")
    ring_buffer(at(99.7, "something"))(host)
    assert results(host)["gpu.no_xid"].state == SKIPPED


def test_what_to_do_after_a_mended_fault_is_said(host: GpuHost) -> None:
    log(f"{XID}79, GPU has fallen off the bus.")(host)
    remedy = results(host)["gpu.no_xid"].remedy
    assert "once it is mended, reboot, or wait until the line is older than 24 h" in remedy


def test_a_manager_without_switches_may_have_failed(host: GpuHost) -> None:
    """Images of clouds have it enabled on all machines; it ends where it finds no switch."""
    host.units("active", "failed")
    result = results(host)["gpu.fabric_manager"]
    assert (result.state, result.seen) == (PASSED, "failed")


def test_the_manager_of_others_is_asked_for_only_where_switches_are(host: GpuHost) -> None:
    host.plan["driver"]["source"] = "installed"
    assert "gpu.fabric_manager" not in results(host)
    switches("Completed", "Success")(host)
    assert results(host)["gpu.fabric_manager"].state == PASSED
    host.units("active", "inactive")
    assert results(host)["gpu.fabric_manager"].state == FAILED


def test_without_a_journal_the_ring_buffer_is_read(host: GpuHost) -> None:
    host.file("proc/uptime", "1800.00 1.00\n")
    host.says("kernel-log-kept", "")
    host.program("dmesg", f'echo "[   12.345678] {XID}79, GPU has fallen off the bus."')
    assert results(host)["gpu.no_xid"].seen["fatal"] == ["Xid 79 at PCI:0000:00:06: GPU has fallen off the bus"]


def test_a_software_power_cap_is_no_throttling(host: GpuHost) -> None:
    element("clocks_event_reason_sw_power_cap", "Active")(host)
    assert results(host)["gpu.not_throttled"].state == PASSED


def test_an_installed_driver_needs_no_daemon_of_ours(host: GpuHost) -> None:
    """Where it is off, llmhost has nothing to turn it on with: that is shown, and fails no certificate for ever."""
    host.plan["driver"]["source"] = "installed"
    assert "gpu.persistence_daemon" not in results(host)
    element("persistence_mode", "Disabled")(host)
    result = results(host)["gpu.persistence"]
    assert result.state == PASSED
    assert result.seen == {CARD: "off: the driver was installed by others (nvidia-smi -pm 1)"}
    assert result.seen[CARD] in result.expected


def test_updates_that_wait_are_told_and_fail_nothing(host: GpuHost) -> None:
    """Only those that unattended upgrades leave alone: the others come by themselves."""
    told = (
        "nvidia-utils-580-server/noble-updates,noble-security 580.178.04-1 amd64 [upgradable from: 580.159.04-1]",
        "libnvidia-compute-580-server/noble-updates 580.178.04-0ubuntu1 amd64 [upgradable from: 580.159.04-1]",
        "docker-ce/noble 5:29.8.0-1 amd64 [upgradable from: 5:29.7.2-1]",
        "vim/noble-security 2:9.1-2 amd64 [upgradable from: 2:9.1-1]",
    )
    host.says("upgradable", "\n".join(("Listing...", *told)))
    found = results(host)
    assert {name for name, result in found.items() if result.state != PASSED} == set()
    assert found["driver.frozen"].seen["updates"] == "2 wait, 1 of them for security: pyinfra INVENTORY upgrade.py"
    assert found["containers.frozen"].seen["updates"] == "1 wait, 0 of them for security: pyinfra INVENTORY upgrade.py"


def test_updates_that_cannot_be_told_fail_nothing(host: GpuHost) -> None:
    fails("apt", "E: The package lists or status file could not be parsed", 100)(host)
    result = results(host)["driver.frozen"]
    assert result.state == PASSED
    assert "apt list ended with 100" in result.seen["updates"]


@pytest.mark.parametrize(
    ("running", "newest", "state"),
    [
        ("6.8.0-101-generic", "6.8.0-101-generic", FAILED),  # running, its image removed or kept elsewhere
        ("6.8.0-99-generic", "6.8.0-100-generic", PASSED),
    ],
)
def test_the_newest_kernel_is_of_those_with_an_image_and_the_running_one(
    host: GpuHost, running: str, newest: str, state: str
) -> None:
    """infra/nvidia.py's rule, by which modules are loaded and reboots decided."""
    host.says("kernel", running)
    result = results(host)["gpu.newest_kernel"]
    assert (result.seen["kernel"], result.state) == (newest, state)


def test_a_reboot_that_somebody_waits_for_is_shown(host: GpuHost) -> None:
    host.file("run/reboot-required", "")
    host.file("run/reboot-required.pkgs", "linux-image-6.8.0-100-generic\n")
    result = results(host)["gpu.newest_kernel"]
    assert result.state == PASSED
    assert result.seen["reboot required by"] == ["linux-image-6.8.0-100-generic"]


# --- what could not be looked at --------------------------------------------------------------------------------


def empty_kernel_log(host: GpuHost) -> None:
    """As in a container: an empty log is no proof of a healthy card."""
    host.says("kernel-log-kept", "")
    host.program("dmesg", "exit 0")


@pytest.mark.parametrize(
    ("do", "skipped", "words"),
    [
        (empty_kernel_log, {"gpu.no_xid"}, "the kernel's log is empty"),
        (fails("journalctl", "No journal files were found."), {"gpu.no_xid"}, "dmesg ended with 1: dmesg: read kernel"),
        (
            fails("systemctl", "System has not been booted with systemd as init system"),
            {"gpu.persistence_daemon", "gpu.fabric_manager", "containers.gpu_after_reload"},
            "System has not been booted with systemd",
        ),
        (
            lambda host: host.remove("lib/modules"),
            {"gpu.versions", "gpu.newest_kernel"},
            "lib/modules",
        ),
        (
            fails("modinfo", "not permitted"),
            {"gpu.versions", "gpu.newest_kernel"},
            "modinfo -k ended with 1: not permit",
        ),
        (fails("apt-config", "broken"), {"driver.frozen", "containers.frozen"}, "apt-config dump ended with 1"),
        (
            lambda host: host.says("stale", "no\n\nyes\n"),
            {"containers.gpu_after_reload"},
            "systemd has yet to read a changed unit",
        ),
    ],
    ids=["no kernel log", "no journal", "no systemd", "no modules seen", "modinfo", "no apt", "unread unit"],
)
def test_what_could_not_be_looked_at_is_skipped_with_its_reason(
    host: GpuHost, do: Callable[[GpuHost], None], skipped: set[str], words: str
) -> None:
    do(host)
    found = results(host)
    not_passed = {name: result for name, result in found.items() if result.state != PASSED}
    assert {name for name, result in not_passed.items() if result.state == SKIPPED} >= skipped
    assert words in " ".join(str(result.seen) for result in not_passed.values())
    assert FAILED not in {result.state for name, result in not_passed.items() if name in skipped}


def windows_driver(host: GpuHost) -> None:
    """WSL: no card on the bus, no module, no node but dxg, a libcuda of a version of its own."""
    host.plan["driver"] |= {"source": "installed", "frozen": []}
    for path in (f"sys/bus/pci/devices/{CARD}", "sys/module/nvidia", "proc/driver", "dev", "lib/modules"):
        host.remove(path)
    host.device("dxg")
    host.units("inactive", "inactive")
    host.specification("run/cdi/nvidia.yaml", "1.1")
    host.says("packages", "\n".join(f"{name} 1.20.0-1 ii " for name in TOOLKIT))


def machines_driver(host: GpuHost) -> None:
    """A container (lxc, docker): the cards' nodes and the machine's /sys, but neither its modules nor its log."""
    host.plan["driver"] |= {"source": "installed", "frozen": []}
    for path in ("lib/modules", "boot"):
        host.remove(path)
    empty_kernel_log(host)
    host.units("inactive", "inactive")
    element("persistence_mode", "Disabled")(host)


@pytest.mark.parametrize("do", [windows_driver, machines_driver])
def test_a_driver_of_another_system_is_judged_by_what_is_here(host: GpuHost, do: Callable[[GpuHost], None]) -> None:
    """A check whose matter cannot exist here would keep such a host from ever passing."""
    do(host)
    found = results(host)
    assert {name: result.seen for name, result in found.items() if result.state != PASSED} == {}
    cards = ("count", "branch", "cuda_init", "ecc", "remapped_rows", "link_width", "recovery_action", "not_throttled")
    toolkit = ("docker", "frozen", "toolkit", "cdi", "gpu", "gpu_after_reload")
    assert set(found) == {*(f"gpu.{name}" for name in (*cards, "torch")), *(f"containers.{name}" for name in toolkit)}
    host.environment |= {"STAND_IN_CUINIT": "999"}
    host.says("smi.xml", "No devices were found\n")
    failed = {name for name, result in results(host).items() if result.state == FAILED}
    assert failed >= {"gpu.count", "gpu.cuda_init", "containers.gpu"}


def test_the_plans_tell_whose_driver_it_is() -> None:
    """By what the planner makes of each machine; it plans a container as it does WSL (plan/driver.py, OUTSIDE)."""
    plans = {file.stem: json.loads(file.read_text())["driver"] for file in GOLDEN.glob("*.json")}
    assert {name for name, driver in plans.items() if driver and is_of_another_system(driver)} == {"wsl"}


def test_a_unit_that_systemd_has_yet_to_read_is_not_read_for_it(host: GpuHost) -> None:
    """A reload would make services.*.current pass without anybody having mended it."""
    host.says("stale", "yes\n")
    look(host)
    assert not (host.answers / "reloaded").exists()
    host.says("stale", "no\n")
    look(host)
    assert (host.answers / "reloaded").exists()


@pytest.mark.parametrize("nothing", [{}, None, {"error": "broken"}, {"could_not_look": "no permission"}])
def test_nothing_passes_without_evidence(host: GpuHost, nothing: Any) -> None:
    subnet_manager("ib_umad")(host)
    gpu = look(host)
    for check in (*driver_rows(host.plan), *container_rows(host.plan)):
        assert evaluate(check, host.plan, {}).state == SKIPPED
        assert evaluate(check, host.plan, {"gpu": nothing}).state != PASSED
        for part in check.look.split("/")[1:2] or ("smi", "versions", "newest_kernel", "specifications", "frozen"):
            if check.look == "gpu" and part not in needed(check.id):
                continue
            assert evaluate(check, host.plan, {"gpu": {**gpu, part: nothing}}).state != PASSED, (check.id, part)


def needed(check: str) -> set[str]:
    """The parts of the evidence that a row of several reads."""
    return {
        "gpu.count": {"smi"},
        "gpu.versions": {"versions"},
        "gpu.newest_kernel": {"newest_kernel"},
        "gpu.link_width": {"smi"},
        "driver.frozen": {"frozen"},
        "containers.frozen": {"frozen"},
        "containers.cdi_fresh": {"versions", "specifications"},
    }[check]


# --- the look itself ----------------------------------------------------------------------------------------------


def test_the_container_is_removed(host: GpuHost) -> None:
    look(host)
    assert (host.answers / "removed").exists()


def test_nothing_that_identifies_a_card_is_kept(host: GpuHost) -> None:
    element("serial", "1650123456789")(host)
    element("uuid", "GPU-5bd2c5a8-1111-2222-3333-444455556666")(host)
    element("chassis_serial_number", "1830123456789")(host)
    element("gpu_fabric_guid", "0xb0e7a9c1")(host)
    element("clusterUuid", "7d1e4b52-aaaa")(host)
    clocks = "<value>3201 MHz</value>\n<supported_graphics_clock>1980 MHz</supported_graphics_clock>"
    host.smi("<supported_clocks>N/A</supported_clocks>", f"<supported_clocks>\n{clocks}\n</supported_clocks>")
    seen = json.dumps(look(host))
    identities = ("1650123456789", "5bd2c5a8", "1830123456789", "0xe18a1649", "0xb0e7a9c1", "7d1e4b52")
    assert not [identity for identity in identities if identity in seen]
    assert "supported_graphics_clock" not in seen


def test_what_hangs_is_given_up_and_hides_nothing(host: GpuHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that the seconds can be small."""
    host.environment |= {"STAND_IN_CUINIT": "hangs"}
    host.program("nvidia-smi", "exec sleep 60")
    for name, value in host.variables.items():
        monkeypatch.setenv(name, value)
    probe = module()
    probe.COMMAND_SECONDS, probe.TOTAL_SECONDS = 0.8, 3.0
    probe.vendor.__kwdefaults__["seconds"] = probe.run.__kwdefaults__["seconds"] = 0.8
    started = time.monotonic()
    seen = probe.look(probe.parts(host.plan))
    assert time.monotonic() - started < 4
    assert seen["smi"]["error"] == "nvidia-smi -q did not end within 1 s"
    assert seen["cuda"]["error"] == "cuInit did not end within 1 s"
    assert seen["versions"]["loaded"] == VERSION
    assert seen["container"]["before"]["error"] == "nvidia-smi in a container did not end within 1 s"


def module() -> Any:
    loader = importlib.machinery.SourceFileLoader("llmhost_gpu_probe", str(RUNTIME / "gpu-probe"))
    spec = importlib.util.spec_from_loader("llmhost_gpu_probe", loader)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        ({}, set()),
        ({"driver": {}, "containers": None}, set()),
        ({"driver": {}, "containers": {"toolkit_version": ""}}, {"docker", "frozen", "packages", "updates"}),
    ],
)
def test_a_host_without_gpu_is_asked_for_no_gpu(plan: dict[str, Any], parts: set[str]) -> None:
    assert set(module().parts(plan)) == parts


def test_docker_alone_has_its_rows() -> None:
    plan = {"driver": {}, "containers": {"docker_minimum": "26.1", "toolkit_version": "", "frozen": ["^docker-ce"]}}
    assert driver_rows(plan) == ()
    assert [check.id for check in container_rows(plan)] == ["containers.docker", "containers.frozen"]


def test_plan_of_these_tests_has_the_planners_names(host: GpuHost) -> None:
    for part, model in (("driver", DriverPlan), ("containers", ContainersPlan), ("engine", EnginePlan)):
        assert set(host.plan[part]) <= {field.name for field in dataclasses.fields(model)}
    assert set(host.plan) <= {field.name for field in dataclasses.fields(HostPlan)}


# --- as a part of the whole probe -------------------------------------------------------------------------------


def whole_look(host: GpuHost, files: HostFiles) -> dict[str, Any]:
    systemctl = (host.bin / "systemctl").read_text().replace("*ActiveState*)", "*nvidia-persistenced*)")
    (host.bin / "systemctl").write_text(
        systemctl.replace("\nesac", f'\n*) exec "{files.programs}/systemctl" "$@" ;;\nesac')
    )
    done = subprocess.run(
        [sys.executable, str(RUNTIME / "probe"), "--plan", str(files.plan)],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        env=host.variables,
    )
    assert done.returncode == 0, done.stderr
    evidence: dict[str, Any] = json.loads(done.stdout)
    return evidence


def test_the_probe_has_the_gpu_as_a_part_and_shows_no_secret(host: GpuHost, tmp_path: Path) -> None:
    host.says("cdi", f"nvidia.com/gpu={stand_ins.ENGINE_KEY}\nnvidia.com/gpu=all\n")
    plan = stand_ins.plan_json()
    plan |= {name: host.plan[name] for name in ("driver", "containers")}
    plan["engine"] |= {"accelerator": "cpu", "runtime": "venv"}
    evidence = whole_look(host, HostFiles(tmp_path).write(plan))
    assert evidence["gpu"]["cuda"]["devices"] == 1
    assert "torch" not in evidence["gpu"]
    assert evidence["gpu"]["cdi"]["devices"][0] == "nvidia.com/gpu=<secret>"
    assert stand_ins.ENGINE_KEY not in json.dumps(evidence)
    rows = (*driver_rows(plan), *container_rows(plan))
    found = [evaluate(check, plan, evidence) for check in rows]
    assert [(result.id, result.seen) for result in found if result.state != PASSED] == []


def test_stand_ins_are_named_in_the_evidence(host: GpuHost, tmp_path: Path) -> None:
    host.file("etc/llmhost-lab/simulated", "the PCI tree of an RTX 3060\n\nnvidia-smi\n")
    evidence = whole_look(host, HostFiles(tmp_path).write(stand_ins.plan_json()))
    root = f"files below LLMHOST_ROOT={host.root}"
    assert evidence["simulated"]["stand_ins"] == [root, "the PCI tree of an RTX 3060", "nvidia-smi"]
    assert "gpu" not in evidence
