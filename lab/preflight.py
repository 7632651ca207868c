"""Whether this machine can run the lab, and all that it lacks, in one message with the command that installs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lab import LabError, cgroups, images, state

PROGRAMS = {  # program -> Debian and Ubuntu package
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "gpg": "gpg",  # with it mmdebstrap finds the keyring of a suite that is not this machine's own
    "ip": "iproute2",
    "iptables": "iptables",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "mount": "mount",
    "unshare": "util-linux",
}
GPU_PROGRAMS = {  # what builds and signs the packages of hosts with a simulated GPU
    "gcc": "gcc",
    "dpkg-deb": "dpkg",
    "gpg-agent": "gpg-agent",
    "gpgconf": "gpgconf",
}
C_HEADERS = Path("/usr/include/stdio.h")  # of libc6-dev, which gcc only recommends
UBUNTU_SUITES = Path("/usr/share/distro-info/ubuntu.csv")  # mmdebstrap knows suites after 18.04 only from here
OLDEST_KERNEL = (5, 14)  # cgroup.kill (cgroups(7))


def missing_packages(systems: Iterable[str] = ("debian-12",), *, gpu: bool = False) -> list[str]:
    """The Debian packages that this machine lacks to run hosts of these systems, with simulated GPUs or not."""
    programs = {**PROGRAMS, **(GPU_PROGRAMS if gpu else {})}
    missing = {package for program, package in programs.items() if _which(program) is None}
    if gpu and not C_HEADERS.exists():
        missing.add("libc6-dev")
    for name in systems:
        system = images.operating_system(name)
        if not Path(system.keyring).exists():
            missing.add(system.keyring_package)
        if name.startswith("ubuntu-") and not UBUNTU_SUITES.exists():
            missing.add("distro-info-data")
    return sorted(missing)


def require(systems: Iterable[str] = ("debian-12",), mirror: str | None = None, *, gpu: bool = False) -> None:
    """Refuses, before anything is touched, with all that this machine lacks."""
    reasons = list(_reasons(list(systems), mirror, gpu))
    if reasons:
        raise LabError("this machine cannot run the lab:\n" + "\n".join(f"  - {reason}" for reason in reasons))


def _reasons(systems: list[str], mirror: str | None, gpu: bool) -> Iterator[str]:
    if platform.system() != "Linux":
        yield f"it runs {platform.system()}; the lab needs Linux (systemd-nspawn), which may be a virtual machine."
        return
    if os.geteuid() != 0:
        yield "the lab mounts file systems and makes network interfaces, so it must be root. Run the command with sudo."
    if _kernel() < OLDEST_KERNEL:
        yield f"its kernel is {platform.release()}; the lab needs Linux {'.'.join(map(str, OLDEST_KERNEL))} or later."
    if packages := missing_packages(systems, gpu=gpu):
        yield f"packages are missing. Run: apt-get install --no-install-recommends {' '.join(packages)}"
    if cgroups.unified_hierarchy() is None:
        yield (
            "cgroup v2 is not mounted. "
            "Run: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
        )
    if not mirror:
        yield from _unknown_suites(systems)
    if os.geteuid() == 0 and not packages:
        yield from _overlay_reasons()


def _unknown_suites(systems: list[str]) -> Iterator[str]:
    known = UBUNTU_SUITES.read_text() if UBUNTU_SUITES.exists() else None
    for name in systems:
        suite = images.operating_system(name).suite
        if name.startswith("ubuntu-") and known is not None and f",{suite}," not in known:
            yield (
                f"its distro-info-data is older than {name}, so that mmdebstrap would look for {suite!r} in the wrong "
                "archive. Upgrade distro-info-data, or give the archive with --mirror URL."
            )


def _overlay_reasons() -> Iterator[str]:
    """Tries an overlay where the hosts' disks will lie, in a mount namespace that takes it along when it ends."""
    disks = state.disks_directory("x").parent
    disks.mkdir(parents=True, exist_ok=True)
    for place in (disks, state.cache_directory()):
        if any(character in str(place) for character in ":,\\ "):
            yield (
                f"the path {str(place)!r} holds a blank, colon, comma or backslash, which mount options of an overlay "
                f"cannot. Set {'LLMHOST_LAB_DIR' if place == disks else 'LLMHOST_CACHE'} to another path."
            )
            return
    with tempfile.TemporaryDirectory(dir=disks, prefix=".probe-") as scratch:
        for part in ("lower", "upper", "work", "root"):
            Path(scratch, part).mkdir()
        options = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, f"{scratch}/root"]
        done = subprocess.run(["unshare", "--mount", *mount], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        yield (
            f"an overlay cannot be mounted in {disks} ({done.stderr.strip()}). Load the kernel's overlay module "
            "(modprobe overlay), or set LLMHOST_LAB_DIR to a directory on a real disk (ext4, xfs), not on an overlay."
        )


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def _which(program: str) -> str | None:
    """Looks in the administrator's directories too: an ordinary user's PATH lacks them."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
