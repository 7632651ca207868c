"""Recorded hosts, and ways to vary them: each value is what runtime/facts.sh prints."""

from __future__ import annotations

import json
from pathlib import Path

from llmhost.hardware import Hardware, parse
from tests.recorded.machines import MACHINES

__all__ = [
    "BARE",
    "MACHINES",
    "OS_RELEASES",
    "bare",
    "disks",
    "facts",
    "machine",
    "machine_facts",
    "memory",
    "recorded_h200",
]

BARE = Path(__file__).parent / "debian-12-bare.json"
# What runtime/facts.sh printed on a real H200 (Ubuntu 24.04, driver 580, no systemd; 2026-11-20), identities zeroed and
# the list of clocks left out.
H200 = Path(__file__).parent / "h200.json"

OS_RELEASES = {
    "Debian 12": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"',
    "Debian 13": 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"',
    "Ubuntu 22.04": 'ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"',
    "Ubuntu 24.04": 'ID=ubuntu\nVERSION_ID="24.04"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"',
    "Ubuntu 26.04": 'ID=ubuntu\nVERSION_ID="26.04"\nPRETTY_NAME="Ubuntu 26.04 LTS"',
    "Debian 11": 'ID=debian\nVERSION_ID="11"\nPRETTY_NAME="Debian GNU/Linux 11 (bullseye)"',
    "Fedora": 'ID=fedora\nVERSION_ID="43"\nPRETTY_NAME="Fedora Linux 43"',
}
GIB_KB = 1 << 20


def facts(**changes: str) -> str:
    """The bare Debian 12 host's facts, with some values replaced."""
    recorded = json.loads(BARE.read_text())
    assert not changes.keys() - recorded.keys()
    return json.dumps({**recorded, **changes})


def bare(**changes: str) -> Hardware:
    """The bare Debian 12 host, with some values replaced."""
    return parse(facts(**changes))


def recorded_h200(**changes: str) -> Hardware:
    """The real H200, with some values replaced."""
    recorded = json.loads(H200.read_text())
    assert not changes.keys() - recorded.keys()
    return parse(json.dumps({**recorded, **changes}))


def machine_facts(name: str, **changes: str) -> str:
    """The facts of a machine of machines.py, with some values replaced."""
    row = MACHINES[name]
    composed = {
        "hostname": name,
        "os_release": OS_RELEASES[row.system.os],
        "kernel": row.system.kernel,
        "machine": row.system.architecture,
        "virtualisation": row.virtualisation,
        "time_synchronised": "yes",
        "cpu": f"{row.cpu}\ncount={row.cpus}",
        "meminfo": memory(row.memory_gib),
        "disks": disks(380),
        "pci": row.pci,
        "kernels": f"{row.system.kernel} {row.module}",
        "packages": row.system.packages,
    }
    return facts(**{**composed, **row.facts, **changes})


def machine(name: str, **changes: str) -> Hardware:
    """A machine of machines.py, with some values replaced."""
    return parse(machine_facts(name, **changes))


def memory(gib: float) -> str:
    """/proc/meminfo of a machine with this much memory."""
    return f"MemTotal: {int(gib * GIB_KB)} kB\nMemAvailable: {int(gib * GIB_KB * 0.9)} kB"


def disks(free_gib: float, **mounted_gib: float) -> str:
    """The disks of a machine with one file system, or with others mounted where the names say (opt, models)."""
    mounts = {"/": "/", "/opt/llmhost": "/", "/var/lib/llmhost": "/", "/var/lib/llmhost/models": "/"}
    free = {"/": free_gib}
    for path, name in (("/opt/llmhost", "opt"), ("/var/lib/llmhost/models", "models")):
        if name in mounted_gib:
            mounts[path], free[path] = path, mounted_gib[name]
    return "\n".join(f"{path} 500000000000 {int(free[mount] * (1 << 30))} {mount}" for path, mount in mounts.items())
