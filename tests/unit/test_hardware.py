"""The parser of facts, on recorded and composed hosts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.hardware import AptEntry, FactsError, Listener, parse
from tests.recorded import BARE, MACHINES, bare, facts, machine, machine_facts


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


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"facts_version": "2"}', '{"facts_version": "3"}'])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(FactsError):
        parse(text)


@pytest.mark.parametrize("name", ["meminfo", "disks", "cpu", "nvswitches"])
def test_a_record_that_lacks_something_is_refused(name: str) -> None:
    with pytest.raises(FactsError):
        parse(facts(**{name: ""}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kernels", "6.8.0-149-generic"),
        ("packages", "docker-ce ii"),
        ("apt", "/etc/apt/sources.list"),
        ("nvidia_smi", '<?xml version="1.0" ?>\n<nvidia_smi_log><gpu id="00000000:00:06.0">'),
        ("nvidia_smi", '<?xml version="1.0" ?>\n<nvidia_smi_log><gpu id="6"></gpu></nvidia_smi_log>'),
    ],
)
def test_a_record_in_another_form_is_refused(name: str, text: str) -> None:
    with pytest.raises(FactsError, match="hold it in another form"):
        parse(facts(**{name: text}))


# --- what bears on the driver -----------------------------------------------------------------------------------


def test_a_bare_host_has_no_driver() -> None:
    hardware = bare()
    driver = hardware.driver
    assert (driver.loaded_version, driver.loaded_modules, driver.user_space_version) == ("", "", "")
    assert (driver.smi_version, driver.gpus, driver.managed_source) == ("", (), "")
    assert (hardware.kernels, hardware.packages, hardware.apt, hardware.nvswitches) == ((), (), (), 0)
    assert hardware.docker.version == ""


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("gtx-1080", ["0x1b80 nouveau"]),
        ("rtx-3060", ["0x2504 none"]),
        ("rtx-4090", ["0x2684 nouveau"]),
        ("rtx-5090", ["0x2b85 none"]),
        ("two-rtx-3090", ["0x2204 none", "0x2204 none"]),
        ("kepler", ["0x102d none", "0x102d none"]),
        ("v100", ["0x1db4 none"]),
        ("t4", ["0x1eb8 none"]),
        ("a10g", ["0x2237 none"]),
        ("a100", ["0x20b5 none"]),
        ("h100", ["0x2331 nvidia"]),
        ("h200", ["0x2335 nvidia"]),
        ("mixed-generations", ["0x1db4 none", "0x2331 none"]),
        ("a100-hgx", ["0x20b2 none"] * 8),
        ("b200-hgx", ["0x2901 none"] * 8),
        ("gb10", ["0x2e12 nvidia"]),
        ("jetson-orin", []),
        ("wsl", []),
        ("runfile", ["0x2204 nvidia"]),
        ("vfio", ["0x2204 vfio-pci"]),
        ("none", []),
    ],
)
def test_gpus_are_counted_without_audio_switches_and_other_vendors(name: str, gpus: list[str]) -> None:
    assert [f"{gpu.device} {gpu.driver}" for gpu in machine(name).nvidia_gpus] == gpus


def test_every_machine_is_counted_above() -> None:
    (mark,) = (m for m in test_gpus_are_counted_without_audio_switches_and_other_vendors.pytestmark)  # type: ignore[attr-defined]  # set by the decorator
    assert {name for name, _ in mark.args[1]} == set(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_what_the_script_prints_and_no_less(name: str) -> None:
    composed = json.loads(machine_facts(name))
    assert composed.keys() == json.loads(BARE.read_text()).keys()
    assert all(isinstance(value, str) and not value.endswith("\n") for value in composed.values())


@pytest.mark.parametrize("name", ["h100", "h200", "gb10", "runfile"])
def test_where_a_driver_is_loaded_all_tell_of_the_same(name: str) -> None:
    hardware = machine(name)
    driver = hardware.driver
    (kernel,) = hardware.kernels
    assert {driver.loaded_version, driver.user_space_version, kernel.module_version} == {driver.smi_version}
    assert (driver.loaded_modules == "closed") == (kernel.module_licence == "NVIDIA")
    assert [gpu.address for gpu in driver.gpus] == [gpu.address for gpu in hardware.nvidia_gpus]


@pytest.mark.parametrize(("name", "number"), [("a100-hgx", 6), ("b200-hgx", 4), ("two-rtx-3090", 0)])
def test_switches(name: str, number: int) -> None:
    assert machine(name).nvswitches == number


@pytest.mark.parametrize(("text", "state"), [("1", True), ("0", False), ("", None)])
def test_secure_boot(text: str, state: bool | None) -> None:
    assert machine("rtx-3060", secure_boot=text).secure_boot is state


@pytest.mark.parametrize(("text", "enrolled"), [("enrolled", True), ("", False)])
def test_a_key_that_the_firmware_trusts(text: str, enrolled: bool) -> None:
    assert machine("rtx-3060", mok=text).mok_enrolled is enrolled


@pytest.mark.parametrize("name", ["dgx", "jetson", "wsl", "runfile"])
def test_platforms(name: str) -> None:
    machines = {"dgx": "gb10", "jetson": "jetson-orin"}
    assert machine(machines.get(name, name)).platform == {name}


@pytest.mark.parametrize(
    ("virtualisation", "container"),
    [
        ("docker", True),
        ("lxc", True),
        ("lxc-libvirt", True),
        ("podman", True),
        ("systemd-nspawn", False),  # a lab's: it gets a driver of its own
        ("kvm", False),
        ("google", False),
        ("vmware", False),
        ("none", False),
        ("", False),
        ("wsl", False),
    ],
)
def test_containers_are_told_from_virtual_machines(virtualisation: str, container: bool) -> None:
    assert bare(virtualisation=virtualisation).container is container


def test_docker_and_repositories() -> None:
    uri = "https://download.docker.com/linux/ubuntu"
    hardware = bare(
        docker="snap=yes\nserver=29.4.3\ncompose=2.40.3\ntoolkit=1.20.0",
        apt=f"/etc/apt/sources.list.d/my docker.list {uri}",
    )
    docker = hardware.docker
    assert (docker.version, docker.compose_version, docker.toolkit_version) == ("29.4.3", "2.40.3", "1.20.0")
    assert docker.snap and docker.command
    assert not bare().docker.command
    assert bare(docker="server=").docker.command
    assert bare(docker="kubernetes=k3s").docker.kubernetes == "k3s"
    assert hardware.apt == (AptEntry("/etc/apt/sources.list.d/my docker.list", uri),)


def test_a_driver_that_llmhost_provisions() -> None:
    driver = machine("h100", nvidia="loaded=580.178.04\nmodules=open\nmanaged=ubuntu-archive").driver
    assert (driver.managed_source, driver.user_space_version) == ("ubuntu-archive", "")


@given(device=st.integers(0, 0xFFFF), pci_class=st.sampled_from(["0x030000", "0x030200", "0x040300", "0x068000"]))
def test_whatever_the_id_the_class_decides_what_is_a_gpu(device: int, pci_class: str) -> None:
    hardware = bare(pci=f"0000:01:00.0 0x10de {device:#06x} {pci_class} none")
    assert [gpu.device for gpu in hardware.nvidia_gpus] == [f"{device:#06x}"] * pci_class.startswith("0x03")
