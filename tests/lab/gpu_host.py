"""Hosts with a simulated GPU, for tests: provisioned, looked at, and what can go wrong with them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lab import state
from tests.lab import spine
from tests.lab.spine import Deploy, Ended

DRIVER_ONLY = "tests/lab/driver_only.py"


def provision(host: str, *words: str, inventory: str = spine.INVENTORY) -> Ended:
    """Driver and containers, without engine and chat page: those have tests of their own."""
    return spine.deploy(host, *words, inventory=inventory, program=DRIVER_ONLY)


def provisioning(host: str, *words: str) -> Deploy:
    """The same, under way."""
    return Deploy(host, *words, program=DRIVER_ONLY)


# --- what is there


def loaded(host: str) -> str:
    """Version of the module in the kernel; "" where none is."""
    return spine.on(host, "cat /sys/module/nvidia/version 2>/dev/null || true")


def versions(host: str) -> dict[str, str]:
    """The driver's version wherever it is told: all are to be one."""
    script = r"""
    echo "loaded $(cat /sys/module/nvidia/version)"
    echo "disk $(modinfo -F version nvidia)"
    echo "package $(dpkg-query -W -f '${Version}' libcuda1 | cut -d- -f1)"
    echo "smi $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | sort -u)"
    echo "cdi $(grep -o 'libcuda.so.[0-9.]*[0-9]' /var/run/cdi/nvidia.yaml | cut -d. -f3- | sort -u | grep -v '^1$')"
    """
    return dict(line.split(" ", 1) for line in spine.on(host, script).splitlines())


def boot_id(host: str) -> str:
    return spine.on(host, "cat /proc/sys/kernel/random/boot_id")


def packages(host: str, *patterns: str) -> dict[str, str]:
    """{name: version} of the installed packages with names like these."""
    shown = "'${Package} ${db:Status-Status} ${Version}\\n'"
    lines = spine.on(host, f"dpkg-query -W -f {shown} {' '.join(patterns)} || true").splitlines()
    words = [line.split() for line in lines]
    return {name: "".join(version) for name, status, *version in words if status == "installed"}


def is_active(host: str, unit: str) -> bool:
    return spine.on(host, f"systemctl is-active {unit} || true") == "active"


# --- what goes wrong


@contextmanager
def vendor_fault(host: str, **fault: Any) -> Iterator[None]:
    """The vendors' repositories go wrong as lab/mirror/vendor.py describes, and are right again afterwards."""
    _tell_vendors(host, fault)
    try:
        yield
    finally:
        _tell_vendors(host, {})


def _tell_vendors(host: str, fault: dict[str, Any]) -> None:
    vendors = state.find_host(host)[0].gpu_settings["mirror_cuda"].removesuffix("/cuda")
    urllib.request.urlopen(urllib.request.Request(f"{vendors}/_fault", json.dumps(fault).encode()), timeout=10).close()


_LOCKS = r"""
systemd-run --quiet --unit=somebodys-apt python3 -c '
import fcntl, time
files = [open(path, "w") for path in ("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock", "/var/lib/apt/lists/lock")]
for file in files: fcntl.lockf(file, fcntl.LOCK_EX)
open("/run/somebodys-apt", "w").close()
time.sleep({seconds})
'
until [ -e /run/somebodys-apt ]; do sleep 0.1; done
"""


def hold_apt_locks(host: str, seconds: int) -> None:
    """Somebody's apt, as unattended upgrades at a first boot: it has every lock, and keeps them for a while."""
    spine.on(host, _LOCKS.format(seconds=seconds))


@contextmanager
def held_gpu(host: str) -> Iterator[None]:
    """A service that has the GPU open and is none of llmhost's; it ends with the block or with the host."""
    spine.on(host, "systemd-run --quiet --unit=trainer sh -c 'exec 3<>/dev/nvidia0; sleep infinity'")
    spine.wait_until(
        "the GPU is held", lambda: spine.on(host, "ls -l /proc/*/fd 2>/dev/null | grep -c /dev/nvidia0 || true")
    )
    spine.on(host, "/usr/local/lib/llmhost-lab/recount")
    try:
        yield
    finally:
        spine.on(host, "systemctl stop trainer.service 2>/dev/null || true")
