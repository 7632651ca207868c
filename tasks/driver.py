"""The NVIDIA driver: from a known key to modules in the kernel that are those of the packages."""

from __future__ import annotations

from functools import partial

from infra.apt import leftovers, planned_sources, policy, repositories, trusted, wrong_keys
from infra.hostfiles import HostFile, absent, tree
from infra.nvidia import BLACKLIST, FABRIC_MANAGER, PERSISTENCE, brings_persistence, module_running, replaceable
from infra.packages import installed, upgraded
from infra.systemd import running
from infra.task import refuse, task
from llmhost.modules import DRIVER_GLOBS, extra_modules, gives_way, other_versions
from llmhost.plan.model import DriverPlan, HostPlan, Service
from llmhost.render import render

MARKER = "/etc/llmhost/driver"
DROP_IN = "/etc/systemd/system/nvidia-persistenced.service.d/llmhost.conf"
_REMEDY = (
    "The driver's packages could not be installed: driver_source, driver_branch and driver_modules choose them; "
    "docs/driver.md says what to do when a host stops"
)


@task("NVIDIA driver")
def nvidia_driver(plan: HostPlan, upgrade: bool = False) -> None:
    """Packages, modules, persistence mode and fabric manager; at most one reboot, and only if it is needed.

    + upgrade: newer versions of the driver and of the kernels are installed first, within the plan's pins
    """
    if plan.driver is None:
        absent(name="what an earlier driver's plan left", paths=[MARKER, BLACKLIST, *leftovers(plan)])
        return
    assert plan.base and plan.engine
    driver = plan.driver
    if problems := wrong_keys(driver.repositories):
        refuse(problems)
        return
    if driver.packages:
        # First of all: a host that is stopped here stays as it was, without the marker too.
        replaceable(name="loaded driver", driver=driver, upgrade=upgrade)
    trusted(
        name="keys and lists of the driver's repositories",
        sources=driver.repositories,
        planned=planned_sources(plan),
        base=plan.base,
    )
    kept_on = brings_persistence(driver)
    own = [*_marker(driver), *repositories(driver.repositories), *policy(plan)]
    tree(name="files of the driver", entries=[*own, *_module_files(driver), *(_persistence(driver) if kept_on else [])])
    if driver.packages:
        installed(
            name="packages of the driver",
            packages=driver.packages,
            sources=driver.repositories,
            rivals=DRIVER_GLOBS,
            gives_way=partial(gives_way, driver=driver),
            outdated=partial(other_versions, driver=driver),
            owned=True,
            remedy=_REMEDY,
        )
    if upgrade and driver.source != "installed":  # that one is never reloaded, nor rebooted into
        upgraded(
            name="newer driver and kernels",
            patterns=driver.frozen,
            sources=driver.repositories,
            remedy=_REMEDY,
        )
    module_running(name="kernel modules", driver=driver, drain=(plan.engine.service.unit,))
    if services := _services(driver, kept_on):
        running(name="persistence mode and fabric manager", services=services)


def _marker(driver: DriverPlan) -> list[HostFile]:
    """First of all files: a driver that is half installed is known as ours."""
    if driver.source == "installed":
        return []
    return [HostFile(MARKER, f"{driver.source} {driver.branch} {driver.modules}\n")]


def _module_files(driver: DriverPlan) -> list[HostFile]:
    return [HostFile(BLACKLIST, render(BLACKLIST))] if driver.blacklist_nouveau else []


def _persistence(driver: DriverPlan) -> list[HostFile]:
    """What keeps the GPU ready: its daemon's drop-in, and the modules that CUDA needs loaded at each boot."""
    load = "/etc/modules-load.d/llmhost-nvidia.conf"
    modules = render(load, extra=extra_modules(driver))
    return [HostFile(load, modules), HostFile(DROP_IN, render(DROP_IN, dropin=DROP_IN))]


def _services(driver: DriverPlan, kept_on: bool) -> list[Service]:
    persistence = [Service(PERSISTENCE, (DROP_IN,), 60)] if kept_on else []
    return [*persistence, *([Service(FABRIC_MANAGER, (), 120)] if driver.fabric_manager else [])]
