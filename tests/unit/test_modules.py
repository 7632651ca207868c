"""Load, reload, reboot or stop: decided from what is loaded, on disk and in user space (nvidia.md, 2.5)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nvidia import _LOAD, MODULES, NvidiaModules
from llmhost.modules import (
    OWN_HOLDERS,
    REBOOT_RECORD,
    Action,
    Module,
    ModuleState,
    Reboot,
    due,
    extra_modules,
    gives_way,
    other_versions,
    stranding,
)
from llmhost.plan.model import DriverPlan

OLD, NEW = "580.178.04", "595.91.07"
GA, NEXT = "6.1.0-40-amd64", "6.1.0-41-amd64"


def driver(**changes: Any) -> DriverPlan:
    plan = DriverPlan(
        branch="580",
        version=OLD,
        modules="open",
        source="cuda-repository",
        packages=(f"nvidia-driver-pinning-{OLD}", "nvidia-driver-cuda", "nvidia-kernel-open-dkms"),
        fabric_manager=False,
        reboot_expected=False,
        generation="ampere",
        gpus=1,
        prebuilt=False,
        repositories=(),
        pins=(),
        blacklist_nouveau=True,
        frozen=(),
        cuda_toolkit="none",
        reboot_allowed="auto",
    )
    return dataclasses.replace(plan, **changes)


def state(**changes: Any) -> ModuleState:
    """A host on which the driver runs as installed."""
    running = Module(OLD, "open")
    return dataclasses.replace(
        ModuleState(
            boot_id="b",
            kernel=GA,
            newest_kernel=GA,
            loaded=running,
            uvm=True,
            disk=running,
            newest=running,
            user_space=OLD,
            references=0,
            holders=(),
            bound=(),
            initramfs_stale=False,
        ),
        **changes,
    )


UPGRADED: dict[str, Any] = {"disk": Module(NEW, "open"), "newest": Module(NEW, "open"), "user_space": NEW}


@pytest.mark.parametrize(
    ("changes", "tried", "action", "words"),
    [
        ({}, (), "nothing", f"the driver {OLD} \\(open modules\\) is loaded"),
        ({"loaded": Module(), "uvm": False}, (), "load", "is not loaded"),
        ({"uvm": False}, (), "load", "nvidia_uvm is not loaded"),
        ({"user_space": ""}, (), "nothing", "is loaded"),
        (UPGRADED, (), "reload", f"{OLD} \\(open modules\\) is loaded, installed is the driver {NEW}"),
        ({**UPGRADED, "holders": ("vllm.service", "nvidia-persistenced.service")}, (), "reload", "installed is"),
        ({**UPGRADED, "holders": ("docker-1f.scope",)}, (), "reboot", "docker-1f.scope uses it"),
        ({**UPGRADED, "references": 2}, ("reload",), "reboot", "could not be unloaded: the kernel \\(2 uses\\)"),
        ({"loaded": Module(OLD, "closed")}, (), "reload", "closed modules\\) is loaded"),
        ({"loaded": Module(), "bound": ("nouveau",)}, (), "reboot", "nouveau holds the GPU"),
        ({"loaded": Module(), "bound": ("nouveau",), "initramfs_stale": True}, (), "initramfs", "blacklisted"),
        ({"loaded": Module(), "bound": ("nouveau",)}, ("initramfs", "reboot"), "stop", "after .* and a reboot nouveau"),
        ({"initramfs_stale": True}, ("initramfs",), "nothing", "is loaded"),
        ({"initramfs_stale": True, "bound": ("nouveau",)}, ("initramfs",), "stop", "after making the initial file"),
        ({"loaded": Module(), "uvm": False}, ("load",), "stop", "after modprobe .* is not loaded"),
        ({"loaded": Module(), "uvm": False}, ("reboot",), "load", "is not loaded"),
        ({"disk": Module(), "loaded": Module(), "newest_kernel": NEXT}, (), "reboot", f"{NEXT}, running is {GA}"),
        ({"disk": Module(), "newest_kernel": NEXT}, (), "nothing", "is loaded"),
        ({"newest": Module(), "newest_kernel": NEXT}, (), "stop", f"no nvidia module for {NEXT}"),
        ({"newest": Module(NEW, "open")}, (), "stop", f"user space is {OLD}, the module for {GA} is {NEW}"),
        ({"newest": Module(OLD, "closed")}, (), "stop", "closed flavour, planned is open"),
    ],
)
def test_what_is_due(changes: dict[str, Any], tried: tuple[Action, ...], action: Action, words: str) -> None:
    found = due(state(**changes), driver(), tried)
    assert found.action == action
    assert re.search(words, found.words), found.words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disk": Module(), "loaded": Module(), "newest_kernel": NEXT}, "Is its boot loader held to that kernel"),
        ({"loaded": Module(), "bound": ("nouveau",)}, f"lsinitramfs /boot/initrd.img-{GA} | grep nouveau"),
        ({**UPGRADED, "holders": ("Xorg",)}, "Is it in the initial file system"),
    ],
    ids=["kernel", "nouveau", "initial file system"],
)
def test_a_reboot_that_did_not_help_is_followed_by_words(changes: dict[str, Any], words: str) -> None:
    before = state(**changes)
    first = due(before, driver())
    assert first.action == "reboot"
    done = Reboot(first.reason, before.boot_id)
    assert due(state(**changes, rebooted=done), driver()).action == "reboot", "the run died before it was done"
    later = due(state(**changes, rebooted=done, boot_id="another"), driver())
    assert later.action == "stop"
    assert words in later.words
    assert REBOOT_RECORD in later.words


@pytest.mark.parametrize(
    ("changes", "plan", "strands"),
    [
        ({"holders": ("trainer.service",)}, driver(version="595.91.07", branch="595"), True),
        (
            {"holders": ("vllm.service",)},
            driver(version="595.91.07", branch="595"),
            False,
        ),  # it is stopped for a reload
        ({"holders": ("trainer.service",)}, driver(), False),
        ({"holders": ("trainer.service",)}, driver(source="ubuntu-archive", version="580.1.1"), False),
        ({"holders": ("trainer.service",)}, driver(source="installed", version="595.91.07"), False),
        ({"holders": ("trainer.service",), "loaded": Module()}, driver(version="595.91.07"), False),
        # An earlier run changed them already: what is due is said by `due`.
        ({"holders": ("trainer.service",), "user_space": "595.91.07"}, driver(version="595.91.07"), False),
    ],
)
def test_packages_are_not_changed_under_somebody_elses_feet(
    changes: dict[str, Any], plan: DriverPlan, strands: bool
) -> None:
    found = stranding(state(**changes), plan)
    assert (found is not None) == strands
    assert found is None or "trainer.service uses it" in found.words


@pytest.mark.parametrize(
    ("changes", "source", "strands"),
    [
        ({"holders": ("trainer.service",)}, "ubuntu-archive", True),
        ({"holders": ("trainer.service",)}, "cuda-repository", True),
        ({"holders": ("trainer.service",)}, "installed", False),
        ({"holders": ("vllm.service",)}, "ubuntu-archive", False),
        ({"holders": ("trainer.service",), "loaded": Module()}, "ubuntu-archive", False),
    ],
)
def test_an_upgrade_may_replace_any_loaded_driver(changes: dict[str, Any], source: str, strands: bool) -> None:
    found = stranding(state(**changes), driver(source=source), upgrade=True)
    assert (found is not None) == strands
    assert found is None or "an upgrade may replace it, and trainer.service uses it" in found.words


def test_who_holds_the_modules_does_not_make_it_another_reason() -> None:
    found = [due(state(**UPGRADED, holders=(holder,)), driver()).reason for holder in ("docker-1f.scope", "Xorg")]
    assert found[0] == found[1]


@pytest.mark.parametrize("plan", [driver(), driver(source="installed", packages=())], ids=["ours", "kept"])
def test_a_further_module_is_loaded(plan: DriverPlan) -> None:
    assert due(state(lacking=("ib_umad",)), plan).words == "ib_umad is not loaded"
    assert due(state(lacking=("ib_umad",), uvm=False), plan).words == "nvidia_uvm and ib_umad are not loaded"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fabric_manager": True, "packages": ("nvidia-fabricmanager", "nvlsm")}, ("ib_umad",)),
        ({"fabric_manager": True, "packages": ("nvidia-fabricmanager",)}, ()),
        ({}, ()),
    ],
)
def test_nvlink_5_needs_a_further_module(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert extra_modules(driver(**changes)) == expected


KEPT = driver(source="installed", packages=())


@pytest.mark.parametrize(
    ("changes", "tried", "action"),
    [
        ({}, (), "nothing"),
        ({"loaded": Module(NEW, "closed"), "newest": Module(), "disk": Module()}, (), "nothing"),
        ({"loaded": Module(), "uvm": False, "newest": Module(), "disk": Module()}, (), "nothing"),
        ({"loaded": Module(), "uvm": False}, (), "load"),
        ({"uvm": False}, ("load",), "stop"),
    ],
    ids=["runs", "another flavour", "no modules of its own: WSL", "not loaded", "does not load"],
)
def test_an_installed_driver_is_loaded_at_most(changes: Any, tried: tuple[Action, ...], action: Action) -> None:
    assert due(state(**changes), KEPT, tried).action == action


modules = st.builds(
    lambda version, flavour: Module(version, flavour if version else ""),
    st.sampled_from(["", OLD, NEW]),
    st.sampled_from(["open", "closed"]),
)
states = st.builds(
    ModuleState,
    boot_id=st.just("b"),
    kernel=st.just(GA),
    newest_kernel=st.sampled_from([GA, NEXT]),
    loaded=modules,
    uvm=st.booleans(),
    disk=modules,
    newest=modules,
    user_space=st.sampled_from(["", OLD, NEW]),
    references=st.integers(0, 3),
    holders=st.lists(st.sampled_from(["vllm.service", "Xorg"]), max_size=2).map(tuple),
    bound=st.lists(st.sampled_from(["nouveau", "nova"]), max_size=1).map(tuple),
    initramfs_stale=st.booleans(),
)


@given(st.lists(states, min_size=8, max_size=8))
def test_whatever_the_host_does_it_ends_and_reboots_once(seen: list[ModuleState]) -> None:
    tried: list[Action] = []
    for each in seen:
        step = due(each, driver(), tried)
        if step.action in ("nothing", "stop"):
            break
        assert step.action not in tried
        tried.append(step.action)
    else:
        pytest.fail(f"after {tried} there is still something to do")
    assert tried.count("reboot") <= 1


@given(states)
def test_nothing_is_due_only_where_the_driver_runs(seen: ModuleState) -> None:
    found = due(seen, driver())
    runs = seen.loaded.version == (seen.user_space or seen.newest.version) != "" and seen.loaded.modules == "open"
    lasts = seen.newest == seen.loaded
    assert (found.action == "nothing") == (runs and lasts and seen.uvm and not seen.initramfs_stale)


@given(states)
def test_a_host_that_cannot_boot_into_the_driver_is_not_rebooted(seen: ModuleState) -> None:
    if due(seen, driver()).action == "reboot":
        assert seen.newest == Module(seen.user_space or seen.newest.version, "open")


UBUNTU = driver(
    source="ubuntu-archive",
    prebuilt=True,
    packages=(
        "nvidia-headless-no-dkms-580-server-open",
        "nvidia-utils-580-server",
        "linux-modules-nvidia-580-server-open-generic",
    ),
)


@pytest.mark.parametrize(
    ("name", "plan", "expected"),
    [
        ("nvidia-utils-580-server", UBUNTU, False),
        ("nvidia-utils-570-server", UBUNTU, True),
        ("libnvidia-compute-580-server", UBUNTU, False),
        ("libnvidia-compute-595-server", UBUNTU, True),
        ("nvidia-firmware-580-server-580.178.04", UBUNTU, False),
        ("linux-modules-nvidia-580-server-open-6.8.0-149-generic", UBUNTU, False),
        ("linux-modules-nvidia-570-server-open-6.8.0-149-generic", UBUNTU, True),
        ("linux-modules-nvidia-580-server-generic", UBUNTU, True),
        ("linux-objects-nvidia-580-server-6.8.0-149-generic", UBUNTU, True),
        ("nvidia-dkms-580-server-open", UBUNTU, True),
        ("nvidia-headless-580-server-open", UBUNTU, True),
        ("nvidia-kernel-common-580-server", UBUNTU, False),
        ("nvidia-driver-pinning-580", UBUNTU, True),
        ("nvidia-driver-pinning-580.178.04", driver(), False),
        ("nvidia-driver-pinning-595.91.07", driver(), True),
        ("nvidia-kernel-dkms", driver(), True),
        ("nvidia-kernel-open-dkms", driver(modules="closed", packages=("nvidia-kernel-dkms",)), True),
        ("nvidia-kernel-dkms", driver(modules="closed", packages=("nvidia-kernel-dkms",)), False),
        ("nvidia-kernel-support", driver(), False),
        ("linux-modules-nvidia-580-server-open-generic", driver(), True),
        ("cuda-drivers-580", driver(), True),
        ("nvidia-container-toolkit", driver(), False),
        ("libnvidia-container1", UBUNTU, False),
        ("nvidia-driver-local-repo-ubuntu2404-580.95.05", UBUNTU, False),
        ("nvidia-settings", UBUNTU, False),
        ("nvidia-cuda-toolkit", UBUNTU, False),
        ("linux-modules-nvidia-fs-6.8.0-149-generic", UBUNTU, False),
        ("linux-modules-nvidia-fs-generic", UBUNTU, False),
        ("linux-modules-nvidia-fs-generic", driver(), False),
        ("linux-image-5.15.0-203-nvidia", UBUNTU, False),
        ("linux-headers-5.15.0-203-nvidia", UBUNTU, False),
        ("linux-modules-5.15.0-203-nvidia", driver(), False),
        ("nvidia-fs-dkms", UBUNTU, False),
        ("linux-nvidia-6.8", UBUNTU, False),
        ("nvidia-firmware-570-server-570.195.03", UBUNTU, True),
        ("xserver-xorg-video-nvidia-570", UBUNTU, True),
        ("nvidia-tesla-470-driver", driver(), True),
        ("libnvidia-nscq-570", driver(), True),
    ],
)
def test_what_gives_way(name: str, plan: DriverPlan, expected: bool) -> None:
    assert gives_way(name, plan) is expected


DRIVER_FAMILIES = ("nvidia-", "libnvidia-", "xserver-xorg-video-nvidia-", "cuda-drivers")
MODULE_FAMILIES = tuple(f"linux-{kind}-nvidia-" for kind in ("modules", "objects", "signatures"))
WORDS = re.findall(
    r"\S+",
    "linux image headers modules objects tools nvidia libnvidia fs container container1 toolkit cuda drivers driver "
    "dkms open server generic 570 580 595 203 5.15.0 6.8.0 149 lowlatency docker2 settings pinning kernel",
)


@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=7).map("-".join), st.sampled_from([driver(), UBUNTU]))
def test_no_name_outside_the_drivers_families_gives_way(name: str, plan: DriverPlan) -> None:
    if not gives_way(name, plan):
        return
    assert name.startswith((*DRIVER_FAMILIES, *MODULE_FAMILIES))
    assert name.startswith(DRIVER_FAMILIES) or re.match(r"linux-\w+-nvidia-\d{3}-", name), "a kernel's, or nvidia-fs'"
    assert not name.startswith(("nvidia-container", "libnvidia-container")) or re.search(r"-\d{3}(-|$)", name)


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"libcuda1": f"{OLD}-1", "nvidia-kernel-open-dkms": f"{OLD}-1", "nvidia-settings": "1"}, []),
        ({"libcuda1": f"{NEW}-1"}, ["libcuda1"]),
        (
            {"libnvidia-compute-580": f"2:{OLD}-1ubuntu1", "nvidia-dkms-580-open": "580.95.05-1"},
            ["nvidia-dkms-580-open"],
        ),
        ({}, []),
    ],
)
def test_packages_of_another_version_are_found(installed: dict[str, str], expected: list[str]) -> None:
    assert other_versions(installed, driver()) == expected
    assert other_versions(installed, UBUNTU) == []


# --- the look itself, at a machine made of files ----------------------------------------------------------------


BLACKLIST = "/etc/modprobe.d/llmhost-nouveau.conf"


@dataclasses.dataclass
class Root:
    """A machine's files below a directory, and the program that looks at them."""

    path: Path

    def write(self, name: str, text: str = "", age_seconds: int = 0) -> None:
        file = self.path / name[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, (time.time() - age_seconds,) * 2)

    def module(self, name: str, references: int, *holders: str) -> None:
        self.write(f"/sys/module/{name}/refcnt", f"{references}\n")
        (self.path / f"sys/module/{name}/holders").mkdir()
        for holder in holders:
            self.write(f"/sys/module/{name}/holders/{holder}")

    def process(self, pid: int, unit: str) -> None:
        """One that has a device of the driver open."""
        self.write(f"/proc/{pid}/cgroup", f"0::/system.slice/{unit}\n")
        (self.path / f"proc/{pid}/fd").mkdir()
        (self.path / f"proc/{pid}/fd/3").symlink_to("/dev/nvidia0")

    def look(self, meanwhile: str = "raise SystemExit('it waits')") -> dict[str, Any]:
        """+ meanwhile: Python, which happens in each two seconds that it waits"""
        program = re.sub(r'"/(sys|boot|lib|proc)\b', rf'"{self.path}/\1', NvidiaModules.program)
        program = program.replace("time.sleep(2)", meanwhile)
        files = (f"{self.path}{BLACKLIST}", f"{self.path}{REBOOT_RECORD}")
        asked = json.dumps([files[0], MODULES, ["ib_umad"], files[1], sorted(OWN_HOLDERS)])
        tools = {"PATH": f"{self.path}/bin:/usr/bin:/bin"}
        ended = subprocess.run([sys.executable, "-c", program, asked], capture_output=True, text=True, env=tools)
        assert ended.returncode == 0, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        return found


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A host that runs GA, with the driver loaded as a real one's lsmod shows it."""
    made = Root(tmp_path)
    for name, text in {"uname": f"echo {GA}", "modinfo": "exit 1", "dpkg-query": "exit 1"}.items():
        made.write(f"/bin/{name}", f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    made.module("nvidia", 3, "nvidia_uvm", "nvidia_drm", "nvidia_modeset")
    made.module("nvidia_modeset", 1, "nvidia_drm")
    made.module("nvidia_uvm", 0)
    made.module("nvidia_drm", 0)
    made.write(f"/lib/modules/{GA}/vmlinuz")
    return made


def test_modules_that_only_use_each_other_have_no_references(root: Root) -> None:
    assert (root.look()["references"], root.look()["holders"]) == (0, [])
    root.write("/sys/module/nvidia/refcnt", "5\n")
    root.write("/sys/module/nvidia_drm/refcnt", "1\n")
    assert root.look()["references"] == 3


def test_a_module_of_somebody_else_is_a_holder(root: Root) -> None:
    root.write("/sys/module/nvidia/refcnt", "4\n")
    root.write("/sys/module/nvidia/holders/gdrdrv")
    seen = root.look(meanwhile="pass")
    assert (seen["references"], seen["holders"]) == (0, ["the module gdrdrv"])


def test_who_only_asks_for_a_figure_holds_nothing(root: Root) -> None:
    """A monitoring service's nvidia-smi: its next one is another process."""
    root.write("/sys/module/nvidia/refcnt", "5\n")
    root.process(100, "vllm.service")
    root.process(200, "telegraf.service")
    proc = root.path / "proc"
    poll = f"os.rename('{proc}/200', '{proc}/300') if os.path.exists('{proc}/200') else None"
    left = f"open('{root.path}/sys/module/nvidia/refcnt', 'w').write('4')"
    seen = root.look(meanwhile=f"{poll}; {left}")
    assert (seen["holders"], seen["references"]) == (["vllm.service"], 1)


def test_who_stays_is_a_holder(root: Root) -> None:
    root.process(200, "trainer.service")
    waits = root.path / "waits"
    assert root.look(meanwhile=f"open('{waits}', 'a').write('x')")["holders"] == ["trainer.service"]
    assert waits.read_text() == "xx"


def test_where_nobody_else_is_nothing_waits(root: Root) -> None:
    root.process(100, "vllm.service")
    assert root.look()["holders"] == ["vllm.service"]


def test_a_further_module_is_seen(root: Root) -> None:
    assert root.look()["lacking"] == ["ib_umad"]
    root.module("ib_umad", 0)
    assert root.look()["lacking"] == []


def test_initial_file_systems_of_the_running_and_the_newest_kernel_count(root: Root) -> None:
    root.write(BLACKLIST, age_seconds=60)
    root.write(f"/boot/initrd.img-{GA}")
    root.write("/boot/initrd.img-5.10.0-1-amd64", age_seconds=600)  # of a kernel that was removed
    root.write("/boot/initrd.img-6.0.0-1-amd64", age_seconds=600)
    root.write("/lib/modules/6.0.0-1-amd64/vmlinuz")  # of an older one
    root.write(f"/boot/initrd.img-{GA}.old-dkms", age_seconds=600)
    (root.path / f"boot/initrd.img-{NEXT}").symlink_to("/nonexistent")
    root.write(f"/lib/modules/{NEXT}/vmlinuz")
    assert root.look()["initramfs_stale"] is False
    root.write(f"/boot/initrd.img-{GA}", age_seconds=600)
    assert root.look()["initramfs_stale"] is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"reason": "r", "boot_id": "b"}', {"reason": "r", "boot_id": "b"}), ("", None), ("{half", None), ("[1]", None)],
)
def test_the_record_of_a_reboot_is_read(root: Root, text: str, expected: Any) -> None:
    assert root.look()["rebooted"] is None
    root.write(REBOOT_RECORD, text)
    assert root.look()["rebooted"] == expected


# --- loading, with stand-ins for what the kernel's tools answer -------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "code", "words"),
    [
        ({}, 0, ""),
        ({"modprobe": "echo $1: No such device; exit 1"}, 1, "modprobe nvidia: nvidia: No such device"),
        ({"modprobe": "[ $1 = nvidia ] || sleep 60"}, 1, "modprobe nvidia_uvm: no end within 1 s"),
        ({"modprobe": "echo Key was rejected by service; exit 1"}, 1, "Secure Boot refuses the module"),
        ({"nvidia-smi": "echo No devices were found; exit 6"}, 1, "nvidia-smi -L: No devices were found"),
        ({"nvidia-smi": "exec sleep 60"}, 1, "nvidia-smi -L: no answer within 1 s"),
    ],
    ids=["well", "no device", "hangs", "Secure Boot", "no answer", "nvidia-smi hangs"],
)
def test_loading_ends_and_says_why(tmp_path: Path, tools: dict[str, str], code: int, words: str) -> None:
    for name in ("modprobe", "nvidia-smi", "nvidia-modprobe", "journalctl"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{tools.get(name, 'true')}\n")
        (tmp_path / name).chmod(0o755)
    script = _LOAD.format(modules="nvidia nvidia_uvm").replace("300", "1")
    tools_first = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    ended = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=tools_first, timeout=30)
    assert (ended.returncode, words in ended.stderr) == (code, True), ended.stderr
