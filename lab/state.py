"""What is known about each lab: one JSON file per lab, written before the thing that it describes is made.

A lab is named by its prefix; bridge, subnet, host names, keys and state are its own: several labs run side by side.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lab import LabError, cgroups

RUN = Path("/run/llmhost-lab")
HOST_NAME_CHARACTERS = 12  # the host's interface "vb-NAME" must fit the kernel's 15


@dataclass
class Host:
    """One disposable host. `directory` holds its disk (the overlay's upper layer) and its console log."""

    name: str
    os: str
    ip: str
    image: str
    directory: str
    ready: bool = False  # it has answered SSH once; anything less is rebuilt by the next `up`
    gpu: str = ""  # the machine that it imitates: a row of lab/gpu/machines.py

    @property
    def leaf(self) -> str:
        """Name of the control group that holds every process of the host."""
        return f"llmhost-lab-{self.name}"

    @property
    def interface(self) -> str:
        """The controller's end of the host's network cable."""
        return f"vb-{self.name}"

    @property
    def running(self) -> bool:
        """Whether any process of the host lives."""
        return cgroups.populated(self.leaf)


@dataclass
class Lab:
    """One lab: its network, its SSH identity, its mirror, its hosts."""

    prefix: str
    bridge: str = ""
    address: str = ""  # the controller on the lab's network
    subnet: str = ""
    internet: bool = False
    forwarding_enabled: list[str] = field(default_factory=list)  # interfaces that forward only because of this lab
    apt_proxy: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # what a host must be told to use the mirror
    gpu_settings: dict[str, Any] = field(default_factory=dict)  # the same, for hosts with a simulated GPU
    hosts: list[Host] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """Where state and keys of the lab lie."""
        return RUN / self.prefix

    @property
    def ssh_key(self) -> Path:
        """The private key that logs in to every host of the lab."""
        return self.directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The host keys, written before the hosts boot."""
        return self.directory / "known_hosts"

    def settings_of(self, host: Host) -> dict[str, Any]:
        """Settings of llmhost for a host. One with a simulated GPU gets the driver; its engine still uses the CPU."""
        if not host.gpu:
            return self.settings
        return {**self.settings, **self.gpu_settings, "driver_source": "cuda-repository"}

    def host(self, name: str) -> Host:
        """The host called `name`; LabError lists those there are."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = ", ".join(host.name for host in self.hosts) or "none"
        raise LabError(f"the lab {self.prefix!r} has no host {name!r}; its hosts: {names}.")


def default_prefix() -> str:
    """The lab meant when none is named: $LLMHOST_LAB, else "lab"."""
    return os.environ.get("LLMHOST_LAB", "lab")


def check_prefix(prefix: str) -> str:
    """Refuses a prefix that cannot be part of an interface name, or that could be taken for another lab's host."""
    if not re.fullmatch(r"[a-z][a-z0-9]{0,7}", prefix):
        raise LabError(f"the prefix {prefix!r} must be 1 to 8 lower-case letters or digits and begin with a letter.")
    return prefix


def host_name(prefix: str, label: str) -> str:
    """`<prefix>-<label>`, refused where the kernel would not take it as part of an interface name."""
    name = f"{prefix}-{label}"
    if not re.fullmatch(r"[a-z0-9]+", label) or len(name) > HOST_NAME_CHARACTERS:
        raise LabError(
            f"the host name {name!r} must be at most {HOST_NAME_CHARACTERS} lower-case letters and digits: "
            "choose a shorter NAME or --prefix."
        )
    return name


def cache_directory() -> Path:
    """Where images and downloads are kept between labs."""
    if "LLMHOST_CACHE" in os.environ:
        return Path(os.environ["LLMHOST_CACHE"]).absolute() / "lab"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).absolute() / "llmhost/lab"


def disks_directory(prefix: str) -> Path:
    """Where the disks of a lab's hosts lie: on a real disk, since an overlay cannot lie on an overlay."""
    return Path(os.environ.get("LLMHOST_LAB_DIR", "/var/tmp/llmhost-lab")).absolute() / prefix


def disk_directory(name: str) -> Path:
    """Where the disk of the host called `name` lies."""
    return disks_directory(prefix_of(name)) / name


def prefix_of(name: str) -> str:
    """The lab that a host belongs to, from the host's name."""
    return name.partition("-")[0]


def prefixes() -> list[str]:
    """The labs there are, running or crashed."""
    return sorted(file.parent.name for file in RUN.glob("*/lab.json"))


def load(prefix: str) -> Lab | None:
    """The lab's state, or None where there is no such lab."""
    try:
        data = json.loads((RUN / prefix / "lab.json").read_text())
    except FileNotFoundError:
        return None
    return Lab(**{**data, "hosts": [Host(**host) for host in data["hosts"]]})


def save(lab: Lab) -> None:
    """Writes the lab's state in one step, so that a reader sees the old or the new."""
    lab.directory.mkdir(parents=True, exist_ok=True)
    partial = lab.directory / "lab.json.partial"
    partial.write_text(json.dumps(dataclasses.asdict(lab), indent=2) + "\n")
    partial.rename(lab.directory / "lab.json")


def running(prefix: str | None = None) -> Lab:
    """The lab with those of its hosts that run; LabError, with the command that starts one, where none does."""
    prefix = default_prefix() if prefix is None else prefix
    lab = load(prefix)
    if lab is not None:
        lab.hosts = [host for host in lab.hosts if host.ready and host.running]
    if lab is None or not lab.hosts:
        others = [other for other in prefixes() if other != prefix]
        choice = f" (or set LLMHOST_LAB to one that does: {', '.join(others)})" if others else ""
        option = "" if prefix == "lab" else f" --prefix {prefix}"
        raise LabError(f"no host of the lab {prefix!r} runs. Run: python -m lab up{option}{choice}")
    return lab


def find_host(name: str) -> tuple[Lab, Host]:
    """The host called `name` and its lab."""
    lab = load(prefix_of(name))
    if lab is None:
        raise LabError(f"there is no lab host {name!r}. Run: python -m lab status")
    return lab, lab.host(name)


def describe(lab: Lab) -> dict[str, Any]:
    """The lab as `status --json` prints it."""
    return {
        "prefix": lab.prefix,
        "bridge": lab.bridge,
        "bridge_ip": lab.address,
        "subnet": lab.subnet,
        "internet": lab.internet,
        "apt_proxy": lab.apt_proxy,
        "settings": lab.settings,
        "mirror_running": cgroups.populated(mirror_leaf(lab.prefix)),
        "hosts": [
            {
                "name": host.name,
                "ip": host.ip,
                "os": host.os,
                "gpu": host.gpu,
                "running": host.running,
                "pid": cgroups.init_process(host.leaf),
                "ssh_key": str(lab.ssh_key),
                "known_hosts": str(lab.known_hosts),
                "directory": host.directory,
            }
            for host in lab.hosts
        ],
    }


def mirror_leaf(prefix: str) -> str:
    """Name of the control group of the lab's mirror; a host's has a dash where this has a dot."""
    return f"llmhost-lab-{prefix}.mirror"


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Held by one process at a time: a prefix while its lab changes, "network" while a subnet is chosen."""
    path = RUN / f".{name}.lock"
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink()
        file.close()
        with suppress(OSError):
            RUN.rmdir()  # the last one out


def _locked(path: Path) -> IO[str]:
    """The lock file, locked; where its holder has removed it meanwhile, the one that others see now."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            file = path.open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
