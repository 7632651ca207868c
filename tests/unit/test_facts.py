"""The fact script, run for real: here, and below a made root with the tools of the hardware boundary standing in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.catalogue import ROOT
from llmhost.hardware import AptEntry, Gpu, Hardware, Kernel, Package, parse
from tests.recorded.machines import H200, nvidia_smi

SCRIPT = str(ROOT / "runtime/facts.sh")


def run_script(*arguments: str, **environment: str) -> str:
    command = ["sh", SCRIPT, *arguments]
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(command, env={**path, **environment}, capture_output=True, text=True, check=True).stdout


# --- here -------------------------------------------------------------------------------------------------------


def test_this_machine_can_be_read() -> None:
    hardware = parse(run_script(str(int(time.time()))))
    assert hardware.cpu_count >= 1
    assert hardware.memory_bytes > 1 << 28
    assert abs(hardware.clock_offset_seconds) <= 2
    assert hardware.disk_for("/opt/llmhost").available_bytes > 0


def test_the_script_is_plain_posix_shell() -> None:
    # dash is what /bin/sh is on Debian and Ubuntu; bash in POSIX mode would forgive more.
    assert json.loads(subprocess.run(["dash", SCRIPT], capture_output=True, text=True, check=True).stdout)


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


# --- below a made root ------------------------------------------------------------------------------------------


class Tree:
    """A root directory with nothing in it, to be filled; its programs come before the system's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file("dpkg/status", "")
        # So that this runs as any user; the real sudo would ask for a password, and drop PATH.
        self.program("sudo", 'shift; exec "$@"')

    def file(self, path: str, text: str | bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def program(self, name: str, script: str) -> None:
        self.file(f"bin/{name}", f"#!/bin/sh\n{script}\n")
        (self.root / "bin" / name).chmod(0o755)

    def device(self, address: str, vendor: str, device: str, pci_class: str, driver: str = "") -> None:
        folder = f"sys/bus/pci/devices/{address}"
        for name, value in (("vendor", vendor), ("device", device), ("class", pci_class)):
            self.file(f"{folder}/{name}", value + "\n")
        if driver:
            (self.root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
            (self.root / folder / "driver").symlink_to(f"../../drivers/{driver}")

    def packages(self, *rows: str) -> None:
        """dpkg's own database, of "name version want flag status" rows."""
        stanzas = []
        for name, version, *status in map(str.split, rows):
            stanzas.append(
                f"Package: {name}\nStatus: {' '.join(status)}\nVersion: {version}\nArchitecture: all\n"
                "Maintainer: a test <test@example.org>\nDescription: none\n"
            )
        self.file("dpkg/status", "\n".join(stanzas))

    @property
    def raw(self) -> dict[str, str]:
        return self.read()

    def read(self, **environment: str) -> dict[str, str]:
        path = f"{self.root}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        here = {"LLMHOST_ROOT": str(self.root), "DPKG_ADMINDIR": f"{self.root}/dpkg", "PATH": path}
        facts: dict[str, str] = json.loads(run_script(**here, **environment))
        return facts

    @property
    def hardware(self) -> Hardware:
        return parse(json.dumps(self.raw))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_nothing_is_made_up_where_nothing_is(tree: Tree) -> None:
    facts = tree.raw
    names = ("pci", "secure_boot", "mok", "platform", "kernels", "packages", "nvidia", "nvidia_smi", "apt")
    assert {name: facts[name] for name in names} == dict.fromkeys(names, "")
    assert facts["nvswitches"] == "0"


def test_pci_devices_and_what_is_bound_to_them(tree: Tree) -> None:
    tree.device("0000:01:00.0", "0x10de", "0x2504", "0x030000", "nouveau")
    tree.device("0000:01:00.1", "0x10de", "0x228e", "0x040300", "snd_hda_intel")  # its audio function
    tree.device("0000:02:00.0", "0x1a03", "0x2000", "0x030000", "ast")  # a board's own display chip
    tree.device("0000:03:00.0", "0x10de", "0x2330", "0x030200")
    tree.device("0000:04:00.0", "0x10de", "0x22a3", "0x068000")  # an NVSwitch
    tree.device("0000:05:00.0", "0x8086", "0x1533", "0x020000", "igb")
    tree.device("0000:06:00.0", "0x10de", "0x2204", "0x030000", "vfio-pci")
    hardware = tree.hardware
    assert hardware.nvidia_gpus == (
        Gpu("0000:01:00.0", "0x10de", "0x2504", "nouveau"),
        Gpu("0000:03:00.0", "0x10de", "0x2330", "none"),
        Gpu("0000:06:00.0", "0x10de", "0x2204", "vfio-pci"),
    )
    assert len(hardware.gpus) == 4
    assert hardware.nvswitches == 1


def test_a_stand_in_of_sys_alone(tree: Tree) -> None:
    tree.device("0000:01:00.0", "0x10de", "0x2504", "0x030000")
    assert len(parse(run_script(LLMHOST_SYSFS=f"{tree.root}/sys")).nvidia_gpus) == 1


CONNECTX = b"ConnectX-7\x00\x90V0\x0aSW_MNG = 1\xff"


def test_switches_of_nvlink_5_are_behind_infiniband_ports(tree: Tree) -> None:
    tree.device("0000:01:00.0", "0x10de", "0x2901", "0x030200")
    for number, data in enumerate((CONNECTX, CONNECTX, b"ConnectX-7 of the network")):
        tree.device(f"0000:5{number}:00.0", "0x15b3", "0x1021", "0x020700", "mlx5_core")
        tree.file(f"sys/bus/pci/devices/0000:5{number}:00.0/vpd", data)
    # The same text in an Ethernet adapter, and in another vendor's: not read, since reading takes a while.
    tree.device("0000:60:00.0", "0x15b3", "0x1021", "0x020000")
    tree.device("0000:61:00.0", "0x8086", "0x1021", "0x020700")
    for address in ("0000:60:00.0", "0000:61:00.0"):
        tree.file(f"sys/bus/pci/devices/{address}/vpd", CONNECTX)
    assert tree.hardware.nvswitches == 2
    # The driver's name for the same device does not make it two.
    port = tree.root / "sys/class/infiniband/mlx5_0"
    port.mkdir(parents=True)
    (port / "device").symlink_to(tree.root / "sys/bus/pci/devices/0000:50:00.0")
    assert tree.hardware.nvswitches == 2


def test_an_infiniband_port_under_any_bus_counts(tree: Tree) -> None:
    tree.device("0000:01:00.0", "0x10de", "0x2901", "0x030200")
    tree.file("sys/class/infiniband/mlx5_4/device/vpd", CONNECTX)
    assert tree.hardware.nvswitches == 1


def test_without_a_gpu_no_port_is_read(tree: Tree) -> None:
    tree.file("sys/class/infiniband/mlx5_4/device/vpd", CONNECTX)
    assert tree.hardware.nvswitches == 0


@pytest.mark.parametrize(("last", "state"), [(b"\1", True), (b"\0", False)])
def test_secure_boot(tree: Tree, last: bytes, state: bool) -> None:
    tree.file("sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", b"\6\0\0\0" + last)
    assert tree.hardware.secure_boot is state


def test_without_efi_nothing_is_said_of_secure_boot(tree: Tree) -> None:
    assert tree.hardware.secure_boot is None


@pytest.mark.parametrize("key", ["var/lib/dkms/mok.pub", "var/lib/shim-signed/mok/MOK.der"])
def test_a_key_that_the_firmware_trusts(tree: Tree, key: str) -> None:
    said = f'case $2 in {tree.root}/{key}) echo "$2 is $STATE enrolled"; exit 1 ;; *) exit 255 ;; esac'
    tree.program("mokutil", f'[ "$1" = --test-key ] || exit 2\n{said}')
    assert tree.read(STATE="already")["mok"] == "enrolled"
    assert tree.read(STATE="not")["mok"] == ""


@pytest.mark.parametrize(
    ("path", "text", "platform"),
    [
        ("dev/dxg", "", "wsl"),
        ("usr/lib/wsl/lib/nvidia-smi", "", "wsl"),
        ("etc/nv_tegra_release", "# R36", "jetson"),
        ("proc/device-tree/compatible", "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0", "jetson"),
        ("etc/dgx-release", 'DGX_NAME="DGX Spark"', "dgx"),
        ("usr/bin/nvidia-uninstall", "", "runfile"),
        ("usr/bin/nvidia-installer", "", "runfile"),
    ],
)
def test_platforms_with_a_driver_of_their_own(tree: Tree, path: str, text: str, platform: str) -> None:
    tree.file(path, text)
    assert tree.hardware.platform == {platform}


def test_a_package_with_an_installer_is_no_runfile(tree: Tree) -> None:
    tree.packages("nvidia-installer 1 install ok installed")
    tree.file("dpkg/info/nvidia-installer.list", "/usr/bin/nvidia-installer\n")
    tree.file("usr/bin/nvidia-installer", "")
    assert tree.hardware.platform == frozenset()


def test_kernels_and_the_modules_on_disk_for_them(tree: Tree) -> None:
    running = os.uname().release
    for kernel in ("6.8.0-149-generic", "6.8.0-150-generic", "7.0.0-43-generic", "5.0.0-removed", running):
        (tree.root / "lib/modules" / kernel).mkdir(parents=True)
    for kernel in ("6.8.0-149-generic", "6.8.0-150-generic", "7.0.0-43-generic"):
        tree.file(f"boot/vmlinuz-{kernel}", "")
    tree.program(
        "modinfo",
        'case "$*" in\n'
        '"-k 6.8.0-149-generic -F version nvidia") echo 580.178.04 ;;\n'
        '"-k 6.8.0-149-generic -F license nvidia") echo Dual MIT/GPL ;;\n'
        '"-k 7.0.0-43-generic -F version nvidia") echo 550.144.03 ;;\n'
        '"-k 7.0.0-43-generic -F license nvidia") echo NVIDIA ;;\n'
        "*) echo modinfo: ERROR: Module nvidia not found. >&2; exit 1 ;;\nesac",
    )
    assert set(tree.hardware.kernels) == {
        Kernel("6.8.0-149-generic", "580.178.04", "Dual MIT/GPL"),
        Kernel("6.8.0-150-generic", "", ""),
        Kernel("7.0.0-43-generic", "550.144.03", "NVIDIA"),
        Kernel(running, "", ""),
    }


def test_packages_with_their_state(tree: Tree) -> None:
    tree.packages(
        "linux-image-6.8.0-149-generic 6.8.0-149.149 install ok installed",
        "linux-generic-hwe-24.04 7.0.0-43.43~24.04.1 hold ok installed",
        "linux-modules-nvidia-580-server-open-generic 6.8.0-149.149 install ok unpacked",
        "nvidia-utils-535 535.1-0ubuntu1 deinstall ok config-files",
        "docker-ce 5:29.4.3-1~ubuntu.24.04~noble install ok half-configured",
        "cuda-keyring 1.1-1 purge ok not-installed",
        "bash 5.2 install ok installed",
    )
    assert tree.hardware.packages == (
        Package("docker-ce", "5:29.4.3-1~ubuntu.24.04~noble", "iF"),
        Package("linux-generic-hwe-24.04", "7.0.0-43.43~24.04.1", "hi"),
        Package("linux-image-6.8.0-149-generic", "6.8.0-149.149", "ii"),
        Package("linux-modules-nvidia-580-server-open-generic", "6.8.0-149.149", "iU"),
        Package("nvidia-utils-535", "535.1-0ubuntu1", "rc"),
    )


@pytest.mark.parametrize(
    ("first_line", "flavour"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build", "open"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon Aug 31 2026", "closed"),
    ],
)
def test_the_driver_in_the_kernel(tree: Tree, first_line: str, flavour: str) -> None:
    tree.file("sys/module/nvidia/version", "580.159.04\n")
    tree.file("proc/driver/nvidia/version", f"{first_line}\nGCC version:  gcc version 13.3.0\n")
    driver = tree.hardware.driver
    assert (driver.loaded_version, driver.loaded_modules) == ("580.159.04", flavour)
    assert (driver.smi_version, driver.user_space_version, driver.managed_source) == ("", "", "")


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("libnvidia-compute-580-server", "580.178.04-0ubuntu0.24.04.1", "install ok installed"),
        ("libnvidia-compute", "1:595.91.07-1ubuntu1", "hold ok installed"),
        ("nvidia-utils-580", "580.178.04-0ubuntu1", "install ok unpacked"),
        ("libcuda1", "550.163.01-2", "install ok half-configured"),
    ],
)
def test_the_driver_in_user_space(tree: Tree, package: str, version: str, status: str) -> None:
    tree.packages(
        f"{package} {version} {status}",
        "nvidia-utils-470 470.1-0ubuntu1 install ok installed",  # what an upgrade forgot
        "libnvidia-compute-600 600.1-1 deinstall ok config-files",
        "nvidia-compute-utils-580 999-1 install ok installed",
    )
    assert tree.hardware.driver.user_space_version == version.split(":")[-1].split("-")[0]


def test_the_user_space_of_a_runfile(tree: Tree) -> None:
    tree.file("usr/lib/x86_64-linux-gnu/libcuda.so.550.144.03", "")
    (tree.root / "usr/lib/x86_64-linux-gnu/libcuda.so.1").symlink_to("libcuda.so.550.144.03")
    assert tree.hardware.driver.user_space_version == "550.144.03"


def test_a_driver_that_llmhost_provisions(tree: Tree) -> None:
    tree.file("etc/llmhost/driver", "ubuntu-archive 580 open\n")
    assert tree.hardware.driver.managed_source == "ubuntu-archive"


def test_what_nvidia_smi_answers(tree: Tree) -> None:
    xml = nvidia_smi("580.159.04", "13.0", H200)
    tree.file("answer.xml", xml + "\n")
    tree.program("nvidia-smi", f'[ "$*" = "-q -x" ] && cat {tree.root}/answer.xml')
    assert tree.raw["nvidia_smi"] == xml
    driver = tree.hardware.driver
    assert (driver.smi_version, driver.cuda_version) == ("580.159.04", "13.0")
    assert [(gpu.address, gpu.name) for gpu in driver.gpus] == [("0000:00:06.0", "NVIDIA H200")]


def test_an_nvidia_smi_that_fails_has_not_answered(tree: Tree) -> None:
    tree.program("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert tree.raw["nvidia_smi"] == ""
    assert tree.hardware.driver.gpus == ()


def test_an_nvidia_smi_that_no_signal_ends_is_not_waited_for(tree: Tree) -> None:
    """As on a lost GPU: in the kernel, it outlives `timeout` (here it ignores what `timeout` sends)."""
    tree.program("nvidia-smi", f"trap '' TERM; echo $$ >{tree.root}/pid; echo '<?xml'; exec sleep 60")
    facts = tree.read(LLMHOST_PATIENCE="1", TMPDIR=str(tree.root))
    stuck = int((tree.root / "pid").read_text())
    os.kill(stuck, signal.SIGKILL)  # it is still there, or this fails
    assert facts["nvidia_smi"] == ""
    assert facts["plan"] == json.loads(run_script())["plan"]
    assert not list(tree.root.glob("tmp.*"))


@pytest.mark.parametrize("path", ["usr/local/bin/k3s", "usr/bin/kubelet"])
def test_a_node_of_kubernetes(tree: Tree, path: str) -> None:
    tree.file(path, "")
    assert tree.hardware.docker.kubernetes == Path(path).name


def test_docker_with_compose_and_the_toolkit(tree: Tree) -> None:
    tree.program(
        "docker",
        'case "$*" in\n"version --format {{.Server.Version}}") echo 29.4.3 ;;\n'
        '"compose version --short") echo 2.40.3 ;;\nesac',
    )
    tree.program("nvidia-ctk", "printf 'NVIDIA Container Toolkit CLI version 1.20.0\\ncommit: 0123abcd\\n'")
    docker = tree.hardware.docker
    assert (docker.version, docker.compose_version, docker.toolkit_version) == ("29.4.3", "2.40.3", "1.20.0")
    assert not docker.snap


def test_a_docker_whose_daemon_is_down(tree: Tree) -> None:
    tree.program("docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    (tree.root / "snap/docker").mkdir(parents=True)
    docker = tree.hardware.docker
    assert (docker.version, docker.compose_version, docker.snap) == ("", "", True)


def test_repositories_of_vendors(tree: Tree) -> None:
    tree.file(
        "etc/apt/sources.list",
        "deb http://mirror.example/ubuntu noble main\n"
        "# deb https://download.docker.com/linux/ubuntu noble stable\n"
        "deb-src [ arch=amd64 ] https://download.docker.com/linux/ubuntu noble stable\n",
    )
    tree.file(
        "etc/apt/sources.list.d/toolkit.list",
        "deb [signed-by=/k.gpg] https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n"
        "deb file:///var/cuda-repo-ubuntu2404-13-0-local /\n",
    )
    tree.file(
        "etc/apt/sources.list.d/ppa.sources",
        "# by a person\nTypes: deb\nURIs: https://ppa.example/graphics-drivers/ppa/ubuntu\n"
        "# not https://download.docker.com/linux/ubuntu\n"
        " https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64\nSuites: noble\n\n"
        "Types: deb\nenabled: No\nURIs: https://nvidia.github.io/nvidia-docker\n",
    )
    assert set(tree.hardware.apt) == {
        AptEntry("/etc/apt/sources.list", "https://download.docker.com/linux/ubuntu"),
        AptEntry(
            "/etc/apt/sources.list.d/toolkit.list",
            "https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH)",
        ),
        AptEntry("/etc/apt/sources.list.d/toolkit.list", "file:///var/cuda-repo-ubuntu2404-13-0-local"),
        AptEntry("/etc/apt/sources.list.d/ppa.sources", "https://ppa.example/graphics-drivers/ppa/ubuntu"),
        AptEntry(
            "/etc/apt/sources.list.d/ppa.sources",
            "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64",
        ),
    }


@pytest.mark.parametrize("login", ["user:s3cret@", "s3cret@", "user:s3cr@t:s3cret@"])
@pytest.mark.parametrize("form", ["list", "sources"])
def test_no_password_of_a_repository_is_recorded(tree: Tree, login: str, form: str) -> None:
    uri = f"https://{login}mirror.example/docker-ce"
    line = f"deb [arch=amd64] {uri} noble stable" if form == "list" else f"Types: deb\nURIs: {uri}\n"
    tree.file(f"etc/apt/sources.list.d/mirror.{form}", line)
    assert "s3cr" not in json.dumps(tree.raw)
    assert [entry.uri for entry in tree.hardware.apt] == ["https://mirror.example/docker-ce"]
