"""The driver a host gets, by example for every rule, for recorded machines, and for any PCI id."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmhost import openpgp
from llmhost.catalogue import ROOT, card, drivers, locks
from llmhost.hardware import Hardware
from llmhost.plan.containers import plan_containers
from llmhost.plan.driver import WHEELS_CUDA, accelerator_of, plan_driver
from llmhost.plan.host import downloads, plan
from llmhost.plan.model import ContainersPlan, Decision, DriverPlan, HostPlan, Problem, hash_of
from llmhost.plan.notes import Notes
from llmhost.settings import Layer, Settings, load
from tests.recorded import MACHINES, OS_RELEASES, bare, disks, machine, recorded_h200
from tests.recorded.machines import H200, RTX_3090, nvidia_smi

GOLDEN = ROOT / "tests/plan/golden/drivers"
BRANCHES = tuple(drivers().branches)
TABLE = [line.split("\t") for line in (ROOT / "tests/recorded/gpu_pci_arch.tsv").read_text().splitlines()[1:]]

NOBLE = {"os_release": OS_RELEASES["Ubuntu 24.04"], "kernel": "6.8.0-149-generic"}
GENERIC = "linux-image-generic 6.8.0-149.149 ii"
TWO_CUDA = (
    "/etc/apt/sources.list.d/cuda-ubuntu2404-x86_64.list https://developer.download.nvidia.com/compute/cuda/repos"
)


@dataclass(frozen=True)
class Outcome:
    """What was planned, and what was written down on the way."""

    driver: DriverPlan | None
    containers: ContainersPlan | None
    decisions: tuple[Decision, ...]
    problems: tuple[Problem, ...]

    def value(self, setting: str) -> Any:
        return next(d.value for d in self.decisions if d.setting == setting)

    def reason(self, setting: str) -> str:
        return next(d.reason for d in self.decisions if d.setting == setting)


def outcome(hardware: Hardware, **data: Any) -> Outcome:
    loaded = load([Layer("group_data/all.py", data)])
    notes = Notes(loaded)
    driver = plan_driver(loaded.settings, hardware, accelerator_of(loaded.settings, hardware), notes)
    containers = plan_containers(loaded.settings, hardware, driver, notes)
    return Outcome(driver, containers, tuple(notes.decisions), tuple(notes.problems))


def driver_of(hardware: Hardware, **data: Any) -> DriverPlan:
    found = outcome(hardware, **data)
    assert found.problems == ()
    assert found.driver
    return found.driver


def containers_of(hardware: Hardware, **data: Any) -> ContainersPlan:
    found = outcome(hardware, **data)
    assert found.problems == ()
    assert found.containers
    return found.containers


def refusal(hardware: Hardware, **data: Any) -> Problem:
    found = outcome(hardware, **data)
    assert found.driver is None
    (problem,) = found.problems
    return problem


def pci(*devices: str, driver: str = "none") -> str:
    return "\n".join(
        f"0000:{number:02x}:00.0 0x10de 0x{device} 0x030200 {driver}" for number, device in enumerate(devices, start=1)
    )


def noble(*devices: str, driver: str = "none", **changes: str) -> Hardware:
    """An Ubuntu 24.04 host with its own kernel and these GPUs."""
    facts = {**NOBLE, "pci": pci(*devices, driver=driver), "packages": GENERIC, "kernels": "6.8.0-149-generic - -"}
    return bare(**{**facts, "virtualisation": "none", **changes})


def debian(version: int, *devices: str, **changes: str) -> Hardware:
    kernel = {12: "6.1.0-49-amd64", 13: "6.12.94+deb13-amd64"}[version]
    facts = {"os_release": OS_RELEASES[f"Debian {version}"], "kernel": kernel, "pci": pci(*devices)}
    return bare(**{**facts, "packages": "linux-image-amd64 6.1.174-1 ii", "kernels": f"{kernel} - -", **changes})


def archive(version: str, *, held: str = "") -> str:
    """Ubuntu's packages of a driver, some of them on hold."""
    branch = version.partition(".")[0]
    names = (f"nvidia-utils-{branch}-server", f"libnvidia-compute-{branch}-server")
    lines = [f"{name} {version}-0ubuntu0.24.04.1 {'hi' if name.startswith(held or '-') else 'ii'}" for name in names]
    return "\n".join([GENERIC, *lines])


# --- recorded machines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_golden_drivers(name: str, request: pytest.FixtureRequest) -> None:
    """Reviewed line by line; rewrite with `pytest tests/plan --golden`, and review the difference."""
    text = json.dumps(dataclasses.asdict(outcome(machine(name))), indent=1) + "\n"
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--golden"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_every_golden_driver_has_its_machine() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(MACHINES)


# --- which cards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "generation"), TABLE, ids=[row[0] for row in TABLE])
def test_the_rule_agrees_with_every_known_card(device: str, generation: str) -> None:
    found = card(f"0x{device.lower()}")
    assert found.generation.name == generation
    assert found.open == (int(device, 16) >= 0x1E00)


def test_the_oldest_branch_is_that_of_the_wheels_that_hosts_get() -> None:
    assert {lock.least_branch for lock in locks() if lock.accelerator == "nvidia"} == {
        drivers().least_branch[WHEELS_CUDA]
    }


def test_every_living_branch_runs_the_wheels() -> None:
    assert all(int(name) >= int(drivers().least_branch[WHEELS_CUDA]) for name in BRANCHES)


def test_the_ranges_of_ids_do_not_overlap_and_name_generations() -> None:
    table = tomllib.loads((ROOT / "llmhost/catalog/gpus.toml").read_text())
    ranges = table["ranges"]
    assert all(row["first"] <= row["last"] for row in ranges)
    assert all(one["last"] < other["first"] for one, other in pairwise(ranges))
    assert {row["generation"] for row in ranges} | {"unknown"} == set(table["generations"])
    assert set(table["needs_branch"].values()) <= set(BRANCHES)
    assert len(table["cards"]) >= 60


def test_the_branches_that_settings_allow_are_those_of_the_catalogue() -> None:
    assert tuple(drivers().branches) == BRANCHES
    assert {name: row.version for name, row in drivers().branches.items()} == PINNED


def test_the_table_of_known_cards_is_whole() -> None:
    assert len(TABLE) == 455


@pytest.mark.parametrize(
    ("device", "name", "memory_gib", "capability"),
    [
        ("2504", "NVIDIA GeForce RTX 3060", 12, "8.6"),
        ("20b5", "NVIDIA A100 80GB PCIe", 80, "8.0"),
        ("20b7", "NVIDIA A30", 24, "8.0"),
        ("20f1", "NVIDIA A100-PCIE-40GB", 40, "8.0"),
        ("2237", "NVIDIA A10G", 24, "8.6"),
        ("2335", "NVIDIA H200", 141, "9.0"),
        ("2684", "NVIDIA GeForce RTX 4090", 24, "8.9"),
        ("2901", "NVIDIA B200", 180, "10.0"),
        ("2b85", "NVIDIA GeForce RTX 5090", 32, "12.0"),
        ("2e12", "NVIDIA GB10", 128, "12.1"),
        ("3182", "NVIDIA B300 SXM6 AC", 288, "10.3"),
        ("2182", "", None, "7.5"),
    ],
)
def test_cards_are_known_by_id(device: str, name: str, memory_gib: int | None, capability: str) -> None:
    found = card(f"0x{device}")
    assert (found.name, found.memory_gib, found.capability) == (name, memory_gib, capability)


@given(st.integers(0, 0xFFFF))
def test_closed_modules_are_denied_by_rule_and_open_ones_allowed_to_all_others(device: int) -> None:
    found = card(f"0x{device:04x}")
    assert found.open == (device >= 0x1E00)
    assert device >= 0x1340 or not found.closed
    assert device < 0x1340 or found.open or found.closed


@given(st.integers(0, 0xFFFF))
def test_any_id_is_planned_by_the_rule(device: int) -> None:
    found = outcome(noble(f"{device:04x}"), accelerator="cpu", driver_source="ubuntu-archive")
    if device < 0x1340:
        assert found.driver is None
        assert [p.setting for p in found.problems] == ["gpu"]
    else:
        assert found.driver
        assert found.driver.modules == ("open" if device >= 0x1E00 else "closed")
        assert device >= 0x1E00 or found.driver.branch == "580"


def test_an_unknown_card_gets_open_modules_and_is_called_one() -> None:
    found = outcome(noble("5abc"))
    assert found.driver
    assert (found.driver.modules, found.driver.branch, found.driver.generation) == ("open", "580", "unknown")
    assert found.value("gpus") == "1 x an unknown card (10de:5abc), unknown"
    assert "unknown card" in found.reason("driver_modules")
    assert "may need 595 or 615" in found.reason("driver_branch")
    assert "unknown" not in outcome(noble("2204")).reason("driver_branch")


# --- any host ---------------------------------------------------------------------------------------------------

KERNELS = ["6.8.0-149-generic", "6.8.0-1045-aws", "7.2.0-070200-generic", "6.1.0-49-amd64", "6.9-xanmod1", "x"]
PACKAGES = [
    GENERIC,
    "linux-image-aws 6.8.0-1 ii",
    archive("580.178.04"),
    archive("535.261.03", held="nvidia"),
    "nvidia-driver-550 550.54.14-0ubuntu0~gpu24.04.1 ii",
    "libcuda1 595.91.07-1 ii\ndocker-ce 5:29.8.0-1 ii",
    "nvidia-kernel-dkms strange iU",
    "",
]
STATES = [
    "",
    "loaded=580.178.04\nmodules=open\nuser_space=580.178.04\nmanaged=ubuntu-archive",
    "loaded=535.1\nmodules=closed",
    "user_space=595.91.07\nmanaged=cuda-repository",
]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 0xFFFF).map("{:04x}".format), max_size=3),
    bound=st.sampled_from(["none", "nouveau", "nvidia", "vfio-pci"]),
    facts=st.fixed_dictionaries(
        {
            "os_release": st.sampled_from(sorted(OS_RELEASES.values())),
            "kernel": st.sampled_from(KERNELS),
            "kernels": st.sampled_from(["", *(f"{kernel} - -" for kernel in KERNELS)]),
            "machine": st.sampled_from(["x86_64", "aarch64", "riscv64"]),
            "virtualisation": st.sampled_from(["none", "kvm", "docker", "lxc", "wsl"]),
            "platform": st.sampled_from(["", "wsl", "dgx", "jetson", "runfile"]),
            "packages": st.sampled_from(PACKAGES),
            "nvidia": st.sampled_from(STATES),
            "secure_boot": st.sampled_from(["", "0", "1"]),
            "nvswitches": st.sampled_from(["0", "6"]),
            "docker": st.sampled_from(["", "server=29.1.3\ncompose=2.40", "server=20.10", "snap=yes"]),
            "apt": st.sampled_from(["", f"{TWO_CUDA}/", "/etc/apt/sources.list.d/cuda.list file:///var/cuda-repo"]),
        }
    ),
    data=st.fixed_dictionaries(
        {
            "accelerator": st.sampled_from(["auto", "cpu", "nvidia"]),
            "driver_source": st.sampled_from(["auto", "none", "installed", "ubuntu-archive", "cuda-repository"]),
            "driver_branch": st.sampled_from(BRANCHES),
            "driver_modules": st.sampled_from(["auto", "open", "closed"]),
            "cuda_toolkit": st.sampled_from(["none", "venv", "system"]),
            "cuda_toolkit_version": st.sampled_from(["12.4", "13.0", "13.3"]),
            "docker_source": st.sampled_from(["auto", "none", "installed", "docker-ce", "distribution"]),
        }
    ),
)
def test_any_host_is_planned_or_refused_in_words(
    ids: list[str], bound: str, facts: dict[str, str], data: dict[str, str]
) -> None:
    found = outcome(bare(pci=pci(*ids, driver=bound), **facts), **data)
    assert all(d.reason.strip() for d in found.decisions)
    assert all(p.message.strip() and p.remedy.strip() for p in found.problems)
    assert len({(d.concern, d.setting) for d in found.decisions}) == len(found.decisions)
    if found.driver and found.driver.source != "installed":
        assert not (found.driver.modules == "closed" and any(not card(f"0x{i}").closed for i in ids))
        assert not (found.driver.modules == "open" and any(not card(f"0x{i}").open for i in ids))
        assert found.driver.modules in drivers().branches[found.driver.branch].modules
        assert "runfile" not in facts["platform"]
        assert found.driver.prebuilt or facts["secure_boot"] != "1"


# --- whether ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "data", "words"),
    [
        (bare(), {}, "has no NVIDIA GPU"),
        (bare(), {"driver_source": "ubuntu-archive"}, "(set in group_data/all.py) has no effect"),
        (noble("2504"), {"accelerator": "cpu"}, "runs on the CPU"),
        (noble("2504"), {"accelerator": "cpu", "driver_source": "none"}, "set in group_data/all.py"),
        (machine("wsl"), {"accelerator": "cpu"}, "runs on the CPU"),
    ],
)
def test_no_driver_where_none_is_wanted(hardware: Hardware, data: dict[str, Any], words: str) -> None:
    found = outcome(hardware, **data)
    assert (found.driver, found.containers, found.problems) == (None, None, ())
    assert found.value("driver_source") == "none"
    assert words in found.reason("driver_source")


def test_a_driver_that_is_asked_for_is_provisioned_for_an_engine_on_the_cpu_too() -> None:
    assert driver_of(noble("2504"), accelerator="cpu", driver_source="ubuntu-archive").source == "ubuntu-archive"
    assert driver_of(noble("1b80"), accelerator="cpu", driver_source="ubuntu-archive").modules == "closed"


# --- refusals ---------------------------------------------------------------------------------------------------

RUNFILE = {"platform": "runfile", "nvidia": "loaded=580.95.05\nmodules=open\nuser_space=580.95.05"}
CPU = {"accelerator": "cpu", "driver_source": "ubuntu-archive"}
PPA = "/etc/apt/sources.list.d/ppa.sources https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu"
LOCAL = "/etc/apt/sources.list.d/cuda-ubuntu2404-13-0-local.list file:///var/cuda-repo-ubuntu2404-13-0-local"


@pytest.mark.parametrize(
    ("hardware", "data", "setting", "words", "remedy"),
    [
        # cards
        (noble("1db4"), {}, "accelerator", "Tesla V100 PCIe 16GB (10de:1db4), volta: current vLLM needs", '"cpu"'),
        (noble("1b80"), {}, "accelerator", "7.5, this has 6.1", "Turing"),
        (
            noble("102d"),
            CPU,
            "gpu",
            "Tesla K80 (10de:102d), kepler-or-older: no living driver",
            'driver_source = "none"',
        ),
        (noble("2204", driver="vfio-pci"), {}, "gpu", "0000:01:00.0 is bound to vfio-pci", "virtual machine"),
        (noble("1db4", "2b85"), {}, "gpu", "mixed generations: NVIDIA Tesla V100", "Take one of the two out"),
        (noble("1db4", "2204"), {}, "gpu", "mixed generations", 'driver_modules = "closed" and accelerator = "cpu"'),
        (machine("jetson-orin"), {}, "machine", "JetPack", "JetPack containers"),
        # modules and branch
        (noble("2b85"), {"driver_modules": "closed"}, "driver_modules", "runs with open modules only", '"open"'),
        (noble("2342"), {"driver_modules": "closed"}, "driver_modules", "GH200", '"open"'),
        (noble("1db4"), {**CPU, "driver_modules": "open"}, "driver_modules", "closed modules only", '"closed"'),
        (
            noble("1b80"),
            {**CPU, "driver_branch": "595"},
            "driver_branch",
            "last branch for NVIDIA GeForce GTX 1080",
            "580",
        ),
        (noble("2c3a"), {"driver_branch": "580"}, "driver_branch", "(10de:2c3a), blackwell needs 615", "to 615"),
        (noble("2909"), {"driver_branch": "595"}, "driver_branch", "needs 615", "to 615"),
        (
            noble("2204"),
            {"driver_modules": "closed", "driver_branch": "615"},
            "driver_modules",
            "branch 615 has open modules only",
            "driver_branch to 595",
        ),
        (debian(12, "2204"), {"driver_branch": "615"}, "driver_branch", "was not seen to have", "580 or 595"),
        # sources
        (noble("2204"), {"driver_source": "none"}, "driver_source", "needs a driver", '"auto"'),
        (debian(13, "2204"), {"driver_source": "ubuntu-archive"}, "driver_source", "runs Debian", '"cuda-repository"'),
        (noble("2204"), {"driver_source": "installed"}, "driver_source", "there is no driver", '"auto"'),
        (
            noble("2204", nvidia="loaded=580.1\nuser_space=580.1"),
            {"driver_source": "installed"},
            "driver_source",
            "driver 580.1 is there, but nvidia-smi gives no answer",
            '"auto"',
        ),
        (machine("runfile"), {}, "driver", ".run file", "nvidia-uninstall"),
        (
            machine("runfile"),
            {"driver_source": "installed"},
            "driver_source",
            "driver 550.144.03 is older than branch 580, which wheels for CUDA 13 need",
            "nvidia-uninstall",
        ),
        # whose driver is another's
        (noble("2204", virtualisation="lxc"), {}, "driver_source", "there is no driver", "on that machine"),
        (noble("2204", virtualisation="docker"), CPU, "driver_source", "a container uses the driver", '"installed"'),
        (noble("2204", platform="dgx"), {}, "driver_source", "there is no driver", "DGX OS"),
        (machine("wsl"), CPU, "driver_source", "Windows brings the driver", '"installed"'),
        (debian(13, "2204", machine="aarch64"), {}, "driver_source", "has no packages for aarch64", "Use Ubuntu"),
        # a driver of other hands that gives no answer
        (
            noble("2204", nvidia="loaded=580.1\nuser_space=580.2", packages=archive("580.2")),
            {},
            "driver",
            "no answer: module 580.1 is loaded, libraries 580.2 are installed",
            'driver_source = "ubuntu-archive"',
        ),
        (
            noble("2204", kernels="6.8.0-149-generic 580.2 Dual MIT/GPL"),
            {},
            "driver",
            "580.2 lies on disk for 6.8.0-149-generic",
            "a reboot may do",
        ),
        (debian(12, "2204", nvidia="user_space=550.1"), {}, "driver", "libraries 550.1", '"cuda-repository"'),
        # a card that fell off the bus
        (
            noble(nvidia="managed=ubuntu-archive"),
            {},
            "gpu",
            "the GPU that was provisioned is gone",
            'accelerator = "cpu"',
        ),
        # MIG
        (
            machine("h200", nvidia_smi=nvidia_smi("580.159.04", "13.0", dataclasses.replace(H200, mig="Enabled"))),
            {},
            "gpu",
            "MIG is enabled on 0000:00:06.0, which llmhost does not support yet",
            "nvidia-smi -mig 0",
        ),
        # secure boot
        (debian(13, "2204", secure_boot="1"), {}, "secure boot", "console", "firmware"),
        (
            noble("2204", secure_boot="1"),
            {"driver_source": "cuda-repository"},
            "secure boot",
            "confirm on the console",
            'driver_source = "ubuntu-archive"',
        ),
        (
            noble("2204", secure_boot="1", kernel="6.9.3-x64v3-xanmod1", kernels=""),
            {},
            "secure boot",
            "(MOK)",
            "linux-image-generic",
        ),
        # kernels
        (
            noble("2204", kernel="6.8.0-1045-aws", kernels=""),
            {},
            "kernel",
            "6.8.0-1045-aws runs, but the kernel that the host keeps current is generic",
            "install linux-image-aws",
        ),
        (
            noble("2204", kernels="6.8.0-149-generic - -\n7.2.0-070200-generic - -"),
            {},
            "kernel",
            "the newest kernel installed is 7.2.0-070200-generic, of another flavour",
            "Reboot into 7.2.0-070200-generic first, or remove it",
        ),
        # two origins
        (noble("2204", apt=PPA), {}, "driver_source", "graphics-drivers PPA", "add-apt-repository --remove"),
        (noble("2204", apt=LOCAL), {}, "driver_source", "local repository (file:///var", "apt-get purge 'cuda-repo-*'"),
        (
            noble("2204", packages="nvidia-driver-550 550.54.14-0ubuntu0~gpu24.04.1 ii"),
            {},
            "driver_source",
            "from the graphics-drivers PPA are installed (nvidia-driver-550), and Ubuntu's archive",
            "apt-get purge nvidia-driver-550",
        ),
        (
            noble("2204", packages="nvidia-dkms-open 595.91.07-1ubuntu1 ii", apt=f"{TWO_CUDA}/ubuntu2404/x86_64/"),
            {"driver_source": "ubuntu-archive"},
            "driver_source",
            "driver packages from NVIDIA's repository are installed",
            'driver_source = "cuda-repository"',
        ),
        (
            noble("2204", packages=archive("580.178.04")),
            {"driver_source": "cuda-repository"},
            "driver_source",
            "driver packages from Ubuntu's archive are installed",
            'driver_source = "ubuntu-archive"',
        ),
        (
            debian(12, "2204", packages="nvidia-kernel-dkms 535.261.03-1~deb12u1 ii\nlibcuda1 535.261.03-1~deb12u1 ii"),
            {},
            "driver_source",
            "from Debian's archive are installed (nvidia-kernel-dkms, libcuda1), and NVIDIA's repository is planned",
            "apt-get purge nvidia-kernel-dkms libcuda1",
        ),
        # holds
        (
            noble("2204", packages=archive("535.261.03", held="nvidia-utils")),
            {},
            "driver_branch",
            "is 580, but packages of another branch are on hold: nvidia-utils-535-server",
            "apt-mark unhold nvidia-utils-535-server",
        ),
        (
            noble("2204", packages="linux-modules-nvidia-535-server-open-generic 6.8.0-149.149 hi"),
            {},
            "driver_branch",
            "on hold: linux-modules-nvidia-535-server-open-generic",
            "apt-mark unhold",
        ),
        (
            noble("2204", packages="linux-image-generic 6.8.0-149.149 hi"),
            {},
            "kernel",
            "the kernel's packages are on hold: linux-image-generic",
            "apt-mark unhold linux-image-generic",
        ),
        (
            noble("2204", packages=f"{GENERIC}\nlinux-generic 6.8.0-149.149 hi"),
            {},
            "kernel",
            "on hold: linux-generic",
            "apt-mark unhold linux-generic",
        ),
        # CUDA
        (
            noble("2204"),
            {"cuda_toolkit": "venv", "cuda_toolkit_version": "13.1"},
            "cuda_toolkit_version",
            "is 13.1, but the driver runs CUDA 13.0 at most",
            "Set cuda_toolkit_version to 13.0, or driver_branch to 595",
        ),
        (
            noble("2204"),
            {"cuda_toolkit": "venv", "cuda_toolkit_version": "13.9", "driver_branch": "615"},
            "cuda_toolkit_version",
            "CUDA 13.3 at most",
            "Set cuda_toolkit_version to 13.3",
        ),
        (
            noble("2204"),
            {"cuda_toolkit": "system", "cuda_toolkit_version": "13.9", "driver_branch": "615"},
            "cuda_toolkit_version",
            "is 13.9, which NVIDIA's repository for Ubuntu 24.04.3 LTS is not known to have",
            "13.0, 13.1, 13.2",
        ),
        (
            noble("2204"),
            {"cuda_toolkit": "system", "cuda_toolkit_version": "12.4"},
            "cuda_toolkit_version",
            "is not known to have",
            "to one of 12.5, 12.6, 12.7, 12.8, 12.9, 13.0",
        ),
        (
            noble("2b85"),
            {"cuda_toolkit": "system", "cuda_toolkit_version": "12.6"},
            "cuda_toolkit_version",
            "whose compiler does not know NVIDIA GeForce RTX 5090",
            "12.8 or newer",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(
    hardware: Hardware, data: dict[str, Any], setting: str, words: str, remedy: str
) -> None:
    problem = refusal(hardware, **data)
    assert problem.setting == setting
    unset = "default" if setting in Settings.model_fields else "the host"
    assert problem.source == ("group_data/all.py" if setting in data else unset)
    assert words in problem.message
    assert remedy in problem.remedy


# --- sources ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "source"), [("Ubuntu", "ubuntu-archive"), ("Debian", "cuda-repository")])
def test_auto_takes_the_archive_on_ubuntu_and_nvidias_repository_on_debian(system: str, source: str) -> None:
    for name in (name for name in OS_RELEASES if name.startswith(system) and name != "Debian 11"):
        kernel = "6.8.0-149-generic" if system == "Ubuntu" else "6.1.0-49-amd64"
        found = driver_of(bare(os_release=OS_RELEASES[name], kernel=kernel, pci=pci("2204")))
        assert (found.source, found.prebuilt) == (source, system == "Ubuntu")


def test_why_debian_does_not_use_its_own_drivers_is_said() -> None:
    reason = outcome(debian(12, "2204")).reason("driver_source")
    assert "535 in 12, 550 in 13" in reason
    assert "580" in reason


def test_a_driver_that_was_there_and_will_do_is_kept() -> None:
    found = driver_of(machine("h100"))
    assert (found.source, found.version, found.packages, found.repositories) == ("installed", "580.178.04", (), ())
    assert {"^nvidia-", "^linux-(image|headers|modules|objects|signatures)-"} < set(found.frozen)


@pytest.mark.parametrize(
    "data", [{"driver_branch": "595"}, {"driver_modules": "closed"}, {"driver_source": "ubuntu-archive"}]
)
def test_a_driver_that_is_not_what_was_asked_for_is_not_kept(data: dict[str, str]) -> None:
    assert driver_of(machine("h100"), **data).source == "ubuntu-archive"


def test_a_driver_that_llmhost_provisioned_is_provisioned_again() -> None:
    managed = machine("h100", nvidia="loaded=580.178.04\nmodules=open\nuser_space=580.178.04\nmanaged=ubuntu-archive")
    assert driver_of(managed).source == "ubuntu-archive"


def test_a_managed_host_is_not_refused_for_what_its_repository_brought_along() -> None:
    brought = "nvidia-modprobe 535.54.03-1~deb12u1 ii\nnvidia-settings 510.47.03-0ubuntu4 ii"
    assert driver_of(debian(12, "2204", packages=brought, nvidia="managed=cuda-repository")).source == "cuda-repository"


@pytest.mark.parametrize("status", ["rc", "un"])
def test_what_a_removed_driver_left_is_no_driver_that_gives_no_answer(status: str) -> None:
    left = f"{GENERIC}\nnvidia-utils-550 550.163.01-0ubuntu0.24.04.1 {status}"
    assert driver_of(noble("2204", packages=left)).source == "ubuntu-archive"


def test_a_driver_of_other_hands_that_gives_no_answer_is_replaced_on_request_only() -> None:
    dead = noble("2204", nvidia="loaded=580.1\nmodules=open\nuser_space=580.1", packages=archive("580.1"))
    assert driver_of(dead, driver_source="ubuntu-archive").source == "ubuntu-archive"
    # Ours may be half-way: it is provisioned again.
    ours = noble("2204", nvidia="loaded=580.1\nmodules=open\nuser_space=580.1\nmanaged=ubuntu-archive")
    assert driver_of(ours).source == "ubuntu-archive"


def test_a_host_whose_gpu_is_gone_goes_on_without_one_on_request() -> None:
    gone = noble(nvidia="managed=ubuntu-archive")
    assert outcome(gone, accelerator="cpu").problems == ()
    assert outcome(gone, accelerator="cpu").driver is None


@pytest.mark.parametrize("hardware", [debian(13, "2204", secure_boot="1", mok="enrolled")])
def test_a_key_that_the_firmware_trusts_needs_nobody_at_the_console(hardware: Hardware) -> None:
    assert not driver_of(hardware).prebuilt
    assert "mokutil --import" in refusal(dataclasses.replace(hardware, mok_enrolled=False)).remedy


def test_a_local_repository_of_other_things_is_no_second_origin() -> None:
    local = "/etc/apt/sources.list.d/docker.list file:///srv/docker"
    assert driver_of(noble("2204", apt=local)).source == "ubuntu-archive"


@pytest.mark.parametrize(("system", "contrib"), [("Debian", ("contrib",)), ("Ubuntu", ())])
def test_nvidias_packages_for_debian_need_contrib(system: str, contrib: tuple[str, ...]) -> None:
    data = {"accelerator": "cpu", "driver_source": "cuda-repository"}
    found = planned(debian(12, "2204") if system == "Debian" else noble("2204"), **data)
    assert found.base and found.base.apt_components == contrib
    assert [d.value for d in found.decisions if d.setting == "apt_components"] == list(contrib)
    bare_host = planned(bare())
    assert bare_host.base and bare_host.base.apt_components == ()


@pytest.mark.parametrize("name", ["nvidia-container-toolkit-base", "libnvidia-container-tools", "libnvidia-container1"])
def test_what_keeps_a_driver_out_does_not_name_the_container_toolkit(name: str) -> None:
    """apt takes the first entry that names a package: an entry of -1 would leave the toolkit no candidate."""
    for hardware, data in ((machine("b200-hgx"), {}), (noble("2204"), {"driver_source": "cuda-repository"})):
        for pin in driver_of(hardware, **data).pins:
            assert not any(fnmatch(name, glob) for glob in pin.packages.split())


def test_a_removed_driver_is_no_second_origin() -> None:
    removed = "nvidia-driver-550 550.54.14-0ubuntu0~gpu24.04.1 rc"
    assert driver_of(noble("2204", packages=removed)).source == "ubuntu-archive"


def test_a_driver_too_old_from_the_same_archive_gives_way() -> None:
    older = noble(
        "2204",
        packages=archive("535.261.03"),
        nvidia="loaded=535.261.03\nmodules=open\nuser_space=535.261.03",
        nvidia_smi=nvidia_smi("535.261.03", "12.2", RTX_3090),
    )
    found = driver_of(older)
    assert (found.source, found.branch, found.reboot_expected) == ("ubuntu-archive", "580", True)


@pytest.mark.parametrize("name", ["gb10", "h200"])
def test_drivers_of_other_hands_are_used_as_they_are(name: str) -> None:
    assert driver_of(machine(name)).source == "installed"


def test_the_record_of_the_real_h200_identifies_no_card() -> None:
    record = (ROOT / "tests/recorded/h200.json").read_text()
    for name in ("serial", "uuid", "pdi", "board_part_number", "chassis_serial_number", "gpu_fabric_guid"):
        values = set(re.findall(rf"<{name}>([^<]*)</{name}>", record))
        assert values and not [value for value in values if re.search("[1-9]", value)], (name, values)


def test_the_real_h200_keeps_its_driver_and_lacks_only_systemd() -> None:
    """It served a completion from the vllm.yaml of this plan (tests/recorded: where and when it was recorded)."""
    (problem,) = planned(recorded_h200()).problems
    assert problem.setting == "init"
    found = planned(recorded_h200(init="systemd"), engine_version="0.26.0")
    assert found.problems == ()
    assert found.driver and found.engine
    assert (found.driver.source, found.driver.version) == ("installed", "580.159.04")
    assert (found.driver.modules, found.driver.generation, found.driver.gpus) == ("open", "hopper", 1)
    assert found.engine.flags["max-model-len"] == "auto"
    assert not found.engine.flags.keys() & {"enforce-eager", "gpu-memory-utilization", "dtype"}


def with_switches(manager: str, **changes: str) -> Hardware:
    """A host with NVSwitches, a driver of other hands, and this package for its fabric."""
    return machine("h100", **{"nvswitches": "4", "packages": f"{GENERIC}\n{manager}", **changes})


@pytest.mark.parametrize("name", ["nvidia-fabricmanager-580", "nvidia-fabricmanager"])
def test_a_driver_that_was_there_is_used_with_the_fabric_manager_of_its_version(name: str) -> None:
    version = str(outcome(machine("h100")).value("driver_version"))
    found = driver_of(with_switches(f"{name} {version}-0ubuntu0.24.04.1 ii"))
    assert (found.source, found.fabric_manager, found.packages) == ("installed", True, ())


@pytest.mark.parametrize(
    "manager",
    [
        "",
        "nvidia-fabricmanager-580 580.65.06-1 ii",
        "nvidia-fabricmanager-580 <version>-1 rc",
        "libnvidia-nscq-580 <version>-1 ii",
    ],
)
@pytest.mark.parametrize("platform", ["", "dgx"])
def test_switches_without_the_fabric_manager_of_the_drivers_version_are_refused(manager: str, platform: str) -> None:
    version = str(outcome(machine("h100")).value("driver_version"))
    problem = refusal(with_switches(manager.replace("<version>", version), platform=platform))
    assert problem.setting == "driver"
    assert f"nvidia-fabricmanager {version}" in problem.message
    assert "4 NVSwitches" in problem.message
    assert f"nvidia-fabricmanager-580={version}-*" in problem.remedy


def test_wsl_uses_the_driver_of_windows() -> None:
    found = driver_of(machine("wsl"))
    assert (found.source, found.version, found.gpus, found.frozen) == ("installed", "581.80", 1, ())
    assert found.generation == "ada"
    assert planned(machine("wsl")).problems == ()


def test_a_container_uses_the_driver_of_its_machine() -> None:
    inside = machine("h200", virtualisation="docker", nvswitches="4")
    found = driver_of(inside)
    assert (found.source, found.fabric_manager, found.frozen) == ("installed", False, ())
    assert outcome(inside).containers is None


def test_a_running_run_file_driver_may_be_kept_on_request() -> None:
    fit = machine("h100", platform="runfile", packages=GENERIC)
    assert 'driver_source = "installed"' in refusal(fit).remedy
    assert driver_of(fit, driver_source="installed").source == "installed"


def test_a_driver_of_another_branch_says_that_the_setting_has_no_effect() -> None:
    found = outcome(machine("h100"), driver_source="installed", driver_branch="595")
    assert found.driver
    assert found.driver.branch == "580"
    assert "driver_branch = 595 has no effect" in found.reason("driver_branch")


# --- packages ---------------------------------------------------------------------------------------------------

PINNED = {"580": "580.178.04", "595": "595.91.07", "615": "615.71.09"}


@pytest.mark.parametrize("branch", BRANCHES)
def test_ubuntu_gets_prebuilt_modules_and_no_compiler(branch: str) -> None:
    found = driver_of(noble("2204", secure_boot="1"), driver_branch=branch)
    assert found.packages == (
        f"nvidia-headless-no-dkms-{branch}-server-open",
        f"nvidia-utils-{branch}-server",
        f"linux-modules-nvidia-{branch}-server-open-generic",
        "linux-image-generic",
    )
    assert (found.version, found.prebuilt, found.blacklist_nouveau) == (PINNED[branch], True, False)
    assert found.repositories == ()


@pytest.mark.parametrize("device", ["1db4", "1b80", "1380"])
def test_cards_before_turing_get_closed_modules_of_580(device: str) -> None:
    found = driver_of(noble(device), **CPU)
    assert (found.branch, found.modules) == ("580", "closed")
    assert "linux-modules-nvidia-580-server-generic" in found.packages
    assert not [name for name in found.packages if "open" in name]


def test_closed_modules_are_a_choice_where_the_card_runs_both() -> None:
    found = outcome(noble("2204"), driver_modules="closed")
    assert found.driver
    assert "linux-modules-nvidia-580-server-generic" in found.driver.packages
    assert found.reason("driver_modules") == "set in group_data/all.py"
    mixed = driver_of(noble("1db4", "2204"), driver_modules="closed", **CPU)
    assert (mixed.branch, mixed.modules, mixed.generation) == ("580", "closed", "ampere + volta")


@pytest.mark.parametrize("device", ["2909", "2c09", "2c3a", "2f06", "31c3"])
def test_cards_that_only_615_knows_get_it(device: str) -> None:
    found = outcome(noble(device))
    assert found.driver
    assert found.driver.branch == "615"
    assert "needs it" in found.reason("driver_branch")


@pytest.mark.parametrize(("version", "kernel"), [(12, "6.1.0-49-cloud-amd64"), (13, "6.12.94+deb13-amd64")])
@pytest.mark.parametrize("branch", ["580", "595"])
def test_debian_gets_the_compute_only_set_of_nvidias_repository(version: int, kernel: str, branch: str) -> None:
    flavour = "cloud-amd64" if "cloud" in kernel else "amd64"
    found = driver_of(debian(version, "2204", kernel=kernel), driver_branch=branch)
    assert found.packages == (
        f"nvidia-driver-pinning-{PINNED[branch]}",
        "nvidia-driver-cuda",
        "nvidia-persistenced",
        "nvidia-kernel-open-dkms",
        "dkms",
        f"linux-image-{flavour}",
        f"linux-headers-{flavour}",
    )
    assert (found.prebuilt, found.blacklist_nouveau, found.pins) == (False, True, ())


def test_debian_gets_closed_modules_for_old_cards() -> None:
    found = driver_of(debian(12, "1db4"), accelerator="cpu", driver_source="cuda-repository")
    assert "nvidia-kernel-dkms" in found.packages


@pytest.mark.parametrize(
    ("branch", "packages"),
    [
        ("580", ("libnvidia-compute-580", "nvidia-utils-580", "nvidia-compute-utils-580", "nvidia-dkms-580-open")),
        ("595", ("libnvidia-compute", "nvidia-persistenced", "nvidia-modprobe", "nvidia-dkms-open")),
    ],
)
def test_ubuntu_with_nvidias_repository_loses_the_branch_from_its_names(branch: str, packages: tuple[str, ...]) -> None:
    found = driver_of(noble("2204"), driver_source="cuda-repository", driver_branch=branch)
    assert found.packages == (
        f"nvidia-driver-pinning-{PINNED[branch]}",
        *packages,
        "zstd",
        "dkms",
        "linux-image-generic",
        "linux-headers-generic",
    )
    (pin,) = found.pins
    assert (pin.pin, pin.priority) == ("release o=Ubuntu", -1)


# --- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "metas", "flavours"),
    [
        ("6.8.0-149-generic", ["linux-image-generic"], ["generic"]),
        ("6.8.0-149-generic", ["linux-virtual"], ["generic"]),
        ("7.0.0-43-generic", ["linux-generic-hwe-24.04"], ["generic-hwe-24.04"]),
        ("7.0.0-43-generic", ["linux-image-virtual-hwe-24.04"], ["generic-hwe-24.04"]),
        # Both are kept current: either may be booted.
        ("6.8.0-149-generic", ["linux-generic", "linux-generic-hwe-24.04"], ["generic", "generic-hwe-24.04"]),
        # No package keeps the kernel current: its series tells.
        ("6.8.0-140-generic", [], ["generic"]),
        ("6.17.0-10-generic", [], ["generic-hwe-24.04"]),
        ("6.8.0-1045-aws", ["linux-aws"], ["aws"]),
        ("6.8.0-1045-azure", ["linux-image-azure"], ["azure"]),
        ("6.17.0-1012-gcp", [], ["gcp"]),
        ("6.8.0-1045-oracle", [], ["oracle"]),
        ("6.8.0-1045-nvidia", ["linux-nvidia"], ["nvidia"]),
    ],
)
def test_prebuilt_modules_follow_the_flavour_of_the_kernel(kernel: str, metas: list[str], flavours: list[str]) -> None:
    packages = "\n".join(f"{meta} 1 ii" for meta in metas)
    found = driver_of(noble("2204", kernel=kernel, kernels=f"{kernel} - -", packages=packages))
    modules = [name for name in found.packages if name.startswith("linux-modules-nvidia")]
    assert modules == [f"linux-modules-nvidia-580-server-open-{flavour}" for flavour in flavours]
    assert found.prebuilt


@pytest.mark.parametrize(
    ("kernel", "metas", "build"),
    [
        ("6.8.0-149-lowlatency", ["linux-lowlatency"], ("linux-image-lowlatency", "linux-headers-lowlatency")),
        (
            "6.17.0-1014-nvidia",
            ["linux-nvidia-hwe-24.04"],
            ("linux-image-nvidia-hwe-24.04", "linux-headers-nvidia-hwe-24.04"),
        ),
        (
            "6.8.0-1045-aws",
            ["linux-image-aws-lts-24.04", "linux-headers-aws-lts-24.04"],
            ("linux-image-aws-lts-24.04", "linux-headers-aws-lts-24.04"),
        ),
        ("6.8.0-1045-aws", ["linux-aws-6.8"], ("linux-image-aws-6.8", "linux-headers-aws-6.8")),
        (
            "6.17.0-10-generic",
            ["linux-generic-hwe-24.04-edge"],
            ("linux-image-generic-hwe-24.04-edge", "linux-headers-generic-hwe-24.04-edge"),
        ),
        ("6.14.0-1010-oem", ["linux-oem-24.04d"], ("linux-image-oem-24.04d", "linux-headers-oem-24.04d")),
        ("6.14.0-1010-oem", [], ("linux-image-oem-24.04", "linux-headers-oem-24.04")),
        ("6.8.0-149-generic-64k", ["linux-generic-64k"], ("linux-image-generic-64k", "linux-headers-generic-64k")),
        (
            "6.17.0-1014-nvidia-64k",
            ["linux-image-nvidia-64k-hwe-24.04"],
            ("linux-image-nvidia-64k-hwe-24.04", "linux-headers-nvidia-64k-hwe-24.04"),
        ),
        # A flavour of Ubuntu's that no row knows: its headers' meta package, where there is one.
        ("6.8.0-1010-intel", ["linux-headers-intel"], ("linux-headers-intel",)),
        ("6.8.0-1010-intel", [], ("linux-headers-6.8.0-1010-intel",)),
        ("7.2.0-070200-generic", ["linux-generic"], ("linux-headers-7.2.0-070200-generic",)),
        ("6.9.3-x64v3-xanmod1", [], ("linux-headers-6.9.3-x64v3-xanmod1",)),
        ("6.18.44-fc-v657", [], ("linux-headers-6.18.44-fc-v657",)),
    ],
)
def test_other_kernels_have_modules_built(kernel: str, metas: list[str], build: tuple[str, ...]) -> None:
    packages = "\n".join(f"{meta} 1 ii" for meta in metas)
    found = driver_of(noble("2204", kernel=kernel, kernels=f"{kernel} - -", packages=packages))
    assert not found.prebuilt
    assert found.packages[2:] == ("nvidia-dkms-580-server-open", "dkms", "zstd", *build)


@pytest.mark.parametrize(
    ("kernel", "metas", "keep"),
    [
        ("6.8.0-149-generic", ["linux-image-generic"], ["linux-image-generic"]),
        ("6.8.0-149-generic", ["linux-virtual"], ["linux-image-virtual"]),
        (
            "6.8.0-149-generic",
            ["linux-generic", "linux-headers-generic"],
            ["linux-image-generic", "linux-headers-generic"],
        ),
        # Headers are those of one kernel only: their meta package keeps them in step from now on.
        (
            "6.8.0-149-generic",
            ["linux-image-generic", "linux-headers-6.8.0-149-generic"],
            ["linux-image-generic", "linux-headers-generic"],
        ),
        ("7.0.0-43-generic", ["linux-image-generic-hwe-24.04"], ["linux-image-generic-hwe-24.04"]),
        ("6.8.0-1045-aws", ["linux-aws"], ["linux-image-aws"]),
        ("6.8.0-140-generic", [], ["linux-image-generic"]),
    ],
)
def test_prebuilt_modules_come_with_the_meta_package_of_their_kernel(
    kernel: str, metas: list[str], keep: list[str]
) -> None:
    """Modules alone may bring a newer kernel's image without linux-modules-extra: it boots without a network card."""
    packages = "\n".join(f"{meta} 1 ii" for meta in metas)
    found = driver_of(noble("2204", kernel=kernel, kernels=f"{kernel} - -", packages=packages))
    assert found.prebuilt
    assert [name for name in found.packages if re.match("linux-(image|headers)-", name)] == keep


def test_a_kernel_on_hold_that_has_its_modules_stays_as_it_is() -> None:
    kept = {"packages": "linux-image-generic 6.8.0-149.149 hi", "nvidia": "managed=ubuntu-archive"}
    found = outcome(noble("2204", kernels="6.8.0-149-generic 580.178.04 Dual MIT/GPL", **kept))
    assert found.driver
    assert "linux-image-generic" not in found.driver.packages
    assert "on hold, and left so: linux-image-generic" in found.reason("driver_packages")
    older = noble("2204", kernels="6.8.0-149-generic 535.1 Dual MIT/GPL", **kept)
    assert refusal(older).setting == "kernel"


def test_a_kernel_of_debians_backports_has_its_own_headers() -> None:
    kernel = "6.12.94+bpo-amd64"
    found = driver_of(debian(12, "2204", kernel=kernel, kernels=f"6.1.0-49-amd64 - -\n{kernel} - -"))
    assert found.packages[-3:] == ("linux-image-amd64", "linux-headers-amd64", f"linux-headers-{kernel}")


def test_closed_modules_are_built_where_none_are_signed() -> None:
    found = driver_of(noble("2204", machine="aarch64"), driver_modules="closed")
    assert not found.prebuilt
    assert "nvidia-dkms-580-server" in found.packages


def test_the_plan_is_the_same_before_and_after_a_reboot_into_a_newer_kernel() -> None:
    kernels = "6.8.0-140-generic - -\n6.8.0-149-generic - -"
    before = driver_of(noble("2204", kernel="6.8.0-140-generic", kernels=kernels))
    after = driver_of(noble("2204", kernels=kernels))
    assert before.reboot_expected
    assert dataclasses.replace(before, reboot_expected=False) == after


# --- NVSwitch ---------------------------------------------------------------------------------------------------


def test_the_fabric_manager_is_there_exactly_where_switches_are() -> None:
    with_switches = driver_of(noble("20b2", nvswitches="6"))
    assert with_switches.packages[-2:] == ("nvidia-fabricmanager-580", "libnvidia-nscq-580")
    assert with_switches.fabric_manager
    # A virtual machine of a shared fabric sees none.
    guest = driver_of(noble("20b2", virtualisation="kvm"))
    assert not guest.fabric_manager
    assert not [name for name in guest.packages if "fabric" in name or "nscq" in name]
    assert "nvidia-fabricmanager" in driver_of(debian(12, "20b2", nvswitches="6")).packages


def test_nvlink_5_brings_its_subnet_manager_from_nvidia_and_no_driver_with_it() -> None:
    found = driver_of(machine("b200-hgx"))
    assert found.source == "ubuntu-archive"
    assert found.packages[-2:] == ("nvlsm", "infiniband-diags")
    assert [source.name for source in found.repositories] == ["nvidia-cuda"]
    assert {(pin.pin, pin.priority) for pin in found.pins} == {
        ("release l=NVIDIA CUDA", -1),
        ("origin developer.download.nvidia.com", -1),
    }
    aws = noble("2901", nvswitches="4", kernel="6.8.0-1045-aws", kernels="", packages="linux-aws 1 ii")
    assert "linux-modules-extra-aws" in driver_of(aws).packages


# --- repositories and pins --------------------------------------------------------------------------------------

KEYS = {
    "Ubuntu 22.04": ("ubuntu2204", "3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC"),
    "Ubuntu 24.04": ("ubuntu2404", "3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC"),
    "Ubuntu 26.04": ("ubuntu2604", "60DF8A40.pub", "14BAFBC7562AD710CA04E69905FBB6DA60DF8A40"),
    "Debian 12": ("debian12", "3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC"),
    "Debian 13": ("debian13", "8793F200.pub", "02182E60104FCDC26EAE1B8597A5D4CB8793F200"),
}


@pytest.mark.parametrize(
    ("system", "machine_name", "directory"),
    [
        *((system, "x86_64", "x86_64") for system in KEYS),
        *((system, "aarch64", "sbsa") for system in KEYS if system.startswith("Ubuntu")),
    ],
)
def test_nvidias_repository_and_the_key_of_each_distribution(system: str, machine_name: str, directory: str) -> None:
    name, key, fingerprint = KEYS[system]
    kernel = "6.8.0-149-generic" if system.startswith("Ubuntu") else "6.1.0-49-amd64"
    hardware = bare(os_release=OS_RELEASES[system], kernel=kernel, pci=pci("2204"), machine=machine_name)
    (source,) = driver_of(hardware, driver_source="cuda-repository").repositories
    uri = f"https://developer.download.nvidia.com/compute/cuda/repos/{name}/{directory}/"
    assert (source.uri, source.suite, source.components) == (uri, "/", ())
    assert (source.key, source.key_url, source.fingerprint) == ("", f"{uri}{key}", fingerprint)


def test_a_mirror_with_its_own_key_is_used_instead() -> None:
    data = {"mirror_cuda": "http://mirror.example/cuda/", "mirror_cuda_key": "/srv/keys/cuda.asc"}
    (source,) = driver_of(debian(12, "2204"), **data).repositories
    assert source.uri == "http://mirror.example/cuda/debian12/x86_64/"
    assert (source.key, source.key_url, source.fingerprint) == ("/srv/keys/cuda.asc", "", "")


def test_nvidias_repository_never_becomes_a_second_origin() -> None:
    pins = driver_of(noble("2204"), mirror_cuda="https://cuda.example/repos").pins
    assert [(pin.pin, pin.priority) for pin in pins] == [
        ("release l=NVIDIA CUDA", -1),
        ("origin developer.download.nvidia.com", -1),
        ("origin cuda.example", -1),
    ]
    for pin in pins:
        for name in ("nvidia-utils-580-server", "nvidia-compute-utils-580", "libnvidia-compute-580", "libnvidia-cfg1"):
            assert any(fnmatch(name, glob) for glob in pin.packages.split())


def test_a_mirror_that_serves_the_archive_too_is_not_shut_out_by_its_name() -> None:
    one = {"mirror_cuda": "http://mirror.example/cuda", "mirror_apt_archive": "http://mirror.example/ubuntu"}
    assert "origin mirror.example" not in [pin.pin for pin in driver_of(noble("2204"), **one).pins]


def test_the_cuda_toolkit_comes_without_a_driver() -> None:
    found = driver_of(noble("2204"), cuda_toolkit="system")
    assert found.packages[-1] == "cuda-toolkit-13-0"
    assert [source.setting for source in found.repositories] == ["mirror_cuda"]
    assert [(pin.packages, pin.pin, pin.priority) for pin in found.pins[-1:]] == [
        ("cuda-toolkit-13-0", "version 13.0.*", 1001)
    ]
    assert found.pins[0].priority == -1
    in_environment = driver_of(noble("2204"), cuda_toolkit="venv")
    assert (in_environment.repositories, in_environment.cuda_toolkit) == ((), "venv")
    kept = driver_of(machine("h100"), cuda_toolkit="system")
    assert (kept.source, kept.packages, kept.pins[-1].priority) == ("installed", ("cuda-toolkit-13-0",), -1)


AS_PLANNED = f"{GENERIC}\nlinux-modules-nvidia-580-server-open-generic 6.8.0-149.149 ii"

# --- of this moment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "data", "expected", "words"),
    [
        ({}, {}, False, "can be loaded"),
        ({"pci": pci("2204", driver="nouveau")}, {}, True, "nouveau holds the GPU"),
        ({"pci": pci("2204", driver="nova_core")}, {}, True, "nova_core holds the GPU"),
        ({"nvidia": "loaded=580.178.04\nmodules=open\nuser_space=580.178.04"}, {}, False, "can be loaded"),
        # The archive moved on within the branch, and so did the host.
        ({"nvidia": "loaded=580.190.01\nmodules=open\nuser_space=580.190.01"}, {}, False, "can be loaded"),
        ({"nvidia": "loaded=580.150.01\nmodules=open\nuser_space=580.178.04"}, {}, True, "580.150.01 is loaded"),
        (
            {"nvidia": "loaded=580.178.04\nmodules=open\nuser_space=580.178.04"},
            {"driver_branch": "595"},
            True,
            "595.91.07 is planned",
        ),
        ({"nvidia": "loaded=580.178.04\nmodules=closed\nuser_space=580.178.04"}, {}, True, "closed modules are loaded"),
        ({"kernels": "6.8.0-149-generic - -\n6.8.0-150-generic - -"}, {}, True, "newest kernel, 6.8.0-150-generic"),
        ({"kernels": "6.8.0-149-generic 580.178.04 Dual MIT/GPL\n6.8.0-150-generic - -"}, {}, False, "can be loaded"),
        ({}, {}, False, "unless apt brings a newer kernel"),
        ({"packages": AS_PLANNED}, {}, False, "as the host runs$"),
        (
            {"kernels": "6.8.0-149-generic 580.1 Dual MIT/GPL\n6.8.0-150-generic - -"},
            {"driver_source": "cuda-repository"},
            True,
            "6.8.0-149-generic runs without its headers",
        ),
        (
            {
                "kernels": "6.8.0-149-generic 580.1 Dual MIT/GPL\n6.8.0-150-generic - -",
                "packages": f"{GENERIC}\nlinux-headers-6.8.0-149-generic 6.8.0-149.149 ii",
            },
            {"driver_source": "cuda-repository"},
            False,
            "can be loaded",
        ),
    ],
)
def test_a_reboot_is_expected_where_modules_cannot_change_otherwise(
    changes: dict[str, str], data: dict[str, Any], expected: bool, words: str
) -> None:
    found = outcome(noble("2204", **changes), **{"driver_source": "ubuntu-archive", **data})
    assert found.driver
    assert found.driver.reboot_expected is expected
    assert re.search(words, found.reason("reboot_expected"))


def test_nvidias_repository_pins_the_exact_version() -> None:
    newer = debian(12, "2204", nvidia="loaded=580.190.01\nmodules=open\nuser_space=580.190.01")
    assert driver_of(newer, driver_source="cuda-repository").reboot_expected


def planned(hardware: Hardware, **data: Any) -> HostPlan:
    return plan(load([Layer("group_data/all.py", data)]), hardware, "box")


def converged(bare_plan: HostPlan, kernels: str, packages: str) -> dict[str, str]:
    """The facts that change once a plan is applied."""
    driver, containers = bare_plan.driver, bare_plan.containers
    assert driver and containers
    suffix = "-0ubuntu0.24.04.1" if driver.source == "ubuntu-archive" else "-1"
    names = [*driver.packages, *containers.packages]
    lines = [f"{name} {driver.version if 'nvidia' in name else 1}{suffix} ii" for name in names]
    pinned = [name.replace("=", " ") + " ii" for name in containers.toolkit_packages]
    return {
        "kernels": kernels,
        "packages": "\n".join([packages, *lines, *pinned]),
        "nvidia": f"loaded={driver.version}\nmodules={driver.modules}\nuser_space={driver.version}\n"
        f"managed={driver.source}",
        "docker": "server=29.8.0\ncompose=5.0.1\ntoolkit=1.20.0",
        "apt": "/etc/apt/sources.list.d/llmhost-nvidia-cuda.sources "
        "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/",
    }


@pytest.mark.parametrize(
    "hardware", [noble, lambda *ids, **changes: debian(12, *ids, **changes)], ids=["ubuntu", "debian"]
)
@pytest.mark.parametrize("source", ["auto", "explicit"])
def test_the_plan_of_a_converged_host_is_the_plan_of_the_bare_one(hardware: Any, source: str) -> None:
    """Nouveau held the card of the bare host: only what is of that moment may differ."""
    first = hardware("2204", pci=pci("2204", driver="nouveau"))
    wish = "ubuntu-archive" if first.os_id == "ubuntu" else "cuda-repository"
    data = {} if source == "auto" else {"accelerator": "cpu", "driver_source": wish}
    before = outcome(first, **data)
    assert before.driver and before.containers
    shell = HostPlan("box", (), (), None, before.driver, before.containers)
    module = f"{first.kernel} {before.driver.version} Dual MIT/GPL"
    changes = converged(shell, module, f"linux-image-{'generic' if first.os_id == 'ubuntu' else 'amd64'} 1 ii")
    after = outcome(hardware("2204", pci=pci("2204", driver="nvidia"), **changes), **data)
    assert after.driver and after.problems == ()
    assert (before.driver.reboot_expected, after.driver.reboot_expected) == (True, False)
    assert comparable(after) == comparable(before)


def comparable(found: Outcome) -> str:
    """What the plan's hash is made of."""
    assert found.driver
    return hash_of(HostPlan("box", found.decisions, found.problems, None, found.driver, found.containers).as_json())


def test_a_whole_plan_has_driver_and_docker_and_keeps_its_hash_once_applied() -> None:
    data = {"accelerator": "cpu", "driver_source": "ubuntu-archive"}
    before = planned(noble("2204"), **data)
    assert before.problems == ()
    changes = converged(before, "6.8.0-149-generic 580.178.04 Dual MIT/GPL", GENERIC)
    after = planned(noble("2204", **changes), **data)
    assert after.hash == before.hash
    assert after.as_json()["driver"]["source"] == "ubuntu-archive"
    assert downloads(after, noble("2204", **changes)).keys().isdisjoint({"mirror_docker", "mirror_container_toolkit"})
    assert downloads(before, noble("2204"))["mirror_docker"] == "https://download.docker.com/linux/ubuntu"


def test_nvidias_repository_must_be_reached_until_its_packages_are_there() -> None:
    data = {"accelerator": "cpu", "driver_source": "cuda-repository"}
    before = planned(debian(12, "2204"), **data)
    hardware = debian(12, "2204", **converged(before, "6.1.0-49-amd64 580.178.04 Dual MIT/GPL", "gcc 12 ii"))
    uri = "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/"
    assert downloads(before, debian(12, "2204"))["mirror_cuda"] == uri
    assert "mirror_cuda" not in downloads(planned(hardware, **data), hardware)


def test_a_host_without_room_for_a_driver_is_refused() -> None:
    data = {"accelerator": "cpu", "driver_source": "ubuntu-archive"}
    mounted = {"opt": 20.0, "models": 20.0}
    assert planned(noble("2204", disks=disks(4.0, **mounted)), **data).problems == ()
    (problem,) = planned(noble("2204", disks=disks(3.0, **mounted)), **data).problems
    assert problem.setting == "disk"
    assert "/ needs 3,584 MiB free" in problem.message
    built = {**data, "driver_source": "cuda-repository"}
    (problem,) = planned(noble("2204", disks=disks(4.0, **mounted)), **built).problems
    assert "/ needs 4,608 MiB free" in problem.message
    (problem,) = planned(noble("2204", disks=disks(4.0, **mounted)), **data, cuda_toolkit="system").problems
    assert "/ needs 11,776 MiB free" in problem.message


# --- what stays as it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "nvidia-utils-580-server",
        "libnvidia-compute-580-server",
        "linux-modules-nvidia-580-server-open-generic",
        "linux-image-generic",
        "linux-headers-amd64",
        "linux-generic-hwe-24.04",
        "linux-virtual",
        "libcuda1",
        "docker-ce",
        "docker.io",
        "containerd.io",
        "runc",
        "nvidia-container-toolkit",
        "libnvidia-container1",
    ],
)
def test_unattended_upgrades_leave_alone_what_an_engine_runs_on(name: str) -> None:
    found = outcome(noble("2204"))
    assert found.driver and found.containers
    assert any(re.match(pattern, name) for pattern in (*found.driver.frozen, *found.containers.frozen))


@pytest.mark.parametrize("name", ["openssl", "linux-libc-dev", "python3", "libc6", "linux-firmware"])
def test_unattended_upgrades_keep_doing_the_rest(name: str) -> None:
    found = outcome(noble("2204"))
    assert found.driver and found.containers
    assert not any(re.match(pattern, name) for pattern in (*found.driver.frozen, *found.containers.frozen))


# --- Docker -----------------------------------------------------------------------------------------------------

HEALTHY = "server=29.1.3\ncompose=2.40.3"


def test_an_nvidia_host_gets_docker_and_four_packages_of_one_toolkit() -> None:
    found = containers_of(noble("2204"))
    assert found.docker == "docker-ce"
    assert found.toolkit_packages == (
        "nvidia-container-toolkit=1.20.0-1",
        "nvidia-container-toolkit-base=1.20.0-1",
        "libnvidia-container-tools=1.20.0-1",
        "libnvidia-container1=1.20.0-1",
    )
    docker, toolkit = found.repositories
    assert (docker.uri, docker.suite, docker.components) == (
        "https://download.docker.com/linux/ubuntu",
        "noble",
        ("stable",),
    )
    assert (docker.key, docker.fingerprint) == ("keys/docker.asc", "9DC858229FC7DD38854AE2D88D81803C0EBFCD88")
    for source in found.repositories:
        assert openpgp.fingerprints((ROOT / source.key).read_bytes()) == [source.fingerprint]
    assert toolkit.uri == "https://nvidia.github.io/libnvidia-container/stable/deb/amd64/"
    assert toolkit.fingerprint == "C95B321B61E88C1809C4F759DDCAE044F796ECB0"
    assert {"docker.io", "podman-docker", "containerd", "runc"} < set(found.conflicts)


def test_a_mirror_of_docker_and_the_toolkit() -> None:
    data = {
        "mirror_docker": "http://mirror.example/docker",
        "mirror_docker_key": "/srv/docker.asc",
        "mirror_container_toolkit": "http://mirror.example/toolkit",
        "mirror_container_toolkit_key": "/srv/toolkit.asc",
        "container_toolkit_version": "1.19.1",
    }
    found = containers_of(noble("2204", machine="aarch64"), **data)
    docker, toolkit = found.repositories
    assert (docker.uri, docker.suite, docker.key) == (
        "http://mirror.example/docker/ubuntu",
        "noble",
        "/srv/docker.asc",
    )
    assert (toolkit.uri, toolkit.key) == ("http://mirror.example/toolkit/arm64/", "/srv/toolkit.asc")
    assert (docker.fingerprint, toolkit.fingerprint) == ("", "")
    assert found.pins[0].pin == "version 1.19.1-1"


@pytest.mark.parametrize(
    ("docker", "packages", "source"),
    [
        (HEALTHY, f"{GENERIC}\ndocker.io 29.1.3-0ubuntu1 ii", "installed"),
        (HEALTHY, GENERIC, "installed"),
        # Docker's own packages stay Docker's own, whoever installed them.
        (HEALTHY, f"{GENERIC}\ndocker-ce 5:29.1.3-1 ii", "docker-ce"),
        ("server=24.0.7\ncompose=2.20", f"{GENERIC}\ndocker.io 24.0.7-0ubuntu4 ii", "docker-ce"),
        # Removed, but for its configuration; half unpacked.
        (HEALTHY, f"{GENERIC}\ndocker-ce 5:29.1.3-1 rc", "installed"),
        (HEALTHY, f"{GENERIC}\ndocker-ce 5:29.1.3-1 iU", "installed"),
        ("", GENERIC, "docker-ce"),
        # Stopped for now: what its package says counts, and the task starts it.
        ("server=\ncompose=2.40.3", f"{GENERIC}\ndocker.io 29.1.3-0ubuntu1~24.04.1 ii", "installed"),
        ("server=\ncompose=2.40.3", f"{GENERIC}\ndocker-ce 5:29.1.3-1 ii", "docker-ce"),
        ("server=\ncompose=2.20", f"{GENERIC}\ndocker.io 24.0.7-0ubuntu4 ii", "docker-ce"),
        # A client without a daemon is no Docker; podman's stand-in for it neither.
        ("server=\ncompose=2.40.3", f"{GENERIC}\ndocker-ce-cli 5:29.1.3-1 ii", "docker-ce"),
        ("server=", f"{GENERIC}\npodman-docker 4.9.3 ii", "docker-ce"),
        ("server=", f"{GENERIC}\ndocker-cli 26.1.5+dfsg1-9 ii", "docker-ce"),
    ],
)
def test_a_healthy_docker_is_kept(docker: str, packages: str, source: str) -> None:
    assert containers_of(noble("2204", docker=docker, packages=packages)).docker == source


@pytest.mark.parametrize(
    ("system", "packages"),
    [
        ("Ubuntu 24.04", ("docker.io", "docker-compose-v2")),
        ("Debian 13", ("docker.io", "docker-cli", "docker-compose")),
    ],
)
def test_the_distributions_docker_on_request(system: str, packages: tuple[str, ...]) -> None:
    found = containers_of(bare(os_release=OS_RELEASES[system]), docker_source="distribution")
    assert (found.docker, found.packages, found.conflicts) == ("distribution", packages, ())
    assert found.repositories == ()


def test_an_explicit_docker_on_a_cpu_host_comes_without_the_toolkit() -> None:
    found = containers_of(bare(), docker_source="docker-ce")
    assert (found.toolkit_packages, found.toolkit_version, found.pins) == ((), "", ())
    assert [source.name for source in found.repositories] == ["docker"]


@pytest.mark.parametrize(
    ("docker", "data", "words", "remedy"),
    [
        ("snap=yes", {}, "as a snap", "snap remove docker"),
        ("snap=yes", {"docker_source": "docker-ce"}, "as a snap", "snap remove docker"),
        ("", {"docker_source": "installed"}, "there is no Docker", "docker-ce"),
        ("server=", {"docker_source": "installed"}, "no Docker daemon answers", "docker-ce"),
        # Brought by no package: it may be stopped for a moment only.
        (
            "server=\ncompose=2.40.3",
            {},
            "no package of it brought, and it will not do: no Docker daemon",
            '"docker-ce"',
        ),
        ("server=29.1.3", {}, "it will not do: the compose plugin is missing", '"none"'),
        ("kubernetes=k3s", {}, "has k3s without Docker (a node of Kubernetes?)", 'docker_source = "none"'),
        ("kubernetes=kubelet", {"docker_source": "docker-ce"}, "has kubelet without", 'docker_source = "none"'),
        ("server=20.10.24", {"docker_source": "installed"}, "20.10.24 is older than 26.1", "docker-ce"),
        ("server=29.1.3", {"docker_source": "installed"}, "compose plugin is missing", "docker-ce"),
        ("", {"docker_source": "distribution"}, "has Docker 20.10, older than 26.1", "docker-ce"),
    ],
)
def test_dockers_that_cannot_be_used_are_refused(docker: str, data: dict[str, str], words: str, remedy: str) -> None:
    found = outcome(debian(12, "2204", docker=docker), **data)
    (problem,) = found.problems
    assert found.containers is None
    assert problem.setting == "docker_source"
    assert words in problem.message
    assert remedy in problem.remedy


@pytest.mark.parametrize("names", [["containerd", "runc"], ["runc"]])
def test_what_runs_on_containerd_without_docker_is_not_stopped(names: list[str]) -> None:
    packages = "\n".join([GENERIC, *(f"{name} 1.7.28-0ubuntu1 ii" for name in names)])
    (problem,) = outcome(noble("2204", packages=packages)).problems
    assert problem.setting == "docker_source"
    assert f"has {' and '.join(names)} without Docker" in problem.message
    assert f"apt-get purge {' '.join(names)}" in problem.remedy
    assert outcome(noble("2204", packages=packages), docker_source="none").problems == ()
    # With a Docker of its own, whose they are; and those of a run of ours that lost its power half-way.
    for other in ("docker.io 24.0.7-0ubuntu4 ii", "docker-ce 5:29.1.3-1 iU"):
        assert containers_of(noble("2204", packages=f"{packages}\n{other}")).docker == "docker-ce"


def test_a_docker_that_lacks_compose_is_completed_and_not_replaced() -> None:
    packages = f"{GENERIC}\ndocker.io 29.1.3-0ubuntu1 ii"
    lacking = noble("2204", packages=packages, docker="server=29.1.3")
    found = containers_of(lacking)
    assert (found.docker, found.packages, found.conflicts) == ("installed", ("docker-compose-v2",), ())
    completed = f"{packages}\ndocker-compose-v2 2.40.3+ds1-0ubuntu1 ii"
    assert containers_of(noble("2204", packages=completed, docker=HEALTHY)) == found
    # A plugin from elsewhere is one, too.
    assert containers_of(noble("2204", packages=packages, docker=HEALTHY)).packages == ()


@pytest.mark.parametrize(
    ("packages", "data", "setting", "names"),
    [
        ("docker-ce 5:29.1.3-1 hi\ncontainerd.io 2.1 hi", {}, "docker_source", "docker-ce containerd.io"),
        ("docker.io 24.0.7-0ubuntu4 hi", {}, "docker_source", "docker.io"),
        (
            "nvidia-container-toolkit 1.19.1-1 hi",
            {"docker_source": "docker-ce"},
            "container_toolkit_version",
            "nvidia-container-toolkit",
        ),
    ],
)
def test_packages_of_docker_on_hold_are_not_changed(
    packages: str, data: dict[str, str], setting: str, names: str
) -> None:
    (problem,) = outcome(noble("2204", packages=f"{GENERIC}\n{packages}"), **data).problems
    assert problem.setting == setting
    assert f"apt-mark unhold {names}," in problem.remedy


def test_packages_of_docker_on_hold_that_are_as_planned_do_not_matter() -> None:
    there = "\n".join(f"{name} 5:29.1.3-1 hi" for name in drivers().docker.packages)
    assert containers_of(noble("2204", packages=f"{GENERIC}\n{there}")).docker == "docker-ce"


@pytest.mark.parametrize("there", ["docker-ce 5:24.0.7-1~ubuntu.24.04~noble ii", "docker.io 24.0.7-0ubuntu4 ii"])
def test_a_docker_that_is_too_old_is_said_to_be_replaced(there: str) -> None:
    old = noble("2204", packages=f"{GENERIC}\n{there}", docker="server=24.0.7\ncompose=2.21")
    found = outcome(old)
    assert found.containers and found.containers.docker == "docker-ce"
    assert found.value("docker_replaced") == "24.0.7"
    assert "replaces 24.0.7: Docker 24.0.7 is older than 26.1" in found.reason("docker_replaced")


def test_a_docker_that_was_replaced_has_the_plan_of_one_that_is_new() -> None:
    """Else the plan on the host would be another's as soon as it was applied."""
    plans = [
        planned(
            noble("2204", packages=f"{GENERIC}\ndocker-ce 5:{version}-1 ii", docker=f"server={version}\ncompose=2.40")
        )
        for version in ("24.0.7", "29.8.0")
    ]
    assert [bool(plan.problems) for plan in plans] == [False, False]
    assert plans[0].hash == plans[1].hash


def test_a_docker_that_is_too_old_and_on_hold_is_not_replaced() -> None:
    there = "\n".join(f"{name} 5:24.0.7-1 hi" for name in drivers().docker.packages)
    (problem,) = outcome(noble("2204", packages=f"{GENERIC}\n{there}")).problems
    assert "apt-mark unhold docker-ce" in problem.remedy


@pytest.mark.parametrize(("version", "said"), [("1.19.1", False), ("1.20.1", False), ("1.99.0", True)])
def test_a_toolkit_that_is_not_known_here_is_planned_and_said_to_be(version: str, said: bool) -> None:
    found = outcome(noble("2204"), container_toolkit_version=version)
    assert found.containers and found.containers.toolkit_version == version
    words = "not among the versions known here (1.19.1, 1.20.0, 1.20.1)"
    assert (words in found.reason("container_toolkit_version")) is said


def test_no_docker_where_none_is_wanted() -> None:
    assert outcome(noble("2204"), docker_source="none").containers is None
    assert outcome(bare()).containers is None
