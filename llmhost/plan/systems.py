"""The operating systems a host may have: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from llmhost.hardware import Hardware


@dataclass(frozen=True)
class System:
    """A supported distribution and the version of its own python3."""

    name: str
    python: str


# By ID and VERSION_ID of /etc/os-release. The Python is the distribution's, not what is found: a bare host may have
# none yet, and an administrator may add one; neither may change what a release is.
SYSTEMS = {
    ("ubuntu", "22.04"): System("Ubuntu 22.04", "3.10"),
    ("ubuntu", "24.04"): System("Ubuntu 24.04", "3.12"),
    ("ubuntu", "26.04"): System("Ubuntu 26.04", "3.14"),
    ("debian", "12"): System("Debian 12", "3.11"),
    ("debian", "13"): System("Debian 13", "3.13"),
}


def system_of(hardware: Hardware) -> System | None:
    """The host's row, None where its system is not supported."""
    return SYSTEMS.get((hardware.os_id, hardware.os_version))
