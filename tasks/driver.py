"""The NVIDIA driver: from a known key to modules in the kernel that are those of the packages."""

from __future__ import annotations

from functools import partial

from infra.apt import planned_sources, policy, repositories, trusted, wrong_keys
from infra.hostfiles import HostFile, tree
from infra.nvidia import BLACKLIST, PERSISTENCE, brings_persistence, module_running
from infra.packages import installed
from infra.systemd import running
from infra.task import refuse, task
from llmhost.modules import DRIVER_GLOBS, gives_way, other_versions
from llmhost.plan.model import DriverPlan, HostPlan, Service
from llmhost.render import render

MARKER = "/etc/llmhost/driver"
DROP_IN = "/etc/systemd/system/nvidia-persistenced.service.d/llmhost.conf"
_REMEDY = (
    "The driver's packages could not be installed: driver_source, driver_branch and driver_modules choose them; "
    "docs/driver.md says what to do when a host stops"
)


@task("NVIDIA driver")
def nvidia_driver(plan: HostPlan) -> None:
    """Packages, modules, persistence mode and fabric manager; at most one reboot, and only if it is needed."""
    if plan.driver is None:
        return
    assert plan.base and plan.engine
    driver = plan.driver
    if problems := wrong_keys(driver.repositories):
        refuse(problems)
        return
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
    module_running(name="kernel modules", driver=driver, drain=(plan.engine.service.unit,))
    if kept_on:
        running(name="persistence mode and fabric manager", services=_services(driver))


def _marker(driver: DriverPlan) -> list[HostFile]:
    """First of all files: a driver that is half installed is known as ours."""
    if driver.source == "installed":
        return []
    return [HostFile(MARKER, f"{driver.source} {driver.branch} {driver.modules}\n")]


def _module_files(driver: DriverPlan) -> list[HostFile]:
    return [HostFile(BLACKLIST, render(BLACKLIST))] if driver.blacklist_nouveau else []


def _persistence(driver: DriverPlan) -> list[HostFile]:
    """What keeps the GPU ready: its daemon's drop-in, and the module that CUDA needs loaded at each boot."""
    load = "/etc/modules-load.d/llmhost-nvidia.conf"
    return [HostFile(load, render(load)), HostFile(DROP_IN, render(DROP_IN, driver=driver, dropin=DROP_IN))]


def _services(driver: DriverPlan) -> list[Service]:
    services = [Service(PERSISTENCE, (DROP_IN,), 60)]
    return [*services, Service("nvidia-fabricmanager.service", (), 120)] if driver.fabric_manager else services
