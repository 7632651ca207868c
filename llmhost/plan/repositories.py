"""Repositories beside the distribution's own, and what of their packages a host has. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from llmhost.catalogue import CudaDirectory, drivers
from llmhost.hardware import Hardware
from llmhost.plan.model import AptPin, AptSource
from llmhost.plan.systems import system_of
from llmhost.settings import Settings

ARCHIVE, CUDA = "ubuntu-archive", "cuda-repository"
VENDOR = "vendor"  # the key setting's word for the vendor's own


def cuda_source(settings: Settings, hardware: Hardware) -> AptSource:
    """NVIDIA's repository for this host's distribution. Its keys are not in this repository: the host fetches one."""
    directory = cuda_directory(hardware)
    base = settings.mirror_cuda.rstrip("/")
    uri = f"{base}/{directory.directory}/{directory.architectures[hardware.machine]}/"
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


def cuda_directory(hardware: Hardware) -> CudaDirectory:
    """What NVIDIA's repository has for this host's distribution."""
    return drivers().cuda_repository.distributions[distribution(hardware)]


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


def driver_pins(settings: Settings, hardware: Hardware, source: str) -> tuple[AptPin, ...]:
    """What keeps a driver from having two origins; `source` is the one that it has."""
    if source == ARCHIVE:
        return against_cuda(settings)
    if hardware.os_id == "ubuntu":
        why = "the driver comes from NVIDIA's repository, and from there only"
        return (AptPin(" ".join(drivers().driver_globs), "release o=Ubuntu", -1, why),)
    return ()  # Debian's are older, and the pinning package names the version


def against_cuda(settings: Settings) -> tuple[AptPin, ...]:
    """NVIDIA's repository may bring tools, no driver. Its label and its host both tell it, mirrors keep either."""
    theirs = host_of(str(Settings.model_fields["mirror_cuda"].default))
    shared = (settings.mirror_apt_archive, settings.mirror_apt_security, settings.mirror_docker)
    # A host that serves other repositories too cannot be told by its name: what is wanted would be shut out.
    others = {host_of(url) for url in (*shared, settings.mirror_container_toolkit)}
    hosts = [host for host in dict.fromkeys((theirs, host_of(settings.mirror_cuda))) if host not in others]
    why = "the driver comes from elsewhere: never a second origin"
    globs = " ".join(drivers().driver_globs)
    return tuple(AptPin(globs, pin, -1, why) for pin in ("release l=NVIDIA CUDA", *(f"origin {h}" for h in hosts)))


def distribution(hardware: Hardware) -> str:
    """The host's system as the catalogue names it: "ubuntu 24.04"."""
    return f"{hardware.os_id} {hardware.os_version}"


def known_distribution(hardware: Hardware) -> bool:
    """Whether packages for this system and machine are known at all; plan/host.py refuses it otherwise."""
    return system_of(hardware) is not None and hardware.machine in drivers().docker.architectures


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
