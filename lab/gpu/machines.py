"""The machines that a lab host can imitate: which devices are in it, and what drives them before llmhost comes."""

from __future__ import annotations

from dataclasses import dataclass

from lab import LabError

NVIDIA = "0x10de"


@dataclass(frozen=True)
class Model:
    """A GPU by its PCI id (pci.ids 2026.10.24) and what nvidia-smi says of it."""

    device: str  # PCI device id
    name: str
    architecture: str
    memory_mib: int
    compute_capability: str
    power_watts: int
    link_generation: int
    ecc: bool = False
    display: bool = False  # class 0300 with an audio function beside it; else 0302


@dataclass(frozen=True)
class Machine:
    """The NVIDIA devices of a machine. `driver` is what holds its GPUs at boot: "", "nouveau" or "vfio-pci"."""

    models: tuple[Model, ...]
    nvswitches: int = 0
    nvswitch_device: str = ""
    driver: str = ""

    @property
    def description(self) -> str:
        """In words, for the list of stand-ins."""
        names = ", ".join(model.name for model in self.models) or "no GPU"
        return names + (f", {self.nvswitches} NVSwitches" if self.nvswitches else "")


RTX_3060 = Model("2504", "NVIDIA GeForce RTX 3060", "Ampere", 12288, "8.6", 170, 4, display=True)
RTX_4090 = Model("2684", "NVIDIA GeForce RTX 4090", "Ada Lovelace", 24564, "8.9", 450, 4, display=True)
A100 = Model("20b2", "NVIDIA A100-SXM4-80GB", "Ampere", 81920, "8.0", 400, 4, ecc=True)
B200 = Model("2901", "NVIDIA B200", "Blackwell", 183359, "10.0", 1000, 5, ecc=True)
V100 = Model("1db6", "Tesla V100-PCIE-32GB", "Volta", 32768, "7.0", 250, 3, ecc=True)
GTX_1080 = Model("1b80", "NVIDIA GeForce GTX 1080", "Pascal", 8192, "6.1", 180, 3, display=True)

MACHINES = {
    "rtx-3060": Machine((RTX_3060,)),
    "rtx-3060-nouveau": Machine((RTX_3060,), driver="nouveau"),
    "rtx-4090-nouveau": Machine((RTX_4090,), driver="nouveau"),
    "a100-hgx": Machine((A100,) * 8, nvswitches=6, nvswitch_device="1af1"),
    "b200": Machine((B200,)),
    "v100": Machine((V100,)),
    "gtx-1080": Machine((GTX_1080,)),
    "mixed": Machine((V100, RTX_4090)),
    "vfio": Machine((RTX_4090,), driver="vfio-pci"),
}


def machine(name: str) -> Machine:
    """The row of the table; LabError lists those there are."""
    try:
        return MACHINES[name]
    except KeyError:
        raise LabError(f"the lab has no machine {name!r}; it has: {', '.join(MACHINES)}.") from None


@dataclass(frozen=True)
class Device:
    """A PCI function as sysfs shows it."""

    address: str
    device: str
    class_id: str
    kind: str  # "gpu" | "audio" | "nvswitch"


def devices(machine: Machine) -> list[Device]:
    """Every PCI function of the machine, one bus for each GPU and switch."""
    found = []
    for number, model in enumerate(machine.models, start=1):
        class_id = "0x030000" if model.display else "0x030200"
        found.append(Device(f"0000:{number:02x}:00.0", f"0x{model.device}", class_id, "gpu"))
        if model.display:
            found.append(Device(f"0000:{number:02x}:00.1", "0x228e", "0x040300", "audio"))
    switch = f"0x{machine.nvswitch_device}"
    buses = range(0x80, 0x80 + machine.nvswitches)
    return found + [Device(f"0000:{bus:02x}:00.0", switch, "0x068000", "nvswitch") for bus in buses]


def uuid(machine_name: str, number: int) -> str:
    """A UUID of no real GPU, the same at every boot."""
    return f"GPU-00000000-0000-4000-8000-{list(MACHINES).index(machine_name):06x}{number:06x}"
