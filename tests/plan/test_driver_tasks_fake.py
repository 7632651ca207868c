"""The driver's and the containers' tasks against machines that pyinfra's @fake connector plays.

A machine stands at the host's boundary: it answers looks from its state, and commands change that state as the real
ones would (packages appear, modules load, a reboot brings another boot id).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra.api.deploy import add_deploy
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operations import run_ops
from pyinfra.connectors.fake import FakeConnector
from pyinfra.connectors.util import CommandOutput, OutputLine

import infra.reboot
from infra.docker import CdiState
from infra.packages import _FIRST_BOOT, FirstBoot
from llmhost.catalogue import ROOT
from llmhost.plan.containers import outdated_engine
from llmhost.plan.host import plan as make_plan
from llmhost.plan.model import AptPin, AptSource, ContainersPlan, DriverPlan, HostPlan
from llmhost.settings import load
from tasks.containers import containers
from tasks.driver import nvidia_driver
from tests.plan.test_tasks_fake import BOX, file_state
from tests.recorded import bare as recorded_host

OLD, NEW = "580.178.04", "595.91.07"
GA, NEXT = "6.1.0-40-amd64", "6.1.0-41-amd64"
CUDA_KEY = "EB693B3035CD5710E231E123A4B469963BF863CC"
DOCKER_KEY = "9DC858229FC7DD38854AE2D88D81803C0EBFCD88"

CUDA = AptSource(
    name="nvidia-cuda",
    setting="mirror_cuda",
    uri="https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/",
    suite="/",
    components=(),
    key="",
    key_url="https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/3bf863cc.pub",
    fingerprint=CUDA_KEY,
)
DOCKER = AptSource(
    name="docker",
    setting="mirror_docker",
    uri="https://download.docker.com/linux/debian",
    suite="bookworm",
    components=("stable",),
    key="keys/docker.asc",
    key_url="",
    fingerprint=DOCKER_KEY,
)
DRIVER = DriverPlan(
    branch="580",
    version=OLD,
    modules="open",
    source="cuda-repository",
    packages=(f"nvidia-driver-pinning-{OLD}", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "linux-headers-amd64"),
    fabric_manager=False,
    reboot_expected=True,
    generation="ampere",
    gpus=1,
    prebuilt=False,
    repositories=(CUDA,),
    pins=(AptPin("cuda-compat-*", "origin developer.download.nvidia.com", -1, "the driver is new enough"),),
    blacklist_nouveau=True,
    frozen=("nvidia-", "linux-image-"),
    cuda_toolkit="none",
    reboot_allowed="auto",
)
DRIVER_595 = dataclasses.replace(
    DRIVER, branch="595", version=NEW, packages=(f"nvidia-driver-pinning-{NEW}", *DRIVER.packages[1:])
)
CONTAINERS = ContainersPlan(
    docker="docker-ce",
    docker_minimum="26.1",
    packages=("docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin"),
    conflicts=("docker.io", "runc"),
    toolkit_version="1.20.0",
    toolkit_packages=("nvidia-container-toolkit=1.20.0-1", "libnvidia-container1=1.20.0-1"),
    repositories=(DOCKER,),
    pins=(),
    registry_mirror="",
    frozen=("docker-ce", "nvidia-"),
)


def host_plan(driver: DriverPlan | None = DRIVER, docker: ContainersPlan | None = CONTAINERS) -> HostPlan:
    return dataclasses.replace(make_plan(load([]), recorded_host(), BOX), driver=driver, containers=docker)


# --- the machine ------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A Debian 12 host with one GPU; as it is made, bare, with nouveau on the GPU."""

    files: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    preferences: list[str] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    served_key: str = CUDA_KEY
    boots: int = 1
    kernel: str = GA
    newest_kernel: str = GA
    bound: list[str] = field(default_factory=lambda: ["nouveau"])
    loaded: str = ""
    disk: str = ""
    references: int = 0
    holders: list[str] = field(default_factory=list)
    drains: bool = True  # stopped services let go of the modules
    initramfs_stale: bool = False
    keeps_initramfs: bool = False  # update-initramfs leaves it as old as it is
    lacking: list[str] = field(default_factory=list)  # further modules that are not loaded
    rebooted: dict[str, str] | None = None  # the record of a reboot
    newer: dict[str, tuple[str, str]] = field(default_factory=dict)  # (old, new) versions that an upgrade would bring
    helpless: bool = False  # a reboot changes nothing but the boot
    daemon: dict[str, Any] = field(default_factory=dict)
    daemon_fault: str = ""
    adoptable: bool = False
    cdi: str = ""  # the driver version of the specification
    image: bool = False
    first_boot: str = ""  # what cloud-init says of it while it runs
    asked: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def answer(self, command: str, stdin: str) -> str | None:
        """What a look is answered, or None for a command, which is carried out."""
        for mark, look in self.looks().items():
            if mark in command:
                self.asked.append(command)
                return look()
        self.done.append(command)
        for pattern, act in self.acts().items():
            if found := re.search(pattern, command, re.DOTALL):
                return act(found, stdin)
        return ""

    def looks(self) -> dict[str, Callable[[], str]]:
        return {
            "def uris(path)": lambda: json.dumps(
                {
                    "keys": self.keys,
                    "lists": self.lists,
                    "own": [path for path in self.files if path.endswith(".sources")],
                    "preferences": self.preferences,
                }
            ),
            "import grp, hashlib": lambda: json.dumps(self.files),
            "${Package} ${db:Status-Status} ${Version}": lambda: "\n".join(
                f"{name} installed {version}" for name, version in self.packages.items()
            ),
            "def on_disk(kernel)": self.modules,
            '"adoptable"': lambda: json.dumps(
                {
                    "fault": self.daemon_fault,
                    "runtime": "runtimes" in self.daemon,
                    "cdi": "features" in self.daemon,
                    "mirrors": self.daemon.get("registry-mirrors", []),
                    "adoptable": self.adoptable,
                }
            ),
            "nvidia-cdi-refresh.path": lambda: json.dumps(
                {"fault": "" if self.cdi == self.loaded else f"it is for driver {self.cdi}", "disabled": []}
            ),
            "grep -w running": lambda: self.first_boot,
            "UnitFileState": lambda: json.dumps(self.units),
            '"check"': lambda: json.dumps(self.image),
            "cat /proc/sys/kernel/random/boot_id": lambda: f"boot-{self.boots}",
            "apt-get -s --only-upgrade": lambda: "\n".join(
                f"{name} {f'[{old}] ' if old else ''}({new} Debian:12 [amd64])"
                for name, (old, new) in self.newer.items()
            ),
        }

    def modules(self) -> str:
        def module(version: str) -> dict[str, str]:
            return {"version": version, "modules": "open" if version else ""}

        return json.dumps(
            {
                "boot_id": f"boot-{self.boots}",
                "kernel": self.kernel,
                "newest_kernel": self.newest_kernel,
                "loaded": module(self.loaded),
                "uvm": bool(self.loaded),
                "disk": module(self.disk if self.kernel == self.newest_kernel else ""),
                "newest": module(self.disk),
                "user_space": self.disk,
                "references": self.references,
                "holders": self.holders,
                "bound": self.bound,
                "initramfs_stale": self.initramfs_stale,
                "lacking": self.lacking,
                "rebooted": self.rebooted,
            }
        )

    def acts(self) -> dict[str, Callable[[re.Match[str], str], str]]:
        return {
            r"systemctl restart nvidia-cdi-refresh": lambda found, stdin: self.set(cdi=self.loaded),
            r"registry-mirrors.* (?P<mirror>\S+)$": lambda found, stdin: self.configure(
                **{"registry-mirrors": [found["mirror"]]}
            ),
            r"def fetched\(setting": self.trust,
            r"os\.rename\(part, path\)": self.write,
            r"apt-get .* install (?P<words>[^\n]+)$": self.install,
            "^update-initramfs": lambda found, stdin: self.set(initramfs_stale=self.keeps_initramfs),
            "cloud-init status --wait": lambda found, stdin: self.set(first_boot=""),
            r"for module in nvidia (?P<more>[^;]+); do.*modprobe": lambda found, stdin: self.set(
                loaded=self.disk, lacking=[name for name in self.lacking if name not in found["more"].split()]
            ),
            r"^rm -f (?P<paths>.*)$": self.remove,
            r"^sh -c 'umask 077 .* record /var/lib/llmhost/reboot\.json (?P<told>.*)$": lambda found, stdin: self.set(
                rebooted=json.loads(shlex.split(found["told"])[0])
            ),
            r"^systemctl stop (?P<units>.*) 2>": self.stop,
            r"modprobe -r": lambda found, stdin: self.set(loaded=""),
            r"systemctl reboot": self.reboot,
            r"systemctl (?P<verb>enable|start|restart) (--quiet )?(?P<units>[\w. -]*\.service)": self.run,
            r"^nvidia-ctk runtime configure": lambda found, stdin: self.configure(runtimes={}, features={}),
            r"gpu-image build$": lambda found, stdin: self.set(image=True),
            r"inputs record docker\.service": lambda found, stdin: self.set(adoptable=False),
        }

    def set(self, **changes: Any) -> str:
        for name, value in changes.items():
            setattr(self, name, value)
        return ""

    def trust(self, found: re.Match[str], stdin: str) -> str:
        asked = json.loads(stdin)
        for key in asked["fetch"]:
            if key["fingerprint"] != self.served_key:
                raise Failed(f"{key['setting']}: wrong key")
            self.keys[key["path"]] = [self.served_key]
        for path in asked["drop"]:
            del self.files[path]
        for path in asked["aside"]:
            self.lists.pop(path, None)
            self.preferences = [name for name in self.preferences if not path.endswith(f"/{name}")]
        return ""

    def write(self, found: re.Match[str], stdin: str) -> str:
        for entry in json.loads(stdin):
            self.files[entry["path"]] = file_state(**entry)
            self.contents[entry["path"]] = entry.get("content", "")
            if entry["path"].endswith("nouveau.conf"):
                self.initramfs_stale = True
        return ""

    def install(self, found: re.Match[str], stdin: str) -> str:
        for word in found["words"].split():
            if word in self.newer:
                self.packages[word] = self.newer.pop(word)[1]
                self.newer = {name: versions for name, versions in self.newer.items() if versions[0]}
                continue
            if word.endswith("-"):
                self.packages.pop(word[:-1], None)
                continue
            name, _, version = word.partition("=")
            self.packages[name] = version or "1"
        pinned = [name.removeprefix("nvidia-driver-pinning-") for name in self.packages if "pinning" in name]
        if pinned and "nvidia-driver-cuda" in found["words"]:
            self.disk = pinned[0]
            self.packages |= {"libcuda1": f"{self.disk}-1", "nvidia-kernel-open-dkms": f"{self.disk}-1"}
        if "docker-ce" in found["words"].split():
            self.packages |= {"docker-ce": "5:29.7.2-1~debian.12~bookworm"}
        return ""

    def stop(self, found: re.Match[str], stdin: str) -> str:
        for unit in found["units"].split():
            if unit in self.units:
                self.units[unit]["active"] = "inactive"
        if self.drains:
            self.references, self.holders = 0, []
        return ""

    def remove(self, found: re.Match[str], stdin: str) -> str:
        for path in found["paths"].split():
            if path == "/var/lib/llmhost/reboot.json":
                self.rebooted = None
            else:
                del self.files[path]
        return ""

    def reboot(self, found: re.Match[str], stdin: str) -> str:
        self.boots += 1
        if self.helpless:
            return ""
        self.kernel, self.bound, self.references, self.holders = self.newest_kernel, [], 0, []
        self.loaded = self.disk
        return ""

    def run(self, found: re.Match[str], stdin: str) -> str:
        for unit in found["units"].split():
            state = self.units.setdefault(
                unit, {"active": "inactive", "sub": "dead", "stale": False, "enabled": "static", "reload": False}
            )
            state |= {"enabled": "enabled"} if found["verb"] == "enable" else {"active": "active", "stale": False}
        return ""

    def configure(self, **keys: Any) -> str:
        self.daemon |= keys
        self.units.setdefault("docker.service", {"active": "active", "enabled": "enabled", "reload": False})
        self.units["docker.service"]["stale"] = True
        return ""


class Failed(Exception):
    """A command of the machine failed, and says this."""


@dataclass
class Run:
    done: list[str]
    changed: list[str]
    failed: bool
    log: str

    def order(self, *patterns: str) -> list[int]:
        """Where each pattern is first done; -1 where it is not."""
        return [
            next((at for at, command in enumerate(self.done) if re.search(pattern, command, re.DOTALL)), -1)
            for pattern in patterns
        ]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., Run]:
    caplog.set_level("INFO", logger="pyinfra")

    def play(machine: Machine, plan: HostPlan, upgrade: bool = False) -> Run:
        def run_shell_command(connector: Any, command: Any, *_: Any, **keywords: Any) -> Any:
            connector.executed_commands.append(str(command))
            try:
                text = machine.answer(str(command), "\n".join(keywords.get("_stdin") or []))
            except Failed as error:
                return False, CommandOutput([OutputLine("stderr", str(error))])
            return True, CommandOutput([OutputLine("stdout", line) for line in (text or "").splitlines()])

        monkeypatch.setattr(FakeConnector, "run_shell_command", run_shell_command)
        machine.done.clear()
        caplog.clear()
        inventory = Inventory(([(BOX, {})], {}))
        state = State(inventory, Config())
        connect_all(state)
        add_deploy(state, lambda: (nvidia_driver(plan, upgrade), containers(plan, upgrade)))
        assert machine.done == []  # nothing is done while pyinfra prepares
        with suppress(PyinfraError):  # "No hosts remaining!"
            run_ops(state)
        host = inventory.get_host(BOX)
        order = [op for op in state.get_op_order() if op in state.ops[host]]
        changed = [
            next(iter(state.get_op_meta(op).names))
            for op in order
            if state.ops[host][op].operation_meta.is_complete()
            and state.ops[host][op].operation_meta.did_succeed()
            and state.ops[host][op].operation_meta.did_change()
        ]
        return Run(machine.done[:], changed, host in state.failed_hosts, caplog.text)

    return play


@pytest.fixture
def converged(play: Callable[..., Run]) -> Machine:
    """A machine that was deployed."""
    machine = Machine()
    assert not play(machine, host_plan()).failed
    return machine


INSTALL_PIN = rf"--purge install --yes.* install nvidia-driver-pinning-{OLD}$"
INSTALL_DRIVER = rf"install nvidia-driver-pinning-{OLD} nvidia-driver-cuda nvidia-kernel-open-dkms linux-headers-amd64$"
REBOOT = r"systemctl reboot"
LOAD = r"for module in nvidia nvidia_uvm; do.*modprobe"


# --- tests ------------------------------------------------------------------------------------------------------


def test_a_bare_host_gets_the_whole_story_in_order(play: Callable[..., Run]) -> None:
    machine = Machine()
    ran = play(machine, host_plan())
    assert not ran.failed, ran.log
    story = ran.order(
        r"def fetched\(setting",
        r"os\.rename\(part, path\)",
        INSTALL_PIN,
        INSTALL_DRIVER,
        "^update-initramfs",
        REBOOT,
        r"enable .*nvidia-persistenced\.service",
        r"start .*nvidia-persistenced\.service",
        r"install docker-ce docker-ce-cli",
        r"install nvidia-container-toolkit=1\.20\.0-1 libnvidia-container1=1\.20\.0-1$",
        r"^nvidia-ctk runtime configure --runtime=docker --cdi\.enabled$",
        r"systemctl restart docker\.service",
        r"systemctl restart nvidia-cdi-refresh",
        r"gpu-image build$",
    )
    assert -1 not in story
    assert story == sorted(story)
    assert (machine.boots, machine.loaded, machine.cdi) == (2, OLD, OLD)


def test_a_second_run_does_nothing(play: Callable[..., Run], converged: Machine) -> None:
    ran = play(converged, host_plan())
    assert not ran.failed, ran.log
    assert (ran.done, ran.changed) == ([], [])
    assert converged.asked


def test_a_host_without_a_driver_or_docker_is_left_alone(play: Callable[..., Run]) -> None:
    machine = Machine()
    ran = play(machine, host_plan(None, None))
    assert (ran.done, ran.changed, ran.failed) == ([], [], False)
    assert len(machine.asked) <= 2, "one look for leftovers, while pyinfra prepares and when it executes"


OF_A_DRIVER = ("/etc/llmhost/driver", "/etc/modprobe.d/llmhost-nouveau.conf")
OF_APT = (
    "/etc/apt/preferences.d/llmhost",
    "/etc/apt/apt.conf.d/52llmhost-unattended-upgrades",
    "/etc/apt/sources.list.d/llmhost-nvidia-cuda.sources",
    "/etc/apt/sources.list.d/llmhost-docker.sources",
    "/etc/apt/keyrings/llmhost-docker.asc",
)


def test_what_is_no_longer_planned_goes(play: Callable[..., Run], converged: Machine) -> None:
    assert {*OF_A_DRIVER, *OF_APT} <= converged.files.keys()
    ran = play(converged, host_plan(None, None))
    assert (len(ran.done), ran.failed) == (1, False)
    assert converged.files.keys() & {*OF_A_DRIVER, *OF_APT} == set()
    assert f"remove {OF_A_DRIVER[0]}, which is no longer planned" in ran.log
    assert (play(converged, host_plan(None, None)).done, ran.failed) == ([], False)


def test_docker_stays_when_the_driver_goes(play: Callable[..., Run], converged: Machine) -> None:
    alone = host_plan(None, dataclasses.replace(CONTAINERS, toolkit_version="", toolkit_packages=()))
    assert not play(converged, alone).failed
    assert converged.files.keys() & {*OF_A_DRIVER, *OF_APT} == {*OF_APT} - {OF_APT[2]}
    assert '"nvidia-";' in converged.contents[OF_APT[1]], "the containers' own list of what must not move"
    assert '"linux-image-";' not in converged.contents[OF_APT[1]]
    assert play(converged, alone).done == []


def test_the_driver_stays_when_docker_goes(play: Callable[..., Run], converged: Machine) -> None:
    alone = host_plan(DRIVER, None)
    assert not play(converged, alone).failed
    assert "/etc/apt/sources.list.d/llmhost-docker.sources" not in converged.files
    assert '"docker-ce";' not in converged.contents[OF_APT[1]]
    assert play(converged, alone).done == []


def test_the_toolkits_pins_come_before_the_drivers(play: Callable[..., Run]) -> None:
    """apt takes the first entry that names a package, and the driver's nvidia-* names the toolkit too."""
    own = dataclasses.replace(CONTAINERS, pins=(AptPin("nvidia-container-toolkit", "version 1.20.0-1", 1001, "one"),))
    machine = Machine()
    play(machine, host_plan(docker=own))
    named = re.findall(r"^Package: (.*)$", machine.contents["/etc/apt/preferences.d/llmhost"], re.MULTILINE)
    assert named == ["nvidia-container-toolkit", "cuda-compat-*"]


def test_the_marker_is_the_first_file_and_comes_before_any_package(play: Callable[..., Run]) -> None:
    machine = Machine()
    ran = play(machine, host_plan())
    assert next(iter(machine.contents)) == "/etc/llmhost/driver"
    assert machine.contents["/etc/llmhost/driver"] == "cuda-repository 580 open\n"
    written, installed = ran.order(r"os\.rename\(part, path\)", "apt-get")
    assert written < installed


def test_what_is_written(play: Callable[..., Run]) -> None:
    machine = Machine()
    play(machine, host_plan())
    sources = machine.contents["/etc/apt/sources.list.d/llmhost-nvidia-cuda.sources"]
    assert "Signed-By: /etc/apt/keyrings/llmhost-nvidia-cuda.asc" in sources
    assert "\nSuites: /\n" in sources and "Components" not in sources
    assert machine.contents["/etc/apt/keyrings/llmhost-docker.asc"] == (ROOT / "keys/docker.asc").read_text()
    assert "Pin-Priority: -1" in machine.contents["/etc/apt/preferences.d/llmhost"]
    frozen = machine.contents["/etc/apt/apt.conf.d/52llmhost-unattended-upgrades"]
    assert re.findall(r'^    "(.*)";$', frozen, re.MULTILINE) == ["nvidia-", "linux-image-", "docker-ce"]
    persistence = machine.contents["/etc/systemd/system/nvidia-persistenced.service.d/llmhost.conf"]
    assert "--persistence-mode" in persistence
    docker = machine.contents["/etc/systemd/system/docker.service.d/llmhost.conf"]
    for unit in (persistence, docker):  # they start without llmhost's program, too
        assert "\nExecStartPre=-+/usr/local/lib/llmhost/inputs record %n" in unit
    assert machine.contents["/etc/modules-load.d/llmhost-nvidia.conf"].splitlines()[-1] == "nvidia_uvm"
    assert "nova_core" in machine.contents["/etc/modprobe.d/llmhost-nouveau.conf"]


def test_lists_of_a_repository_are_fetched_strictly_before_a_package_comes_from_it(play: Callable[..., Run]) -> None:
    ran = play(Machine(), host_plan())
    (first, *_) = [command for command in ran.done if "apt-get" in command]
    own = first.index("Dir::Etc::sourcelist=/etc/apt/sources.list.d/llmhost-nvidia-cuda.sources")
    assert "APT::Update::Error-Mode=any" in first[own : own + 200]
    assert "mirror_cuda: https://developer.download.nvidia.com" in first
    assert own < first.index("install --yes")


def test_nobody_is_asked_about_configuration_files(play: Callable[..., Run]) -> None:
    ran = play(Machine(bound=[]), host_plan())
    installing = [command for command in ran.done if "apt-get" in command]
    assert len(installing) == 4
    for command in installing:
        assert "-o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold" in command
        assert "dpkg --force-confdef --force-confold --configure -a" in command


def test_a_wrong_key_stops_before_apt_is_touched(play: Callable[..., Run]) -> None:
    machine = Machine(served_key="0" * 40)
    ran = play(machine, host_plan())
    assert ran.failed
    assert len(ran.done) == 1
    assert "wrong key" in ran.log
    assert machine.contents == {}


def test_a_wrong_key_on_the_control_machine_is_refused_before_anything(play: Callable[..., Run]) -> None:
    wrong = dataclasses.replace(DOCKER, key="keys/nvidia-container-toolkit.asc")
    machine = Machine()
    ran = play(machine, host_plan(docker=dataclasses.replace(CONTAINERS, repositories=(wrong,))))
    assert ran.failed
    assert ran.done == []
    assert re.search(rf"mirror_docker_key .*C95B321B61E88C1809C4F759DDCAE044F796ECB0, expected {DOCKER_KEY}", ran.log)


def test_a_key_file_that_is_not_there_is_refused(play: Callable[..., Run]) -> None:
    missing = dataclasses.replace(DOCKER, key="/nowhere/mirror.asc", fingerprint="")
    ran = play(Machine(), host_plan(docker=dataclasses.replace(CONTAINERS, repositories=(missing,))))
    assert ran.failed
    assert ran.done == []
    assert "/nowhere/mirror.asc" in ran.log


@pytest.mark.parametrize(
    "path",
    [
        "/etc/apt/sources.list.d/docker.list",
        "/etc/apt/sources.list.d/extrepo_docker-ce.sources",
    ],
)
def test_another_list_of_the_same_repository_is_set_aside(play: Callable[..., Run], path: str) -> None:
    machine = Machine(lists={path: ["https://download.docker.com/linux/debian"]}, bound=[])
    ran = play(machine, host_plan())
    assert not ran.failed, ran.log
    assert machine.lists == {}
    assert f"set aside {path} as {path}.disabled" in ran.log


def test_the_vendors_pin_of_its_own_repository_is_set_aside(play: Callable[..., Run]) -> None:
    machine = Machine(preferences=["cuda-repository-pin-600", "mine"], bound=[])
    assert not play(machine, host_plan()).failed
    assert machine.preferences == ["mine"]


@pytest.mark.parametrize(
    "lists",
    [
        {"/etc/apt/sources.list": ["https://download.docker.com/linux/debian"]},
        {
            "/etc/apt/sources.list.d/all.list": [
                "https://example.org/debian",
                "https://download.docker.com/linux/debian",
            ]
        },
    ],
)
def test_a_list_that_names_others_too_is_not_touched(play: Callable[..., Run], lists: dict[str, list[str]]) -> None:
    machine = Machine(lists=dict(lists), bound=[])
    ran = play(machine, host_plan())
    assert ran.failed
    assert machine.lists == lists
    assert f"Remove that entry from {next(iter(lists))}" in ran.log


def test_a_repository_that_is_no_longer_planned_is_dropped(play: Callable[..., Run], converged: Machine) -> None:
    """Two origins of one driver do not mix (field notes, nvidia.md, 1.1)."""
    archive = dataclasses.replace(DRIVER, source="ubuntu-archive", packages=("nvidia-driver-cuda",), repositories=())
    assert not play(converged, host_plan(archive)).failed
    own = [path for path in converged.files if path.endswith(".sources")]
    assert own == ["/etc/apt/sources.list.d/llmhost-docker.sources"]


def test_lists_of_other_repositories_are_not_touched(play: Callable[..., Run]) -> None:
    lists = {"/etc/apt/sources.list.d/mine.list": ["https://example.org/docker"]}
    machine = Machine(lists=dict(lists), bound=[])
    assert not play(machine, host_plan()).failed
    assert machine.lists == lists


# --- modules ----------------------------------------------------------------------------------------------------


def test_without_nouveau_the_modules_are_loaded_and_nothing_reboots(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[])
    ran = play(machine, host_plan())
    assert not ran.failed, ran.log
    assert ran.order(REBOOT) == [-1]
    assert (machine.boots, machine.loaded) == (1, OLD)


def test_another_branch_replaces_packages_and_reloads(play: Callable[..., Run], converged: Machine) -> None:
    converged.holders = ["vllm.service", "nvidia-persistenced.service"]
    converged.references = 2
    ran = play(converged, host_plan(DRIVER_595))
    assert not ran.failed, ran.log
    steps = ran.order(
        rf"--purge install --yes.* install nvidia-driver-pinning-{NEW} nvidia-driver-pinning-{OLD}-$",
        rf"--allow-change-held-packages .* install nvidia-driver-pinning-{NEW} nvidia-driver-cuda ",
        r"^systemctl stop vllm\.service nvidia-persistenced\.service nvidia-fabricmanager\.service",
        r"modprobe -r",
        LOAD,
        r"start .*nvidia-persistenced\.service",
        r"systemctl restart nvidia-cdi-refresh",
    )
    assert -1 not in steps
    assert steps == sorted(steps)
    assert ran.order(REBOOT) == [-1]
    assert (converged.loaded, converged.cdi) == (NEW, NEW)


def test_a_run_that_died_between_pin_and_driver_goes_on(play: Callable[..., Run], converged: Machine) -> None:
    """Nothing is lacking then, and nothing stands in the way: the versions alone tell."""
    del converged.packages[f"nvidia-driver-pinning-{OLD}"]
    converged.packages[f"nvidia-driver-pinning-{NEW}"] = "1"
    ran = play(converged, host_plan(DRIVER_595))
    assert not ran.failed, ran.log
    assert "replace libcuda1 580.178.04-1" in ran.log
    assert converged.loaded == NEW
    assert play(converged, host_plan(DRIVER_595)).done == []


@pytest.mark.parametrize(
    ("state", "tried_to_unload"),
    [({"holders": ["docker-1f.scope"], "references": 1}, False), ({"references": 1, "drains": False}, True)],
    ids=["a container holds it", "the kernel holds it"],
)
def test_modules_in_use_are_replaced_by_one_reboot(
    play: Callable[..., Run], converged: Machine, state: dict[str, Any], tried_to_unload: bool
) -> None:
    converged.set(**state)
    boots = converged.boots
    ran = play(converged, host_plan(DRIVER_595))
    assert not ran.failed, ran.log
    assert sum(bool(re.search(REBOOT, command)) for command in ran.done) == 1
    assert (converged.boots, converged.loaded) == (boots + 1, NEW)
    assert (ran.order("^systemctl stop vllm")[0] >= 0) is tried_to_unload


def test_a_newer_kernel_with_modules_is_reached_by_a_reboot(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], newest_kernel=NEXT)
    assert not play(machine, host_plan()).failed
    assert (machine.boots, machine.kernel, machine.loaded) == (2, NEXT, OLD)


def test_a_kernel_without_modules_fails_now(play: Callable[..., Run], converged: Machine) -> None:
    converged.set(disk="")
    ran = play(converged, host_plan())
    assert ran.failed
    assert ran.done == []
    assert f"there is no nvidia module for {GA}, the newest installed kernel" in ran.log


def test_reboot_allowed_never_stops_with_what_to_do(play: Callable[..., Run]) -> None:
    machine = Machine()
    ran = play(machine, host_plan(dataclasses.replace(DRIVER, reboot_allowed="never")))
    assert ran.failed
    assert (machine.boots, ran.order(REBOOT)) == (1, [-1])
    assert "nouveau holds the GPU. reboot_allowed is never. Reboot the host when it suits" in ran.log
    machine.reboot(re.match("", ""), "")  # type: ignore[arg-type]  # the match is not read: the operator reboots
    assert not play(machine, host_plan(dataclasses.replace(DRIVER, reboot_allowed="never"))).failed


SERVED: dict[str, Any] = {"active": "active", "sub": "running", "stale": False, "enabled": "enabled", "reload": False}


def test_modules_that_stay_leave_the_services_up_where_no_reboot_may_follow(
    play: Callable[..., Run], converged: Machine
) -> None:
    """The kernel itself holds on to them, which is seen only once the services have let go."""
    converged.units["vllm.service"] = dict(SERVED)
    converged.set(references=1, drains=False)
    ran = play(converged, host_plan(dataclasses.replace(DRIVER_595, reboot_allowed="never")))
    assert ran.failed
    assert (ran.order(REBOOT, "modprobe -r"), converged.loaded) == ([-1, -1], OLD)
    assert {unit: converged.units[unit]["active"] for unit in ("vllm.service", "nvidia-persistenced.service")} == {
        "vllm.service": "active",
        "nvidia-persistenced.service": "active",
    }
    assert "could not be unloaded: the kernel (1 uses). reboot_allowed is never." in ran.log
    assert "Running again: vllm.service, nvidia-persistenced.service." in ran.log


def test_a_service_that_was_down_before_the_reload_is_not_started(play: Callable[..., Run], converged: Machine) -> None:
    converged.units["vllm.service"] = {**SERVED, "active": "failed"}
    converged.set(references=1, drains=False)
    assert play(converged, host_plan(dataclasses.replace(DRIVER_595, reboot_allowed="never"))).failed
    assert converged.units["vllm.service"]["active"] == "inactive"


def test_a_module_that_somebody_else_holds_stops_nothing_where_no_reboot_may_follow(
    play: Callable[..., Run], converged: Machine
) -> None:
    converged.units["vllm.service"] = dict(SERVED)
    converged.set(references=1, holders=["the module gdrdrv"])
    ran = play(converged, host_plan(dataclasses.replace(DRIVER_595, reboot_allowed="never")))
    assert ran.failed
    assert ran.order("systemctl stop", "install .*nvidia-driver-cuda") == [-1, -1]
    assert "the module gdrdrv uses it. reboot_allowed is never" in ran.log
    assert "No package was changed" in ran.log


def test_a_host_that_is_stopped_before_its_packages_is_not_marked_as_ours(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], loaded="570.86.15", disk="570.86.15", holders=["trainer.service"], references=1)
    ran = play(machine, host_plan(dataclasses.replace(DRIVER, reboot_allowed="never")))
    assert "No package was changed" in ran.log
    assert (machine.contents, ran.done) == ({}, [])


def test_an_initial_file_system_that_stays_old_is_said_and_stops_nothing(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], keeps_initramfs=True)
    ran = play(machine, host_plan())
    assert not ran.failed, ran.log
    assert machine.loaded == OLD
    assert sum(command.startswith("update-initramfs") for command in ran.done) == 1
    assert "although update-initramfs was run" in ran.log


def test_an_initial_file_system_that_stays_old_stops_where_another_driver_has_the_gpu(play: Callable[..., Run]) -> None:
    machine = Machine(keeps_initramfs=True)
    ran = play(machine, host_plan())
    assert (ran.failed, machine.boots) == (True, 1)
    assert "after making the initial file system again the initial file system was made before" in ran.log


def test_a_first_boot_is_waited_for_once_and_said(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], first_boot="status: running")
    ran = play(machine, host_plan())
    assert not ran.failed, ran.log
    (wait,) = [at for at, command in enumerate(ran.done) if "cloud-init" in command]
    assert wait < ran.order("apt-get")[0]
    assert "wait for cloud-init, which still sets the host up: up to 300 s" in ran.log


def test_a_first_boot_that_hangs_is_waited_for_once(tmp_path: Path) -> None:
    (tmp_path / "cloud-init").write_text('#!/bin/sh\n[ "$2" != --wait ] || exec sleep 60\necho status: running\n')
    (tmp_path / "cloud-init").chmod(0o755)
    tools = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def said(script: str) -> list[str]:
        here = script.replace("/run/", f"{tmp_path}/").replace("timeout 300", "timeout 1")
        return subprocess.run(["sh", "-c", here], capture_output=True, text=True, env=tools).stdout.splitlines()

    look = FirstBoot()
    assert look.process(said(look.command())) is True
    assert said(_FIRST_BOOT) == []
    assert look.process(said(look.command())) is False


def test_a_first_boot_that_ended_is_not_waited_for(play: Callable[..., Run]) -> None:
    ran = play(Machine(bound=[]), host_plan())
    assert (ran.order("cloud-init"), "wait for cloud-init" in ran.log) == ([-1], False)


def test_a_reboot_that_did_not_help_is_not_done_at_every_deploy(play: Callable[..., Run]) -> None:
    """Its boot loader is held to the older kernel, say."""
    machine = Machine(bound=[], newest_kernel=NEXT, helpless=True)
    ran = play(machine, host_plan())
    assert (ran.failed, machine.boots) == (True, 2)
    assert machine.rebooted and machine.rebooted["boot_id"] == "boot-1"
    again = play(machine, host_plan())
    assert (again.failed, machine.boots) == (True, 2)
    for words in ("held to that kernel", "grub-editenv list", "remove /var/lib/llmhost/reboot.json"):
        assert words in again.log
    machine.set(helpless=False, kernel=NEXT)  # the operator mends it, and reboots
    mended = play(machine, host_plan())
    assert not mended.failed, mended.log
    assert machine.boots == 2
    assert machine.rebooted is None
    assert play(machine, host_plan()).done == []


def test_a_reboot_that_helped_leaves_no_record(play: Callable[..., Run]) -> None:
    machine = Machine()
    ran = play(machine, host_plan())
    record, reboot, forgotten = ran.order("umask 077", REBOOT, r"^rm -f /var/lib/llmhost/reboot\.json")
    assert -1 < record < reboot < forgotten
    assert machine.rebooted is None


def test_a_reboot_for_another_reason_is_done_again(play: Callable[..., Run]) -> None:
    machine = Machine(rebooted={"reason": "nova holds the GPU", "boot_id": "boot-0"})
    assert not play(machine, host_plan()).failed
    assert machine.boots == 2


def test_nvlink_5_needs_ib_umad_now_and_at_each_boot(play: Callable[..., Run]) -> None:
    switched = dataclasses.replace(DRIVER, fabric_manager=True, packages=(*DRIVER.packages, "nvlsm"))
    machine = Machine(bound=[], lacking=["ib_umad"])
    ran = play(machine, host_plan(switched, None))
    assert not ran.failed, ran.log
    assert machine.lacking == []
    lines = machine.contents["/etc/modules-load.d/llmhost-nvidia.conf"].splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["nvidia_uvm", "ib_umad"]
    machine.set(lacking=["ib_umad"])
    assert "load the modules: ib_umad is not loaded" in play(machine, host_plan(switched, None)).log
    assert play(machine, host_plan(switched, None)).done == []


def test_the_machine_that_pyinfra_runs_on_is_not_rebooted(
    play: Callable[..., Run], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "boot_id"
    own.write_text("boot-1\n")
    monkeypatch.setattr(infra.reboot, "BOOT_ID", str(own))
    machine = Machine()
    ran = play(machine, host_plan())
    assert ran.failed
    assert (machine.boots, ran.order(REBOOT)) == (1, [-1])
    assert "pyinfra runs on this machine" in ran.log


def test_a_host_that_does_not_come_back_is_said(play: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infra.reboot, "LIMIT_SECONDS", 0)
    machine = Machine()
    monkeypatch.setattr(machine, "reboot", lambda found, stdin: "")
    ran = play(machine, host_plan())
    assert ran.failed
    assert "did not come back from its reboot within 0 s" in ran.log


def test_a_run_that_died_after_the_packages_goes_on(play: Callable[..., Run]) -> None:
    machine = Machine()
    play(machine, host_plan(dataclasses.replace(DRIVER, reboot_allowed="never")))
    ran = play(machine, host_plan())
    assert not ran.failed, ran.log
    assert ran.order("apt-get.* install nvidia-driver-cuda") == [-1]
    assert machine.loaded == OLD


KEPT = dataclasses.replace(DRIVER, source="installed", packages=(), repositories=(), blacklist_nouveau=False)
STATIC = {"active": "inactive", "sub": "dead", "stale": False, "enabled": "static", "reload": False}


def test_an_installed_driver_is_kept_and_made_persistent(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], loaded=OLD, disk=OLD, units={"nvidia-persistenced.service": dict(STATIC)})
    ran = play(machine, host_plan(KEPT, None))
    assert not ran.failed, ran.log
    assert ran.order("apt-get") == [-1]
    assert "/etc/llmhost/driver" not in machine.contents
    assert machine.units["nvidia-persistenced.service"]["active"] == "active"


def test_an_installed_driver_is_not_upgraded(play: Callable[..., Run]) -> None:
    """Its modules are not reloaded either: the engine would be left with two versions."""
    machine = Machine(bound=[], loaded=OLD, disk=OLD, newer=dict(NEWER_KERNEL))
    ran = play(machine, host_plan(KEPT, None), upgrade=True)
    assert not ran.failed, ran.log
    assert ran.order("apt-get") == [-1]


def test_an_installed_driver_without_a_daemon_gets_none(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[])
    ran = play(machine, host_plan(KEPT, None))
    assert not ran.failed, ran.log
    assert machine.units == {}
    assert not any("nvidia-persistenced" in path or "modules-load" in path for path in machine.contents)


def test_the_fabric_manager_runs_where_it_is_planned(play: Callable[..., Run]) -> None:
    ran = play(Machine(bound=[]), host_plan(dataclasses.replace(DRIVER, fabric_manager=True), None))
    assert ran.order(r"systemctl start .*nvidia-fabricmanager\.service", r"^systemctl enable .*fabricmanager") != [
        -1,
        -1,
    ]
    assert not any("fabricmanager" in c and "start" in c for c in play(Machine(bound=[]), host_plan(DRIVER, None)).done)


def test_the_fabric_manager_of_a_driver_without_a_persistence_daemon_runs(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], loaded=OLD, disk=OLD)
    ran = play(machine, host_plan(dataclasses.replace(KEPT, fabric_manager=True), None))
    assert not ran.failed, ran.log
    assert list(machine.units) == ["nvidia-fabricmanager.service"]
    assert machine.units["nvidia-fabricmanager.service"]["active"] == "active"


# --- upgrade.py -------------------------------------------------------------------------------------------------

NEWER_DOCKER = {"docker-ce": ("5:29.7.2", "5:29.8.0")}
NEWER_KERNEL = {"linux-headers-amd64": ("6.1.40-1", "6.1.41-1"), f"linux-headers-{NEXT}": ("", "6.1.41-1")}


def test_an_upgrade_installs_what_is_newer_in_one_transaction(play: Callable[..., Run], converged: Machine) -> None:
    converged.newer = dict(NEWER_KERNEL)
    ran = play(converged, host_plan(), upgrade=True)
    assert not ran.failed, ran.log
    (only,) = [command for command in ran.done if "apt-get" in command]
    assert only.endswith("install linux-headers-amd64")
    assert "--only-upgrade" in only
    assert "--allow-change-held-packages" not in only
    assert ran.changed == ["NVIDIA driver | newer driver and kernels"]
    assert f"install linux-headers-{NEXT} 6.1.41-1" in ran.log


def test_an_upgrade_asks_for_what_unattended_upgrades_leave_alone(play: Callable[..., Run], converged: Machine) -> None:
    play(converged, host_plan(), upgrade=True)
    asked = [command for command in converged.asked if "apt-get -s --only-upgrade" in command]
    assert [re.findall(r"--regexp=(\S+?)'? ", f"{command} ") for command in asked] == [
        ["nvidia-", "linux-image-"],
        ["docker-ce", "nvidia-"],
    ]
    assert all("APT::Update::Error-Mode=any" in command for command in asked)


def test_an_upgrade_stops_before_apt_where_somebody_elses_work_has_the_gpu(
    play: Callable[..., Run], converged: Machine
) -> None:
    converged.set(newer=dict(NEWER_KERNEL), holders=["trainer.service"], references=1)
    never = host_plan(dataclasses.replace(DRIVER, reboot_allowed="never"))
    ran = play(converged, never, upgrade=True)
    assert (ran.failed, ran.done) == (True, [])
    assert "trainer.service uses it. reboot_allowed is never" in ran.log
    assert "No package was changed" in ran.log
    assert not play(converged, never).failed, "a deploy changes nothing, and need not stop"


def test_an_upgrade_of_a_host_that_has_the_newest_changes_nothing(play: Callable[..., Run], converged: Machine) -> None:
    ran = play(converged, host_plan(), upgrade=True)
    assert (ran.done, ran.changed, ran.failed) == ([], [], False)


def test_a_deploy_upgrades_nothing(play: Callable[..., Run], converged: Machine) -> None:
    converged.newer = {**NEWER_KERNEL, **NEWER_DOCKER}
    assert play(converged, host_plan()).done == []


def test_upgrade_py_is_deploy_py_with_upgrades() -> None:
    def steps(name: str) -> list[str]:
        return re.findall(r"^(?:from|plan|\w+\().*", (ROOT / name).read_text(), re.MULTILINE)

    assert [line.replace("(plan, upgrade=True)", "(plan)") for line in steps("upgrade.py")] == steps("deploy.py")
    assert sum("upgrade=True" in line for line in steps("upgrade.py")) == 2


# --- Docker -----------------------------------------------------------------------------------------------------


def test_packages_that_stand_in_dockers_way_go_in_the_same_transaction(play: Callable[..., Run]) -> None:
    machine = Machine(bound=[], packages={"docker.io": "26.1", "runc": "1.1", "runcible": "1"})
    ran = play(machine, host_plan())
    assert ran.order(r"install docker-ce docker-ce-cli containerd\.io docker-compose-plugin docker\.io- runc-$") != [-1]
    assert "runcible" in machine.packages


@pytest.mark.parametrize("version", ["1.19.0-1", "1.20.1-1"], ids=["older", "newer"])
def test_another_version_of_the_toolkit_is_replaced(play: Callable[..., Run], converged: Machine, version: str) -> None:
    converged.packages["libnvidia-container1"] = version
    ran = play(converged, host_plan())
    (only,) = [command for command in ran.done if "apt-get" in command]
    assert "--allow-downgrades" in only
    assert only.endswith("install nvidia-container-toolkit=1.20.0-1 libnvidia-container1=1.20.0-1")
    assert f"libnvidia-container1=1.20.0-1 in place of {version}" in ran.log


def test_a_daemon_json_that_cannot_be_read_is_not_replaced(play: Callable[..., Run], converged: Machine) -> None:
    converged.daemon_fault = "Expecting value: line 1"
    ran = play(converged, host_plan())
    assert ran.failed
    assert ran.done == []
    assert "/etc/docker/daemon.json cannot be read: Expecting value: line 1. It is not llmhost's to replace" in ran.log


@pytest.mark.parametrize("lacking", ["libnvidia-container1", "docker-compose-plugin", "linux-headers-amd64"])
def test_only_what_is_lacking_is_given_to_apt(play: Callable[..., Run], converged: Machine, lacking: str) -> None:
    """What is there and will do would move to its newest: a kernel's meta package, a Docker under its containers."""
    del converged.packages[lacking]
    ran = play(converged, host_plan())
    assert not ran.failed, ran.log
    (only,) = [command for command in ran.done if "apt-get" in command]
    assert re.search(rf" install {lacking}(=1\.20\.0-1)?$", only), only[-200:]


def test_a_docker_that_is_too_old_is_replaced_with_what_is_of_its_version(
    play: Callable[..., Run], converged: Machine
) -> None:
    converged.packages["docker-ce"] = "5:24.0.7-1~debian.12~bookworm"
    ran = play(converged, host_plan())
    assert not ran.failed, ran.log
    (only,) = [command for command in ran.done if "apt-get" in command]
    assert only.endswith(" install docker-ce docker-ce-cli containerd.io")
    assert "replace docker-ce 5:24.0.7-1" in ran.log
    assert play(converged, host_plan()).done == []


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"docker-ce": "5:26.1.0-1~debian.12~bookworm", "containerd.io": "1.6"}, []),
        ({"docker-ce": "5:26.0.2-1~ubuntu", "containerd.io": "1.6", "runc": "1"}, ["docker-ce", "containerd.io"]),
        ({"docker.io": "20.10.24+dfsg1-1"}, ["docker.io"]),
        ({"docker.io": "28.2.2-0ubuntu1~24.04.1"}, []),
        ({}, []),
    ],
)
def test_a_docker_that_is_too_old_is_found(installed: dict[str, str], expected: list[str]) -> None:
    assert outdated_engine(installed, "26.1") == expected


def test_a_registry_mirror_restarts_docker_once(play: Callable[..., Run], converged: Machine) -> None:
    mirrored = host_plan(docker=dataclasses.replace(CONTAINERS, registry_mirror="https://mirror.example.org"))
    ran = play(converged, mirrored)
    assert len(ran.done) == 2
    assert ran.order("registry-mirrors", r"restart docker\.service") == [0, 1]
    assert play(converged, mirrored).done == []


def test_a_docker_that_runs_as_configured_is_not_restarted(play: Callable[..., Run], converged: Machine) -> None:
    converged.adoptable = True
    ran = play(converged, host_plan())
    assert len(ran.done) == 1
    assert "/usr/local/lib/llmhost/inputs record docker.service" in ran.done[0]


def test_a_stale_cdi_specification_is_made_again(play: Callable[..., Run], converged: Machine) -> None:
    converged.cdi = "570.1"
    ran = play(converged, host_plan())
    assert not ran.failed
    (only,) = ran.done
    assert "systemctl restart nvidia-cdi-refresh.service" in only


@pytest.mark.parametrize(("frozen", "whose"), [((), "another system"), (("nvidia-",), "this system")])
def test_the_cdi_specification_is_judged_by_whose_driver_it_is(
    play: Callable[..., Run], frozen: tuple[str, ...], whose: str
) -> None:
    machine = Machine(bound=[], loaded=OLD, disk=OLD)
    play(machine, host_plan(dataclasses.replace(KEPT, frozen=frozen)))
    asked = [command for command in machine.asked if "nvidia-cdi-refresh.path" in command]
    assert asked
    assert all(f"'{whose}' );" in command for command in asked), asked[0][-80:]


@pytest.mark.parametrize(
    ("listed", "whose", "fault"),
    [
        ("nvidia.com/gpu=all", "another system", ""),
        ("nvidia.com/gpu=0", "another system", "nvidia-ctk does not list nvidia.com/gpu=all"),
        ("nvidia.com/gpu=all", "this system", "no NVIDIA driver is loaded"),
    ],
    ids=["WSL", "WSL without", "a host without a driver"],
)
def test_wsl_has_neither_a_module_nor_a_node(tmp_path: Path, listed: str, whose: str, fault: str) -> None:
    (tmp_path / "nvidia-ctk").write_text(f"#!/bin/sh\necho {listed}\n")
    (tmp_path / "nvidia-ctk").chmod(0o755)
    program = re.sub(r'"/(sys|dev|var|etc)\b', rf'"{tmp_path}/\1', CdiState.program)
    tools = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", program, whose], capture_output=True, text=True, env=tools)
    assert json.loads(ended.stdout)["fault"] == fault, ended.stderr


def test_docker_alone_gets_no_toolkit(play: Callable[..., Run]) -> None:
    alone = dataclasses.replace(CONTAINERS, toolkit_version="", toolkit_packages=())
    ran = play(Machine(), host_plan(None, alone))
    assert not ran.failed, ran.log
    assert ran.order("nvidia-ctk", "nvidia-cdi", "gpu-image") == [-1, -1, -1]
