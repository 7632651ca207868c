"""Root file systems: what a cloud image of each operating system gives as a bare host, built once and kept.

An image is an unpacked root that hosts use as the lower layer of an overlay, and is never written to again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lab import LabError, state

Say = Callable[[str], None]


@dataclass(frozen=True)
class OperatingSystem:
    """How one operating system is fetched. The mirror is mmdebstrap's own default for the suite."""

    suite: str
    python: str  # its own python3
    components: str
    keyring: str  # file that mmdebstrap verifies the archive with
    keyring_package: str
    extra_packages: tuple[str, ...] = ()


DEBIAN_KEYRING = ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring")
UBUNTU_KEYRING = ("/usr/share/keyrings/ubuntu-archive-keyring.gpg", "ubuntu-keyring")

OPERATING_SYSTEMS = {
    "debian-12": OperatingSystem("bookworm", "3.11", "main", *DEBIAN_KEYRING),
    "debian-13": OperatingSystem("trixie", "3.13", "main", *DEBIAN_KEYRING),
    "ubuntu-22.04": OperatingSystem("jammy", "3.10", "main,universe", *UBUNTU_KEYRING, ("ubuntu-keyring",)),
    "ubuntu-24.04": OperatingSystem("noble", "3.12", "main,universe", *UBUNTU_KEYRING, ("ubuntu-keyring",)),
    "ubuntu-26.04": OperatingSystem("resolute", "3.14", "main,universe", *UBUNTU_KEYRING, ("ubuntu-keyring",)),
}

# What is on a cloud image of each of them and matters to us; a compiler, pip, curl or a Python 3.11 is not.
PACKAGES = (
    "systemd-sysv", "udev", "dbus", "libpam-systemd", "openssh-server", "sudo", "iproute2", "ca-certificates",
    "python3", "procps", "kmod", "netbase", "iputils-ping", "adduser", "tzdata",
)  # fmt: skip

# Run inside the new root. A host gets its own SSH host key and machine-id: two hosts must not share them.
# Timers that a fresh host fires are masked: they hold apt's lock when a test needs it. Trixie does not enable networkd.
CUSTOMISE = """
systemctl enable systemd-networkd.service
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
    man-db.timer motd-news.timer systemd-networkd-wait-online.service console-getty.service
useradd --create-home --shell /bin/bash admin
echo 'admin ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/90-lab-admin
chmod 0440 /etc/sudoers.d/90-lab-admin
install -d -m 0700 /root/.ssh
install -d -m 0700 -o admin -g admin /home/admin/.ssh
echo 'UseDNS no' > /etc/ssh/sshd_config.d/10-lab.conf
echo 'LANG=C.UTF-8' > /etc/default/locale
rm -f /etc/ssh/ssh_host_* /etc/hostname /etc/resolv.conf
: > /etc/machine-id
"""


def operating_system(name: str) -> OperatingSystem:
    """The row of the table; LabError lists the names there are."""
    try:
        return OPERATING_SYSTEMS[name]
    except KeyError:
        raise LabError(f"the lab has no operating system {name!r}; it has: {', '.join(OPERATING_SYSTEMS)}.") from None


def mmdebstrap_command(name: str, target: Path, mirror: str | None) -> list[str]:
    """The command that builds the root of `name`; manual pages and translations are left out, apt's lists are kept."""
    system = operating_system(name)
    return [
        "mmdebstrap",
        "--format=directory",
        "--variant=minbase",
        "--skip=cleanup/apt/lists",
        f"--components={system.components}",
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=force-unsafe-io",  # no fsync for a disposable disk: g++ installs in 4.3 s instead of 6.4 s
        *(f"--dpkgopt=path-exclude=/usr/share/{place}/*" for place in ("man", "locale", "doc")),
        f"--include={','.join((*PACKAGES, *system.extra_packages))}",
        system.suite,
        str(target),
        *([mirror] if mirror else []),
    ]


def path(name: str, mirror: str | None = None) -> Path:
    """Where the image lies once built: its name carries the hash of its recipe, so that a new recipe is a new image."""
    recipe = json.dumps([mmdebstrap_command(name, Path("/"), mirror), CUSTOMISE])
    return state.cache_directory() / "images" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def ensure(name: str, mirror: str | None = None, *, rebuild: bool = False, say: Say = print) -> Path:
    """The image of `name`, built where the cache lacks it (about half a minute, 300 MB)."""
    image = path(name, mirror)
    with state.lock(f"image-{image.name}"):
        if rebuild and image.exists():
            _refuse_if_in_use(image)
            shutil.rmtree(image)
        if not image.exists():
            started = time.monotonic()
            say(f"image {name}: building (about 30 s on a fast line, 300 MB) ...")
            _build(name, image, mirror)
            say(f"image {name}: built in {time.monotonic() - started:.1f} s: {image}")
    return image


def _build(name: str, image: Path, mirror: str | None) -> None:
    """Builds beside the final name and renames last, so that an interrupted build is never taken for an image."""
    image.parent.mkdir(parents=True, exist_ok=True)
    partial = image.with_name(f"{image.name}.partial")
    _discard(partial)
    try:
        _run_logged(mmdebstrap_command(name, partial, mirror), image.with_name(f"{image.name}.log"))
        _run_logged(["chroot", str(partial), "sh", "-euc", CUSTOMISE], image.with_name(f"{image.name}.log"))
        partial.rename(image)
    finally:
        _discard(partial)


def _run_logged(argv: list[str], log: Path) -> None:
    with log.open("a") as file:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text().splitlines()[-12:])
        raise LabError(
            f"`{argv[0]}` could not build the image (exit code {done.returncode}); a nearer or reachable archive "
            f"can be given with --mirror URL. The end of {log}:\n{tail}"
        )


def _discard(partial: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(partial)


def _refuse_if_in_use(image: Path) -> None:
    for prefix in state.prefixes():
        lab = state.load(prefix)
        users = [host.name for host in lab.hosts if host.image == str(image)] if lab else []
        if users:
            raise LabError(
                f"the image {image.name} is the lower layer of {', '.join(users)}: "
                f"run `python -m lab down --prefix {prefix}` before it is rebuilt."
            )
