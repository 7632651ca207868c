"""The CUDA toolkit, for those who compile: which version, and from where. Pure (field notes, nvidia.md, 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmhost.catalogue import Card, drivers, titles
from llmhost.hardware import Hardware
from llmhost.plan.model import AptPin, AptSource
from llmhost.plan.notes import Notes
from llmhost.plan.repositories import cuda_directory, cuda_source, known_distribution
from llmhost.settings import Settings


@dataclass(frozen=True)
class Toolkit:
    """What the CUDA toolkit adds to a plan."""

    packages: tuple[str, ...] = ()
    repositories: tuple[AptSource, ...] = ()
    pins: tuple[AptPin, ...] = ()


def plan_toolkit(
    settings: Settings, hardware: Hardware, cards: tuple[Card, ...], newest_cuda: str, notes: Notes
) -> Toolkit:
    """The toolkit's packages, none where none are wanted or can be; `newest_cuda` is what the driver runs at most."""
    if settings.cuda_toolkit == "none":
        notes.decide("driver", "cuda_toolkit", "none", "the engine's wheels bring what they need")
        return Toolkit()
    version = settings.cuda_toolkit_version
    notes.decide("driver", "cuda_toolkit", f"{settings.cuda_toolkit} {version}", notes.given("cuda_toolkit"))
    system = settings.cuda_toolkit == "system" and known_distribution(hardware)
    if system and not _offered(version, newest_cuda, hardware, notes):
        return Toolkit()
    _check_driver(version, newest_cuda, notes)
    _check_cards(version, cards, notes)
    if not system:
        return Toolkit()
    name = f"cuda-toolkit-{version.replace('.', '-')}"  # never `cuda`, which brings a driver
    pin = AptPin(name, f"version {version}.*", 1001, "a toolkit newer than the driver compiles what it cannot run")
    return Toolkit((name,), (cuda_source(settings, hardware),), (pin,))


def _check_driver(version: str, newest_cuda: str, notes: Notes) -> None:
    if not newest_cuda or _number(version) <= _number(newest_cuda):
        return
    able = [row.name for row in drivers().branches.values() if _number(row.cuda) >= _number(version)]
    branch = f", or driver_branch to {able[0]}" if able else ""
    notes.refuse(
        "cuda_toolkit_version",
        f"is {version}, but the driver runs CUDA {newest_cuda} at most",
        f"Set cuda_toolkit_version to {newest_cuda}{branch}",
    )


def _check_cards(version: str, cards: tuple[Card, ...], notes: Notes) -> None:
    young = [c for c in cards if c.generation.least_cuda and _number(c.generation.least_cuda) > _number(version)]
    if young:
        least = max((c.generation.least_cuda for c in young), key=_number)
        notes.refuse(
            "cuda_toolkit_version",
            f"is {version}, whose compiler does not know {titles(young)}",
            f"Set cuda_toolkit_version to {least} or newer",
        )


def _offered(version: str, newest_cuda: str, hardware: Hardware, notes: Notes) -> bool:
    directory = cuda_directory(hardware)
    if hardware.machine not in directory.architectures:
        notes.refuse(
            "cuda_toolkit",
            f"is system, but NVIDIA's repository for {hardware.os_name} has no packages for {hardware.machine}",
            'Set cuda_toolkit = "venv", or "none"',
        )
        return False
    if version not in directory.toolkits:
        able = [one for one in directory.toolkits if not newest_cuda or _number(one) <= _number(newest_cuda)]
        notes.refuse(
            "cuda_toolkit_version",
            f"is {version}, which NVIDIA's repository for {hardware.os_name} is not known to have",
            f"Set cuda_toolkit_version to one of {', '.join(able or directory.toolkits)}",
        )
        return False
    return True


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
