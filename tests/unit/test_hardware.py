"""The fact script and its parser."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.catalogue import ROOT
from llmhost.hardware import FactsError, Gpu, Listener, parse
from tests.recorded import bare, facts

SCRIPT = str(ROOT / "runtime/facts.sh")


def run_script(*arguments: str, **environment: str) -> str:
    command = ["sh", SCRIPT, *arguments]
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(command, env={**path, **environment}, capture_output=True, text=True, check=True).stdout


def test_this_machine_can_be_read() -> None:
    hardware = parse(run_script(str(int(time.time()))))
    assert hardware.cpu_count >= 1
    assert hardware.memory_bytes > 1 << 28
    assert abs(hardware.clock_offset_seconds) <= 2
    assert hardware.disk_for("/opt/llmhost").available_bytes > 0


def test_the_script_is_plain_posix_shell() -> None:
    # dash is what /bin/sh is on Debian and Ubuntu; bash in POSIX mode would forgive more.
    assert json.loads(subprocess.run(["dash", SCRIPT], capture_output=True, text=True, check=True).stdout)


def test_pci_devices_are_seen_without_a_driver(tmp_path: Path) -> None:
    for address, vendor, device, pci_class in [
        ("0000:01:00.0", "0x10de", "0x2504", "0x030000"),
        ("0000:01:00.1", "0x10de", "0x228e", "0x040300"),  # its audio function
        ("0000:02:00.0", "0x1a03", "0x2000", "0x030000"),  # a board's own display chip
        ("0000:03:00.0", "0x10de", "0x2330", "0x030200"),
        ("0000:04:00.0", "0x10de", "0x22a3", "0x068000"),  # an NVSwitch
        ("0000:05:00.0", "0x8086", "0x1533", "0x020000"),
    ]:
        folder = tmp_path / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        for name, value in (("vendor", vendor), ("device", device), ("class", pci_class)):
            (folder / name).write_text(value + "\n")
    (tmp_path / "drivers/nouveau").mkdir(parents=True)
    (tmp_path / "bus/pci/devices/0000:01:00.0/driver").symlink_to(tmp_path / "drivers/nouveau")
    hardware = parse(run_script(LLMHOST_SYSFS=str(tmp_path)))
    assert hardware.nvidia_gpus == (
        Gpu("0000:01:00.0", "0x10de", "0x2504", "nouveau"),
        Gpu("0000:03:00.0", "0x10de", "0x2330", "none"),
    )
    assert len(hardware.gpus) == 3


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=60))
def test_whatever_a_file_holds_the_output_is_json(text: str) -> None:
    function = Path(SCRIPT).read_text().split("json_string() {")[1].split("\n}\n")[0]
    ended = subprocess.run(
        ["sh", "-c", f"LC_ALL=C; export LC_ALL; json_string() {{{function}\n}}; json_string"],
        input=text.encode(),
        capture_output=True,
        check=True,
    )
    value = json.loads(ended.stdout)
    kept = "".join(c if c in "\t\n" or " " <= c < "\x7f" else "?" * len(c.encode()) for c in text)
    assert value == kept.removesuffix("\n")


def test_a_recorded_host_is_parsed() -> None:
    hardware = bare()
    assert (hardware.os_id, hardware.os_version, hardware.machine, hardware.init) == (
        "debian",
        "12",
        "x86_64",
        "systemd",
    )
    assert hardware.elevates
    assert hardware.installed.releases == frozenset()


def test_listeners_with_their_holder() -> None:
    hardware = bare(listeners="0.0.0.0:8000 812 nginx: master nginx.service\n[::1]:631 - - -")
    assert hardware.listeners == (
        Listener("0.0.0.0", 8000, "812", "nginx: master", "nginx.service"),
        Listener("::1", 631, "-", "-", "-"),
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"facts_version": "1"}', '{"facts_version": "2"}'])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(FactsError):
        parse(text)


@pytest.mark.parametrize("name", ["meminfo", "disks", "cpu"])
def test_a_record_that_lacks_something_is_refused(name: str) -> None:
    with pytest.raises(FactsError):
        parse(facts(**{name: ""}))
