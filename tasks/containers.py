"""Docker, and the container toolkit that hands the GPUs to containers by CDI."""

from __future__ import annotations

from functools import partial

from infra.apt import planned_sources, policy, repositories, trusted, wrong_keys
from infra.docker import DAEMON, DROP_IN, cdi_specified, configured, gpu_image_built
from infra.hostfiles import HostFile, tree
from infra.packages import installed, upgraded
from infra.systemd import running
from infra.task import refuse, task
from llmhost.addresses import STORE, proxy_environment
from llmhost.plan.containers import outdated_engine
from llmhost.plan.model import BasePlan, HostPlan, Service
from llmhost.render import render

_REMEDY = (
    "Docker's packages could not be installed: docker_source and container_toolkit_version choose them; "
    "docs/driver.md says what to do when a host stops"
)


@task("Containers")
def containers(plan: HostPlan, upgrade: bool = False) -> None:
    """Docker configured and running, a CDI specification of the loaded driver, and the image that proves both.

    + upgrade: newer versions of Docker and of the toolkit are installed, within the plan's pins
    """
    if plan.containers is None:
        return  # the driver's task removes what an earlier plan left
    assert plan.base
    planned = plan.containers
    if problems := wrong_keys(planned.repositories):
        refuse(problems)
        return
    trusted(
        name="keys and lists of Docker's repositories",
        sources=planned.repositories,
        planned=planned_sources(plan),
        base=plan.base,
    )
    tree(name="files of Docker", entries=[*repositories(planned.repositories), *policy(plan), _drop_in(plan)])
    if planned.packages:
        installed(
            name="packages of Docker",
            packages=planned.packages,
            sources=planned.repositories,
            rivals=planned.conflicts,
            outdated=partial(outdated_engine, minimum=planned.docker_minimum),
            owned=True,
            remedy=_REMEDY,
        )
    if planned.toolkit_packages:
        installed(
            name="packages of the container toolkit",
            packages=planned.toolkit_packages,
            sources=planned.repositories,
            owned=True,
            remedy=_REMEDY,
        )
    if upgrade:
        upgraded(
            name="newer Docker and container toolkit",
            patterns=planned.frozen,
            sources=planned.repositories,
            remedy=_REMEDY,
        )
    with_toolkit = bool(planned.toolkit_version)
    configured(
        name="configuration of Docker",
        toolkit=with_toolkit,
        registry_mirror=planned.registry_mirror,
        inputs=_inputs(plan.base),
        proxied=bool(plan.base.proxies),
    )
    running(name="docker.service", services=[Service("docker.service", _inputs(plan.base), 90)])
    if with_toolkit:
        elsewhere = plan.driver is not None and plan.driver.of_another_system
        cdi_specified(name="CDI specification", of_another_system=elsewhere)
        gpu_image_built(name="image of the GPU check")


def _inputs(base: BasePlan) -> tuple[str, ...]:
    """What Docker is restarted for; the trusted certificates it reads once, when it starts."""
    return (DAEMON, DROP_IN, *([STORE] if base.ca_certificate else []))


def _drop_in(plan: HostPlan) -> HostFile:
    assert plan.base
    content = render(DROP_IN, inputs=_inputs(plan.base), proxies=proxy_environment(plan.base.proxies))
    return HostFile(DROP_IN, content)
