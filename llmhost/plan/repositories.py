"""Repositories beside the distribution's own, and what of their packages a host has. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from llmhost.catalogue import drivers
from llmhost.hardware import Hardware
from llmhost.plan.model import AptSource
from llmhost.plan.systems import system_of
from llmhost.settings import Settings

VENDOR = "vendor"  # the key setting's word for the vendor's own


def cuda_source(settings: Settings, hardware: Hardware) -> AptSource:
    """NVIDIA's repository for this host's distribution. Its keys are not in this repository: the host fetches one."""
    cuda = drivers().cuda_repository
    directory = cuda.distributions[distribution(hardware)]
    base = settings.mirror_cuda.rstrip("/")
    uri = f"{base}/{directory.directory}/{cuda.architectures[hardware.machine]}/"
    theirs = settings.mirror_cuda_key == VENDOR
    return AptSource(
        name="nvidia-cuda",
        setting="mirror_cuda",
        uri=uri,
        suite="/",
        components=(),
        key="" if theirs else settings.mirror_cuda_key,
        key_url=f"{uri}{directory.key}" if theirs else "",
        fingerprint=directory.fingerprint if theirs else "",
    )


def docker_source(settings: Settings, hardware: Hardware) -> AptSource:
    """Docker's repository for this host's distribution."""
    docker = drivers().docker
    theirs = settings.mirror_docker_key == VENDOR
    return AptSource(
        name="docker",
        setting="mirror_docker",
        uri=f"{settings.mirror_docker.rstrip('/')}/{hardware.os_id}",
        suite=docker.distribution[distribution(hardware)].codename,
        components=("stable",),
        key=docker.key if theirs else settings.mirror_docker_key,
        key_url="",
        fingerprint=docker.fingerprint if theirs else "",
    )


def toolkit_source(settings: Settings, hardware: Hardware) -> AptSource:
    """The container toolkit's repository: one for all distributions."""
    toolkit = drivers().toolkit
    theirs = settings.mirror_container_toolkit_key == VENDOR
    architecture = drivers().docker.architectures[hardware.machine]
    return AptSource(
        name="nvidia-container-toolkit",
        setting="mirror_container_toolkit",
        uri=f"{settings.mirror_container_toolkit.rstrip('/')}/{architecture}/",
        suite="/",
        components=(),
        key=toolkit.key if theirs else settings.mirror_container_toolkit_key,
        key_url="",
        fingerprint=toolkit.fingerprint if theirs else "",
    )


def distribution(hardware: Hardware) -> str:
    """The host's system as the catalogue names it: "ubuntu 24.04"."""
    return f"{hardware.os_id} {hardware.os_version}"


def known_distribution(hardware: Hardware) -> bool:
    """Whether packages for this system and machine are known at all; plan/host.py refuses it otherwise."""
    return system_of(hardware) is not None and hardware.machine in drivers().cuda_repository.architectures


def installed(hardware: Hardware) -> dict[str, str]:
    """Names and versions of the packages of interest that are installed and configured."""
    return {p.name: p.version for p in hardware.packages if p.status in ("ii", "hi")}


def missing(hardware: Hardware, packages: Iterable[str]) -> list[str]:
    """Which of these ("name" or "name=version") dpkg does not have."""
    have = installed(hardware)
    wanted = (package.partition("=")[::2] for package in packages)
    return [name for name, version in wanted if name not in have or (version and have[name] != version)]


def host_of(url: str) -> str:
    """The host of a URL as apt's `Pin: origin` knows it, "" without one."""
    return urlsplit(url).hostname or ""
