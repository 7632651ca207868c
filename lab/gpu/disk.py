"""What makes a lab host one with a simulated GPU: files on its disk, written before its first boot and no later."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from lab import LabError
from lab.gpu import STAND_INS, machines, packages
from lab.gpu.machines import NVIDIA, Device, Machine, Model

PROGRAMS = "usr/local/lib/llmhost-lab"
NAMES = ("boot", "recount")
COMMANDS = {
    "usr/local/bin": ("uname",),
    "usr/local/sbin": ("modprobe", "modinfo", "depmod", "update-initramfs"),
}
RECORDED = Path(__file__).with_name(
    "nvidia-smi-q-h200.xml"
)  # of a real H200, its identity zeroed; field notes, samples
ARCHIVE = "var/lib/llmhost-lab/kernels"

BOOT_UNIT = """\
[Unit]
Description=Stand-in for the kernel and the hardware of a machine with NVIDIA GPUs
DefaultDependencies=no
RequiresMountsFor=/run /usr/local/lib
Before=sysinit.target systemd-udevd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/lib/llmhost-lab/boot

[Install]
WantedBy=sysinit.target
"""

# The kernel's packages are the distribution's: its archive is imitated too, by a directory that only has those.
KERNEL_SOURCE = f"""\
Types: deb
URIs: file:///{ARCHIVE}
Suites: ./
Trusted: yes
"""
KERNEL_PIN = """\
Package: linux-image-* linux-headers-* dkms
Pin: release o=llmhost-lab-kernels
Pin-Priority: 1001
"""


class Wanted(Protocol):
    """A host that is asked for."""

    @property
    def os(self) -> str: ...
    @property
    def gpu(self) -> str: ...


def require(wanted: Iterable[Wanted], *, mirror: bool) -> None:
    """Refuses what cannot be simulated."""
    for request in wanted:
        if request.gpu and request.os not in packages.KERNELS:
            raise LabError(
                f"a simulated GPU needs recorded kernels of its operating system; there are those of "
                f"{' and '.join(packages.KERNELS)}, none of {request.os}."
            )
    if not mirror:
        raise LabError("a host with a simulated GPU gets its packages from the lab's mirror: leave out --no-mirror.")


def simulate(root: Path, system: str, gpu: str, mirror: str) -> None:
    """Writes machine, programs and kernel to the disk of a new host. `mirror` is the address of the lab's mirror."""
    machine = machines.machine(gpu)
    describe(root, gpu, machine)
    install_programs(root)
    install_kernel(root, system)
    # The vendors' repositories are asked directly: the lab's proxy serves the distributions' alone.
    write(root / "etc/apt/apt.conf.d/01lab-vendors", f'Acquire::http::Proxy::{mirror} "DIRECT";\n')


def describe(root: Path, gpu: str, machine: Machine) -> None:
    """/etc/llmhost-lab: what the machine is, and that none of it is real."""
    etc = root / "etc/llmhost-lab"
    etc.mkdir()
    found = machines.devices(machine)
    gpus = [device for device in found if device.kind == "gpu"]
    devices = [as_sysfs(device) for device in found]
    for number, device in enumerate(entry for entry in devices if entry["kind"] == "gpu"):
        device |= {"name": machine.models[number].name, "uuid": machines.uuid(gpu, number)}
    write(etc / "machine.json", json.dumps({"driver": machine.driver, "devices": devices}, indent=1) + "\n")
    write(etc / "fabric", "required\n" if machine.nvswitches else "none\n")
    write(etc / "smi.xml", smi_xml(gpu, machine, gpus))
    write(etc / "gpus.tsv", smi_table(gpu, machine, gpus))
    write(etc / "simulated", "".join(f"{line}\n" for line in (f"machine: {machine.description}", *STAND_INS)))


def as_sysfs(device: Device) -> dict[str, str]:
    named = dataclasses.asdict(device)
    return {**named, "class": named.pop("class_id"), "vendor": NVIDIA}


def install_programs(root: Path) -> None:
    """The kernel's stand-in under each of its names, and the unit that starts it at every boot."""
    place = root / PROGRAMS
    place.mkdir(parents=True)
    program = place / "kernel"
    shutil.copyfile(packages.PROGRAMS / "kernel.py", program)
    program.chmod(0o755)
    for name in NAMES:
        (place / name).symlink_to("kernel")
    for directory, names in COMMANDS.items():
        for name in names:
            (root / directory / name).symlink_to(f"/{PROGRAMS}/kernel")
    unit = "llmhost-lab-gpu.service"
    write(root / "etc/systemd/system" / unit, BOOT_UNIT)
    wants = root / "etc/systemd/system/sysinit.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit).symlink_to(f"../{unit}")


def install_kernel(root: Path, system: str) -> None:
    """The recorded kernel by its packages, as an installer leaves it: with an image, without headers."""
    kernel = packages.KERNELS[system]
    archive = root / ARCHIVE
    archive.mkdir(parents=True)
    built = [
        packages.build(package, archive)
        for package in (*packages.kernel_packages(kernel.running, kernel.meta_version), packages.dkms())
    ]
    index(archive)
    write(root / "etc/apt/sources.list.d/llmhost-lab-kernels.sources", KERNEL_SOURCE)
    write(root / "etc/apt/preferences.d/llmhost-lab-kernels", KERNEL_PIN)
    images = [f"/{ARCHIVE}/{deb.name}" for deb in built if deb.name.startswith("linux-image-")]
    run_in(root, "dpkg", "--install", *images)


def add_kernel(root: Path, system: str) -> str:
    """Puts the next kernel into the archive of a host, and returns its release: apt-get update sees it."""
    kernel = packages.KERNELS[system]
    for package in packages.kernel_packages(kernel.next, kernel.next_meta_version):
        packages.build(package, root / ARCHIVE)
    index(root / ARCHIVE)
    return kernel.next


def index(archive: Path) -> None:
    from lab.mirror import vendor

    vendor.flat_index(archive, "llmhost-lab-kernels")


def run_in(root: Path, *words: str) -> None:
    done = subprocess.run(["chroot", str(root), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(words)}` failed in {root}: {done.stdout}{done.stderr}")


# --- what nvidia-smi tells --------------------------------------------------------------------------------------


def smi_xml(gpu: str, machine: Machine, devices: list[Device]) -> str:
    """What `nvidia-smi -q -x` answers: a real one's words with this machine's values; it fills @NAMES@ in itself."""
    log = ElementTree.parse(RECORDED).getroot()
    recorded = log.find("gpu")
    assert recorded is not None
    log.remove(recorded)
    edit(log, "driver_version", "@DRIVER@")
    edit(log, "cuda_version", "@CUDA@")
    edit(log, "attached_gpus", str(len(machine.models)))
    for number, (model, device) in enumerate(zip(machine.models, devices, strict=True)):
        log.append(smi_gpu(copy.deepcopy(recorded), model, device, machines.uuid(gpu, number), number))
    text = ElementTree.tostring(log, encoding="unicode")
    return f'<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v13.dtd">\n{text}\n'


def smi_gpu(told: ElementTree.Element, model: Model, device: Device, uuid: str, number: int) -> ElementTree.Element:
    """One GPU's block."""
    bus = f"0000{device.address}".upper()
    told.set("id", bus)
    ecc = "Enabled" if model.ecc else "N/A"
    values = {
        "product_name": model.name,
        "product_brand": "GeForce" if model.display else "NVIDIA",
        "product_architecture": model.architecture,
        "persistence_mode": "@PERSISTENCE@",
        "uuid": uuid,
        "minor_number": str(number),
        "gsp_firmware_version": "@DRIVER@",
        "gpu_virtualization_mode/virtualization_mode": "None",
        "pci/pci_bus": device.address[5:7].upper(),
        "pci/pci_device": device.address[8:10].upper(),
        "pci/pci_device_id": f"{model.device.upper()}10DE",
        "pci/pci_bus_id": bus,
        "fb_memory_usage/total": f"{model.memory_mib} MiB",
        "fb_memory_usage/free": f"{model.memory_mib - 616} MiB",
        "ecc_mode/current_ecc": ecc,
        "ecc_mode/pending_ecc": ecc,
        "fabric/state": "@FABRIC@",
        "fabric/status": "@FABRIC_STATUS@",
    }
    for limit in ("current", "requested", "default", "max"):
        values[f"gpu_power_readings/{limit}_power_limit"] = f"{model.power_watts}.00 W"
    for speed in ("max_link_gen", "current_link_gen", "device_current_link_gen", "max_device_link_gen"):
        values[f"pci/pci_gpu_link_info/pcie_gen/{speed}"] = str(model.link_generation)
    for path, value in values.items():
        edit(told, path, value)
    if not model.ecc:
        for path in ("mig_mode/current_mig", "mig_mode/pending_mig"):
            edit(told, path, "N/A")
        for counters in ("ecc_errors", "remapped_rows"):
            block = told.find(counters)
            for leaf in [element for element in block.iter() if len(element) == 0] if block is not None else []:
                leaf.text = "N/A"
    return told


def edit(element: ElementTree.Element, path: str, value: str) -> None:
    found = element.find(path)
    if found is None:
        raise LabError(f"{RECORDED.name} has no <{path}>: it is another version's.")
    found.text = value


def smi_table(gpu: str, machine: Machine, devices: list[Device]) -> str:
    """What `nvidia-smi --query-gpu` can be asked for: a line of names, and one for each GPU."""
    rows = []
    for number, (model, device) in enumerate(zip(machine.models, devices, strict=True)):
        row = {
            "index": str(number),
            "uuid": machines.uuid(gpu, number),
            "name": model.name,
            "pci.bus_id": f"0000{device.address}".upper(),
            "memory.total": f"{model.memory_mib} MiB",
            "compute_cap": model.compute_capability,
            "power.limit": f"{model.power_watts}.00 W",
            "pcie.link.width.current": "16",
            "pcie.link.width.max": "16",
            "ecc.mode.current": "Enabled" if model.ecc else "[N/A]",
            "mig.mode.current": "Disabled" if model.ecc else "[N/A]",
            "compute_mode": "Default",
        }
        rows.append(row)
    return "".join("\t".join(line) + "\n" for line in ([*rows[0]], *([*row.values()] for row in rows)))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o644)
