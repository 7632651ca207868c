"""Machines with GPUs, a row each: what their facts have that the bare Debian host's have not.

Composed, but for the H200's nvidia-smi answer, which was recorded (lab/gpu/nvidia-smi-q-h200.xml, identities zeroed);
the other answers are that document with another card's name, address and memory. PCI ids are those of the cards named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

H200_XML = (Path(__file__).resolve().parents[2] / "lab/gpu/nvidia-smi-q-h200.xml").read_text().rstrip("\n")

# --- parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A distribution with the kernel it runs, and the packages that brought the kernel and keep it current."""

    os: str  # a name of OS_RELEASES
    kernel: str  # `uname -r`
    version: str  # of the kernel's packages
    metas: tuple[str, ...]
    architecture: str = "x86_64"

    @property
    def packages(self) -> str:
        """The `packages` fact."""
        named = (f"linux-image-{self.kernel}", *self.metas)
        return "\n".join([*(f"{name} {self.version} ii" for name in named), "unattended-upgrades 2.9.1 ii"])


def ubuntu(os: str, kernel: str, version: str, flavour: str, architecture: str = "x86_64") -> System:
    metas = tuple(f"linux-{part}{flavour}" for part in ("", "image-", "headers-"))
    return System(os, kernel, version, (f"linux-headers-{kernel}", *metas), architecture)


JAMMY = ubuntu("Ubuntu 22.04", "5.15.0-203-generic", "5.15.0-203.213", "generic")
JAMMY_AWS = ubuntu("Ubuntu 22.04", "6.8.0-1045-aws", "6.8.0-1045.47~22.04.1", "aws")
JAMMY_TEGRA = System("Ubuntu 22.04", "5.15.148-tegra", "5.15.148", (), "aarch64")
NOBLE = ubuntu("Ubuntu 24.04", "6.8.0-149-generic", "6.8.0-149.149", "generic")
NOBLE_HWE = ubuntu("Ubuntu 24.04", "7.0.0-43-generic", "7.0.0-43.43~24.04.1", "generic-hwe-24.04")
NOBLE_GCP = ubuntu("Ubuntu 24.04", "6.17.0-1012-gcp", "6.17.0-1012.12~24.04.1", "gcp")
NOBLE_DGX = ubuntu("Ubuntu 24.04", "6.17.0-1014-nvidia", "6.17.0-1014.14", "nvidia-hwe-24.04", "aarch64")
NOBLE_WSL = System("Ubuntu 24.04", "6.6.87.2-microsoft-standard-WSL2", "", ())  # Windows brings the kernel
RESOLUTE = ubuntu("Ubuntu 26.04", "7.0.0-43-generic", "7.0.0-43.43", "generic")
BOOKWORM = System("Debian 12", "6.1.0-49-amd64", "6.1.174-1", ("linux-image-amd64",))
TRIXIE = System("Debian 13", "6.12.94+deb13-amd64", "6.12.94-1", ("linux-image-amd64",))

XEON = "model name=Intel(R) Xeon(R) Platinum 8480+\nflags=fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_bf16 amx_bf16"
SKYLAKE = "model name=Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz\nflags=fpu sse4_2 avx avx2 fma avx512f avx512bw"
EPYC = "model name=AMD EPYC 9354 32-Core Processor\nflags=fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_bf16"
RYZEN = "model name=AMD Ryzen 9 7950X 16-Core Processor\nflags=fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_bf16"
CORE = "model name=13th Gen Intel(R) Core(TM) i7-13700K\nflags=fpu sse4_2 avx avx2 fma"
GRACE = "Features=fp asimd asimddp sve sve2 bf16 i8mm"
CORTEX = "Features=fp asimd asimddp"

ASPEED = "0000:c3:00.0 0x1a03 0x2000 0x030000 ast"  # the display chip of a server's board


def geforce(device: str, audio: str, driver: str = "none", bus: str = "01") -> str:
    """A GeForce with its HDMI audio function, which is no GPU."""
    sound = "vfio-pci" if driver == "vfio-pci" else "snd_hda_intel"
    return f"0000:{bus}:00.0 0x10de 0x{device} 0x030000 {driver}\n0000:{bus}:00.1 0x10de 0x{audio} 0x040300 {sound}"


def accelerators(device: str, *addresses: str, driver: str = "none") -> str:
    """Cards without a display: 3D controllers."""
    return "\n".join(f"{address} 0x10de 0x{device} 0x030200 {driver}" for address in addresses)


HGX = tuple(f"0000:{bus}:00.0" for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df"))
A100_SWITCHES = "\n".join(
    f"0000:{bus}:00.0 0x10de 0x1af1 0x068000 none" for bus in ("84", "85", "86", "87", "88", "89")
)


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi shows it."""

    address: str
    name: str
    architecture: str
    memory: str  # "24576 MiB"
    ecc: str = "Enabled"
    mig: str = "Disabled"


def nvidia_smi(driver: str, cuda: str, *cards: Card) -> str:
    """The H200's answer, as another driver would give it of other cards."""
    head, block, tail = re.split(r"(\t<gpu .*</gpu>\n)", H200_XML, maxsplit=1, flags=re.DOTALL)
    values = {"driver_version": driver, "cuda_version": cuda, "attached_gpus": str(len(cards))}
    return _with(head, values) + "".join(_gpu(block, driver, card) for card in cards) + tail


def _gpu(block: str, driver: str, card: Card) -> str:
    values = {
        "product_name": card.name,
        "product_architecture": card.architecture,
        "uuid": f"GPU-00000000-0000-0000-0000-{int(card.address[5:7], 16):012x}",
        "pci_bus_id": f"0000{card.address}",
        "current_mig": card.mig,
        "current_ecc": card.ecc,
        "gsp_firmware_version": driver,
        "total": card.memory,  # the first is that of the frame buffer
    }
    return _with(block, values).replace("00000000:00:06.0", f"0000{card.address}")


def _with(xml: str, values: dict[str, str]) -> str:
    for tag, value in values.items():
        xml, found = re.subn(f"(<{tag}>)[^<]*", rf"\g<1>{value}", xml, count=1)
        assert found, tag
    return xml


def archive_packages(branch: str, version: str, system: System) -> str:
    """The `packages` fact with Ubuntu's compute-only driver and its prebuilt open modules."""
    userland = ("libnvidia-cfg1", "libnvidia-compute", "nvidia-compute-utils", "nvidia-kernel-common", "nvidia-utils")
    named = [f"{name}-{branch}-server" for name in userland] + [f"nvidia-headless-no-dkms-{branch}-server-open"]
    modules = [f"linux-modules-nvidia-{branch}-server-open-{kernel}" for kernel in (system.kernel, "generic")]
    driver = [f"{name} {version}-0ubuntu0.24.04.1 ii" for name in named]
    return "\n".join([system.packages, *driver, *(f"{name} {system.version} ii" for name in modules)])


# --- machines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """One machine; `facts` are raw captures in runtime/facts.sh's form, on top of what the other fields say."""

    system: System
    cpu: str
    cpus: int
    memory_gib: int
    pci: str
    virtualisation: str = "none"
    module: str = "- -"  # version and licence of the nvidia module on disk
    facts: dict[str, str] = field(default_factory=dict)


OPEN = "Dual MIT/GPL"
EFI = {"secure_boot": "0"}

H100 = Card("0000:41:00.0", "NVIDIA H100 PCIe", "Hopper", "81559 MiB")
H200 = Card("0000:00:06.0", "NVIDIA H200", "Hopper", "143771 MiB")
GB10 = Card("000f:01:00.0", "NVIDIA GB10", "Blackwell", "N/A", "N/A", "N/A")
RTX_3090 = Card("0000:01:00.0", "NVIDIA GeForce RTX 3090", "Ampere", "24576 MiB", "N/A", "N/A")
RTX_4070 = Card("0000:01:00.0", "NVIDIA GeForce RTX 4070", "Ada Lovelace", "12282 MiB", "N/A", "N/A")

MACHINES = {
    # GeForce cards
    "gtx-1080": Machine(JAMMY, CORE, 8, 32, geforce("1b80", "10f0", "nouveau")),
    "rtx-3060": Machine(NOBLE, RYZEN, 16, 32, geforce("2504", "228e"), facts=EFI),
    "rtx-4090": Machine(NOBLE_HWE, RYZEN, 32, 64, geforce("2684", "22ba", "nouveau"), facts=EFI),
    "rtx-5090": Machine(RESOLUTE, RYZEN, 32, 96, geforce("2b85", "22e8"), facts=EFI),
    "two-rtx-3090": Machine(
        NOBLE,
        CORE,
        24,
        128,
        "0000:00:02.0 0x8086 0xa780 0x030000 i915\n"
        + geforce("2204", "1aef")
        + "\n"
        + geforce("2204", "1aef", bus="02"),
        facts=EFI,
    ),
    # cards of servers, and of rented virtual machines
    "kepler": Machine(JAMMY, SKYLAKE, 32, 128, accelerators("102d", "0000:05:00.0", "0000:06:00.0") + "\n" + ASPEED),
    "v100": Machine(JAMMY, SKYLAKE, 32, 192, accelerators("1db4", "0000:3b:00.0") + "\n" + ASPEED),
    "t4": Machine(NOBLE_GCP, SKYLAKE, 4, 15, accelerators("1eb8", "0000:00:04.0"), "google", facts=EFI),
    "a10g": Machine(
        JAMMY_AWS,
        EPYC,
        8,
        32,
        "0000:00:03.0 0x1d0f 0x1111 0x030000 none\n" + accelerators("2237", "0000:00:1e.0"),
        "kvm",
    ),
    "a100": Machine(BOOKWORM, EPYC, 64, 256, accelerators("20b5", "0000:41:00.0") + "\n" + ASPEED, facts=EFI),
    "h100": Machine(
        NOBLE,
        EPYC,
        64,
        512,
        accelerators("2331", H100.address, driver="nvidia") + "\n" + ASPEED,
        module=f"580.178.04 {OPEN}",
        facts={
            **EFI,
            "packages": archive_packages("580", "580.178.04", NOBLE),
            "nvidia": "loaded=580.178.04\nmodules=open\nuser_space=580.178.04",
            "nvidia_smi": nvidia_smi("580.178.04", "13.0", H100),
        },
    ),
    "h200": Machine(
        NOBLE,
        XEON,
        16,
        128,
        accelerators("2335", H200.address, driver="nvidia"),
        "kvm",
        module=f"580.159.04 {OPEN}",
        facts={
            **EFI,
            "packages": archive_packages("580", "580.159.04", NOBLE),
            "nvidia": "loaded=580.159.04\nmodules=open\nuser_space=580.159.04",
            "nvidia_smi": nvidia_smi("580.159.04", "13.0", H200),
        },
    ),
    "mixed-generations": Machine(
        NOBLE,
        SKYLAKE,
        64,
        384,
        accelerators("1db4", "0000:3b:00.0") + "\n" + accelerators("2331", "0000:86:00.0") + "\n" + ASPEED,
        facts=EFI,
    ),
    # eight GPUs and their switches: of NVLink 3 on the PCI bus, of NVLink 5 behind InfiniBand ports
    "a100-hgx": Machine(
        NOBLE,
        EPYC,
        128,
        1024,
        accelerators("20b2", *HGX) + "\n" + A100_SWITCHES,
        facts={**EFI, "nvswitches": "6"},
    ),
    "b200-hgx": Machine(NOBLE, XEON, 224, 2048, accelerators("2901", *HGX), facts={**EFI, "nvswitches": "4"}),
    # what is no plain server
    "gb10": Machine(
        NOBLE_DGX,
        GRACE,
        20,
        119,
        accelerators("2e12", GB10.address, driver="nvidia"),
        module=f"580.159.04 {OPEN}",
        facts={
            **EFI,
            "platform": "dgx",
            "packages": NOBLE_DGX.packages + "\nnvidia-utils-580 580.159.04-0ubuntu0.24.04.1 ii",
            "nvidia": "loaded=580.159.04\nmodules=open\nuser_space=580.159.04",
            "nvidia_smi": nvidia_smi("580.159.04", "13.0", GB10),
        },
    ),
    "jetson-orin": Machine(
        JAMMY_TEGRA,
        CORTEX,
        12,
        61,
        "",
        module="540.4.0 Dual MIT/GPL",
        facts={
            "platform": "jetson",
            "packages": "",
            "nvidia": "loaded=540.4.0\nmodules=open",
        },
    ),
    "wsl": Machine(
        NOBLE_WSL,
        RYZEN,
        32,
        32,
        "6d1f:00:00.0 0x1414 0x008e 0x030200 dxgkrnl",
        "wsl",
        facts={
            "platform": "wsl",
            "kernels": "",
            "packages": "",
            "nvidia_smi": nvidia_smi("581.80", "13.0", RTX_4070),
        },
    ),
    "runfile": Machine(
        NOBLE,
        CORE,
        16,
        64,
        geforce("2204", "1aef", "nvidia"),
        module="550.144.03 NVIDIA",
        facts={
            **EFI,
            "platform": "runfile",
            "nvidia": "loaded=550.144.03\nmodules=closed\nuser_space=550.144.03",
            "nvidia_smi": nvidia_smi("550.144.03", "12.4", RTX_3090),
        },
    ),
    "vfio": Machine(NOBLE, RYZEN, 32, 128, geforce("2204", "1aef", "vfio-pci") + "\n" + ASPEED, facts=EFI),
    "none": Machine(TRIXIE, EPYC, 4, 16, "0000:00:01.0 0x1234 0x1111 0x030000 bochs-drm", "kvm"),
}
