"""Load, reload, reboot or stop: decided from what is loaded, on disk and in user space (nvidia.md, 2.5)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.modules import Action, Module, ModuleState, due, gives_way, other_versions
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
    assert re.search(words, found.reason), found.reason


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
    ],
)
def test_what_gives_way(name: str, plan: DriverPlan, expected: bool) -> None:
    assert gives_way(name, plan) is expected


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
