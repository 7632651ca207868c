"""Whether a host gets Docker, from where, and NVIDIA's container toolkit with it. Pure (field notes, nvidia.md, 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llmhost.catalogue import drivers
from llmhost.hardware import Hardware
from llmhost.plan.model import AptPin, ContainersPlan, DriverPlan
from llmhost.plan.notes import Notes
from llmhost.plan.obstacles import held, refuse_held
from llmhost.plan.repositories import (
    distribution,
    docker_source,
    installed,
    known_distribution,
    missing,
    toolkit_source,
)
from llmhost.settings import Settings

OWN, DISTRIBUTION, INSTALLED = "docker-ce", "distribution", "installed"


def plan_containers(
    settings: Settings, hardware: Hardware, driver: DriverPlan | None, notes: Notes
) -> ContainersPlan | None:
    """Docker's plan; None where none is wanted, or where the notes say why there can be none."""
    problems = len(notes.problems)
    source = _source(settings, hardware, driver, notes)
    if not source or not known_distribution(hardware):
        return None
    docker = drivers().docker
    packages = _packages(source, settings, hardware)
    conflicts = docker.conflicts if source == OWN else ()
    if packages:
        notes.decide("containers", "docker_packages", " ".join(packages), _CONTENT[source])
    toolkit = _toolkit(settings, notes) if driver else ()
    outdated = packages if source == OWN and _replaced(hardware, notes) else missing(hardware, packages) and packages
    _check_holds("docker_source", hardware, (*outdated, *conflicts), notes)
    _check_holds("container_toolkit_version", hardware, missing(hardware, toolkit) and toolkit, notes)
    sources = [docker_source(settings, hardware)] if source == OWN else []
    planned = ContainersPlan(
        docker=source,
        docker_minimum=docker.minimum,
        packages=packages,
        conflicts=conflicts,
        toolkit_version=settings.container_toolkit_version if driver else "",
        toolkit_packages=toolkit,
        repositories=(*sources, *([toolkit_source(settings, hardware)] if driver else [])),
        pins=_pins(settings) if driver else (),
        registry_mirror=settings.mirror_registry,
        frozen=(*drivers().frozen["docker"], *(drivers().frozen["toolkit"] if driver else ())),
    )
    return None if len(notes.problems) > problems else planned


_CONTENT = {
    OWN: "the engine, its command and the compose plugin",
    DISTRIBUTION: "the engine, its command and the compose plugin",
    INSTALLED: "the compose plugin for the Docker that was there",
}


def _source(settings: Settings, hardware: Hardware, driver: DriverPlan | None, notes: Notes) -> str:
    """Where Docker comes from, "" where there is none to be."""
    wish = settings.docker_source
    if wish == "none" or (wish == "auto" and driver is None):
        reason = (
            notes.given("docker_source") if wish == "none" else "no NVIDIA driver is planned, and nothing else needs it"
        )
        notes.decide("containers", "docker_source", "none", reason)
        return ""
    if wish == "auto" and hardware.container:
        notes.decide("containers", "docker_source", "none", "a container: Docker is a matter of its machine")
        return ""
    if hardware.docker.snap:
        notes.refuse(
            "docker_source",
            "the host has Docker as a snap, which NVIDIA's container toolkit cannot work with",
            'Remove it (snap remove docker), or set docker_source = "none"',
        )
        return ""
    chosen, reason = (wish, notes.given("docker_source")) if wish != "auto" else _auto_source(hardware)
    if wish == INSTALLED and (unfit := _unfit(hardware) or _without_compose(hardware)):
        notes.refuse("docker_source", f"is installed, but {unfit}", 'Set docker_source = "docker-ce", or leave it out')
        return ""
    if chosen == DISTRIBUTION and not _check_distribution(hardware, notes):
        return ""
    if chosen == OWN and not _check_others(wish, hardware, notes):
        return ""
    return notes.decide("containers", "docker_source", chosen, reason)


def _auto_source(hardware: Hardware) -> tuple[str, str]:
    # Docker's own packages stay Docker's own, whoever installed them: a host we converged plans as when it was bare.
    if "docker-ce" in installed(hardware) or _unfit(hardware):
        return OWN, "Docker's own packages: `--gpus` goes by CDI from 29.2 on"
    if "docker.io" not in installed(hardware) and _without_compose(hardware):
        return OWN, "the Docker that was there has no compose plugin, and no package to complete it with"
    return INSTALLED, f"Docker {_version(hardware)} was there and will do: llmhost does not change it"


def _version(hardware: Hardware) -> str:
    """Of Docker as its package says: whether its daemon answers just now decides nothing, the task starts it."""
    names = ("docker-ce", "docker.io")
    packaged = next((installed(hardware)[name] for name in names if name in installed(hardware)), "")
    return re.sub(r"^\d+:|[-+~].*", "", packaged) or hardware.docker.version


def _unfit(hardware: Hardware) -> str:
    """Why the Docker that is there will not do, "" where it will."""
    found, minimum = _version(hardware), drivers().docker.minimum
    if not found:
        return "no Docker daemon answers" if hardware.docker.command else "there is no Docker"
    if _number(found) < _number(minimum):
        return f"Docker {found} is older than {minimum}, which reads the toolkit's CDI specification"
    return ""


def _without_compose(hardware: Hardware) -> str:
    return "" if hardware.docker.compose_version else "the compose plugin is missing"


def _packages(source: str, settings: Settings, hardware: Hardware) -> tuple[str, ...]:
    docker = drivers().docker
    if source == OWN:
        return docker.packages
    own = docker.distribution[distribution(hardware)].packages
    if source == DISTRIBUTION:
        return own
    if settings.docker_source == INSTALLED or "docker.io" not in installed(hardware):
        return ()
    # Not docker.io itself, which would be upgraded. Named where they are there already, too: a host that was completed
    # plans as when it was not.
    rest = tuple(name for name in own if name != "docker.io")
    return rest if _without_compose(hardware) or not missing(hardware, rest) else ()


# Statuses of a package that is there, if only half: a run that lost its power leaves those.
_THERE = ("i", "U", "F", "H", "W", "t")


def _check_others(wish: str, hardware: Hardware, notes: Notes) -> bool:
    """Whether docker-ce can come: nothing else on the host runs on what it replaces."""
    there = {package.name for package in hardware.packages if package.status[1:2] in _THERE}
    if there & {"docker-ce", "docker.io"}:
        return True
    if hardware.docker.command and wish == "auto" and not there & {"docker-ce-cli", "docker-cli", "podman-docker"}:
        notes.refuse(
            "docker_source",
            "the host has a Docker that no package of it brought, and it will not do: " + _fault(hardware),
            'Mend it, or remove it, or have it replaced: docker_source = "docker-ce"; or do without: "none"',
        )
        return False
    cluster = [hardware.docker.kubernetes] if hardware.docker.kubernetes else []
    runtimes = sorted({"containerd", "runc"} & there)
    if cluster or runtimes:
        notes.refuse(
            "docker_source",
            f"the host has {' and '.join([*cluster, *runtimes])} without Docker (a node of Kubernetes?): Docker's own "
            "packages replace them, and stop what runs on them",
            'Set docker_source = "none"'
            + (f"; or remove them if nothing needs them: apt-get purge {' '.join(runtimes)}" if runtimes else ""),
        )
        return False
    return True


def _fault(hardware: Hardware) -> str:
    return _unfit(hardware) or _without_compose(hardware)


def _replaced(hardware: Hardware, notes: Notes) -> bool:
    """Whether docker-ce replaces a Docker that is too old. Of this moment: a host that has it plans as a bare one."""
    found = _version(hardware)
    if not found or not (unfit := _unfit(hardware)):
        return False
    notes.decide("containers", "docker_replaced", found, f"replaces {found}: {unfit}")
    return True


def _check_holds(setting: str, hardware: Hardware, changing: Iterable[str], notes: Notes) -> None:
    """Packages on hold that would have to change or go."""
    if names := [name for name in held(hardware) if name in {package.partition("=")[0] for package in changing}]:
        refuse_held(setting, "needs packages to change that are on hold", names, notes)


def _check_distribution(hardware: Hardware, notes: Notes) -> bool:
    own, minimum = drivers().docker.distribution.get(distribution(hardware)), drivers().docker.minimum
    if own and _number(own.version) < _number(minimum):
        notes.refuse(
            "docker_source",
            f"is distribution, but {hardware.os_name} has Docker {own.version}, older than {minimum}, which reads the "
            "toolkit's CDI specification",
            'Set docker_source = "docker-ce", or leave it out',
        )
        return False
    return True


# What an engine needs of its own version.
_ENGINES = {"docker-ce": ("docker-ce", "docker-ce-cli", "containerd.io"), "docker.io": ("docker.io",)}


def outdated_engine(installed: Mapping[str, str], minimum: str) -> list[str]:
    """Those of the installed packages (name: version) that are of a Docker older than `minimum`, "26.1"."""
    older = [engine for engine in _ENGINES if engine in installed and _number(installed[engine]) < _number(minimum)]
    return [name for engine in older for name in _ENGINES[engine] if name in installed]


def _number(version: str) -> tuple[int, ...]:
    """(26, 1) of "26.1.5", and of "5:26.1.5-1~debian.12~bookworm"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.rpartition(":")[2])[:2])


def _toolkit(settings: Settings, notes: Notes) -> tuple[str, ...]:
    version, known = settings.container_toolkit_version, drivers().toolkit.versions
    unknown = "" if version in known else f"; it is not among the versions known here ({', '.join(known)})"
    reason = notes.given("container_toolkit_version") + unknown
    notes.decide("containers", "container_toolkit_version", version, reason)
    return tuple(f"{name}={version}-1" for name in drivers().toolkit.packages)


def _pins(settings: Settings) -> tuple[AptPin, ...]:
    names = " ".join(drivers().toolkit.packages)
    why = "the four packages work at one version only, and other repositories have some of them"
    return (AptPin(names, f"version {settings.container_toolkit_version}-1", 1001, why),)
