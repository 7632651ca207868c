"""Whether a host gets Docker, from where, and NVIDIA's container toolkit with it. Pure (field notes, nvidia.md, 4)."""

from __future__ import annotations

import re

from llmhost.catalogue import drivers
from llmhost.hardware import Hardware
from llmhost.plan.driver import CONTAINERS
from llmhost.plan.model import AptPin, ContainersPlan, DriverPlan
from llmhost.plan.notes import Notes
from llmhost.plan.repositories import distribution, docker_source, installed, known_distribution, toolkit_source
from llmhost.settings import Settings

OWN, DISTRIBUTION, INSTALLED = "docker-ce", "distribution", "installed"


def plan_containers(
    settings: Settings, hardware: Hardware, driver: DriverPlan | None, notes: Notes
) -> ContainersPlan | None:
    """Docker's plan; None where none is wanted, or where the notes say why there can be none."""
    source = _source(settings, hardware, driver, notes)
    if not source or not known_distribution(hardware):
        return None
    docker = drivers().docker
    packages = {OWN: docker.packages, DISTRIBUTION: docker.distribution[distribution(hardware)].packages}.get(
        source, ()
    )
    if packages:
        notes.decide(
            "containers", "docker_packages", " ".join(packages), "the engine, its command and the compose plugin"
        )
    toolkit = _toolkit(settings, notes) if driver else ()
    sources = [docker_source(settings, hardware)] if source == OWN else []
    return ContainersPlan(
        docker=source,
        docker_minimum=docker.minimum,
        packages=packages,
        conflicts=docker.conflicts if source == OWN else (),
        toolkit_version=settings.container_toolkit_version if driver else "",
        toolkit_packages=toolkit,
        repositories=(*sources, *([toolkit_source(settings, hardware)] if driver else [])),
        pins=_pins(settings) if driver else (),
        registry_mirror=settings.mirror_registry,
        frozen=(*drivers().frozen["docker"], *(drivers().frozen["toolkit"] if driver else ())),
    )


def _source(settings: Settings, hardware: Hardware, driver: DriverPlan | None, notes: Notes) -> str:
    """Where Docker comes from, "" where there is none to be."""
    wish = settings.docker_source
    if wish == "none" or (wish == "auto" and driver is None):
        reason = (
            notes.given("docker_source") if wish == "none" else "no NVIDIA driver is planned, and nothing else needs it"
        )
        notes.decide("containers", "docker_source", "none", reason)
        return ""
    if wish == "auto" and hardware.virtualisation in CONTAINERS:
        notes.decide("containers", "docker_source", "none", "a container: Docker is a matter of its machine")
        return ""
    if hardware.docker.snap:
        notes.refuse(
            "docker_source",
            "the host has Docker as a snap, which NVIDIA's container toolkit cannot work with",
            'Remove it (snap remove docker), or set docker_source = "none"',
        )
        return ""
    if wish == "auto":
        return _auto_source(hardware, notes)
    if wish == INSTALLED and (unfit := _unfit(hardware)):
        notes.refuse("docker_source", f"is installed, but {unfit}", 'Set docker_source = "docker-ce", or leave it out')
        return ""
    if wish == DISTRIBUTION and not _check_distribution(hardware, notes):
        return ""
    return notes.decide("containers", "docker_source", wish, notes.given("docker_source"))


def _auto_source(hardware: Hardware, notes: Notes) -> str:
    # Docker's own packages stay Docker's own, whoever installed them: a host we converged plans as when it was bare.
    if "docker-ce" not in installed(hardware) and not _unfit(hardware):
        reason = f"Docker {hardware.docker.version} with compose was there and will do: llmhost does not change it"
        return notes.decide("containers", "docker_source", INSTALLED, reason)
    return notes.decide("containers", "docker_source", OWN, "Docker's own packages: `--gpus` goes by CDI from 29.2 on")


def _unfit(hardware: Hardware) -> str:
    """Why the Docker that is there will not do, "" where it will."""
    found, minimum = hardware.docker, drivers().docker.minimum
    if not found.version:
        return "no Docker daemon answers"
    if _number(found.version) < _number(minimum):
        return f"Docker {found.version} is older than {minimum}, which reads the toolkit's CDI specification"
    return "" if found.compose_version else "the compose plugin is missing"


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


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _toolkit(settings: Settings, notes: Notes) -> tuple[str, ...]:
    version = settings.container_toolkit_version
    notes.decide("containers", "container_toolkit_version", version, notes.given("container_toolkit_version"))
    return tuple(f"{name}={version}-1" for name in drivers().toolkit.packages)


def _pins(settings: Settings) -> tuple[AptPin, ...]:
    names = " ".join(drivers().toolkit.packages)
    why = "the four packages work at one version only, and other repositories have some of them"
    return (AptPin(names, f"version {settings.container_toolkit_version}-1", 1001, why),)
