"""A lab's life: up, down, and nothing left behind, whichever way it ends."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lab import LabError, cgroups, hosts, images, network, preflight, ssh, state, upstream
from lab.gpu import disk, machines
from lab.images import Say
from lab.state import Lab


@dataclass(frozen=True)
class Request:
    """What `up` is asked for: a host's label (its name without the prefix), operating system and simulated GPUs."""

    label: str
    os: str
    gpu: str = ""


def requests(systems: list[str], count: int, gpu: str = "") -> list[Request]:
    """From `--os` (OS or NAME=OS, repeatable), `--count` (hosts per unnamed OS) and `--gpu` (of them all).

    The unnamed are numbered from 1.
    """
    if gpu:
        machines.machine(gpu)
    if count < 1:
        raise LabError(f"--count must be at least 1, not {count}.")
    wanted: list[Request] = []
    number = 0
    for word in systems or ["debian-12"]:
        label, named, system = word.rpartition("=")
        images.operating_system(system)
        if named:
            wanted.append(Request(label, system, gpu))
            continue
        for _ in range(count):
            number += 1
            wanted.append(Request(str(number), system, gpu))
    labels = [request.label for request in wanted]
    for label in labels:
        if labels.count(label) > 1:
            raise LabError(f"two hosts would be called {label!r}: give each --os NAME=OS a name of its own.")
    return wanted


@dataclass(frozen=True)
class Options:
    """How a lab is connected, and what its images are built from."""

    internet: bool = False  # hosts reach it, by NAT
    mirror: bool = True  # a local mirror serves the lab
    archive: str | None = None  # URL of the archive that images are built from; None: the standard one


def up(wanted: list[Request], prefix: str, options: Options, say: Say = print) -> Lab:
    """Makes sure that the wanted hosts run and answer SSH; those that already do are left alone.

    Interrupted or failed, it removes what it has made: the whole lab where there was none before.
    """
    state.check_prefix(prefix)
    names = {state.host_name(prefix, request.label): request for request in wanted}
    systems = sorted({request.os for request in wanted})
    simulated = any(request.gpu for request in wanted)
    if simulated:
        disk.require(wanted, mirror=options.mirror)
    preflight.require(systems, options.archive, gpu=simulated)
    with state.lock(prefix):
        built = {system: images.ensure(system, options.archive, say=say) for system in systems}
        if options.mirror:
            upstream.prepare(systems, gpu=simulated)
        lab = _load_or_sweep(prefix)
        with _undone_unless_finished(lab):
            ssh.make_lab_key(lab)
            network.ensure(lab, internet=options.internet)
            if options.mirror:
                upstream.ensure(lab, say)
            _up_hosts(lab, names, built, say)
    return lab


def down(prefix: str, say: Say = print) -> None:
    """Removes the lab and whatever a crashed one left behind. There being none is fine."""
    state.check_prefix(prefix)
    preflight.require([])
    with state.lock(prefix):
        _sweep(prefix)
    say(f"lab {prefix!r}: nothing is left of it")


def restart(name: str) -> None:
    """Reboots a host from within."""
    lab, host = state.find_host(name)
    hosts.reboot(lab, host)


def _up_hosts(lab: Lab, names: dict[str, Request], built: dict[str, Path], say: Say) -> None:
    """Switches all hosts on, then waits for each: they boot at the same time."""
    for name, request in names.items():
        _discard_if_half_made(lab, name)
        present = next((host for host in lab.hosts if host.name == name), None)
        if present and present.os != request.os:
            raise LabError(f"{name} already exists with {present.os}, not {request.os}: name it otherwise (NAME=OS).")
        if present and present.gpu != request.gpu:
            raise LabError(
                f"{name} already exists with {_words(present.gpu)}, not {_words(request.gpu)}: "
                "name it otherwise (NAME=OS)."
            )
        if present is None:
            hosts.create(lab, name, request.os, built[request.os], request.gpu)
    started = time.monotonic()
    waiting = [host for host in lab.hosts if host.name in names and not host.running]
    for host in waiting:
        hosts.start(lab, host)
    for host in waiting:
        told = hosts.wait_ready(lab, host)
        say(f"{host.name}: {host.os} at {host.ip} answers SSH after {time.monotonic() - started:.1f} s ({told})")


def _words(gpu: str) -> str:
    return f"a simulated {gpu}" if gpu else "no simulated GPU"


def _discard_if_half_made(lab: Lab, name: str) -> None:
    for host in [host for host in lab.hosts if host.name == name and not host.ready]:
        hosts.remove(lab, host)


def _load_or_sweep(prefix: str) -> Lab:
    """The running lab, or a new one on swept ground: a lab without its network (this machine rebooted) is none."""
    lab = state.load(prefix)
    if lab is None or not network.is_up(prefix):
        _sweep(prefix)
        lab = Lab(prefix)
    return lab


@contextmanager
def _undone_unless_finished(lab: Lab) -> Iterator[None]:
    """On any way out but the good one, removes the hosts, and the lab, that were not there before."""
    was_there = state.load(lab.prefix) is not None
    names_before = {host.name for host in lab.hosts if host.ready}
    try:
        yield
    except BaseException:
        with _no_interruption():
            if was_there:
                for host in [host for host in lab.hosts if host.name not in names_before]:
                    hosts.remove(lab, host)
            else:
                _sweep(lab.prefix)
        raise


def _sweep(prefix: str) -> None:
    """Finds everything by its name rather than by the state: processes, mounts, network, files."""
    lab = state.load(prefix)
    for leaf in cgroups.leaves(prefix):
        cgroups.kill(leaf)
    disks = state.disks_directory(prefix)
    for directory in sorted(disks.glob("*")):
        hosts.release(directory.name)
    hosts.unmount_below(disks)
    network.remove(prefix, lab)
    shutil.rmtree(disks, ignore_errors=True)
    with suppress(OSError):
        disks.parent.rmdir()  # the last lab out
    shutil.rmtree(state.RUN / prefix, ignore_errors=True)


@contextmanager
def _no_interruption() -> Iterator[None]:
    """Tidying up takes under a second: a second Ctrl-C waits that long."""
    handlers = [
        (number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
