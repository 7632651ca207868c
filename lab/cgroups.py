"""Every process of a lab lives in a control group leaf of its own, by which it is found and killed, orphans included.

A leaf per host is also what makes several hosts possible: systemd-nspawn --keep-unit makes `payload` and `supervisor`
below the *current* group, so that without leaves all hosts would share one and their systemds kill each other's units.
Where systemd is PID 1, it owns the tree, and a leaf is a scope that it delegates; elsewhere leaves are made by hand.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lab import LabError


def unified_hierarchy() -> Path | None:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or beside the v1 controllers; None where it is not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


def systemd_is_running() -> bool:
    """Whether systemd is PID 1 of this machine (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def spawn(leaf: str, argv: Sequence[str], output: Path, environment: dict[str, str] | None = None) -> int:
    """Starts a program in a new leaf and a new session, its output appended to a file; returns its pid."""
    join: list[Path] = []
    if systemd_is_running():
        scope = ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={leaf}", "--property=Delegate=yes", "--"]
        argv = [*scope, *argv]
    else:
        join = [hierarchy / leaf for hierarchy in _hierarchies()]
        for directory in join:
            directory.mkdir(exist_ok=True)

    def enter() -> None:
        for directory in join:
            (directory / "cgroup.procs").write_text("0")

    with output.open("ab") as file:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a Ctrl-C in the terminal is for `up`, which then tidies up
            preexec_fn=enter,
        )
    while not populated(leaf) and child.poll() is None:  # a scope exists once systemd has answered systemd-run
        time.sleep(0.01)
    return child.pid


def populated(leaf: str) -> bool:
    """Whether any process lives in the leaf."""
    return any(_is_populated(directory) for directory in _unified_directories(leaf))


def processes(leaf: str) -> list[int]:
    """Every process in the leaf and below; a group that goes while it is read has none (os.walk passes over it)."""
    return [
        int(pid)
        for directory in _unified_directories(leaf)
        for group, _, _ in os.walk(directory)
        for pid in _read(Path(group, "cgroup.procs")).split()
    ]


def init_process(leaf: str) -> int | None:
    """The process that is PID 1 inside the host: killing it is pulling the plug."""
    for pid in processes(leaf):
        for line in _read(Path(f"/proc/{pid}/status")).splitlines():
            if line.startswith("NSpid:") and len(line.split()) > 2 and line.split()[-1] == "1":
                return pid
    return None


def leaves(prefix: str) -> list[str]:
    """The leaves of a lab, those of crashed runs included."""
    found = {
        directory.name.removesuffix(".scope")
        for hierarchy in _hierarchies()
        for parent in (hierarchy, hierarchy / "system.slice")
        for pattern in (f"llmhost-lab-{prefix}-*", f"llmhost-lab-{prefix}.mirror*")
        for directory in parent.glob(pattern)
    }
    return sorted(found)


def freeze(leaf: str, *, frozen: bool) -> None:
    """Stops every process of the leaf where it is, or lets all go on."""
    for directory in _unified_directories(leaf):
        (directory / "cgroup.freeze").write_text("1" if frozen else "0")


def await_empty(leaf: str, timeout_seconds: float) -> bool:
    """Waits until the last process of the leaf is gone; False where some are left after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    return all(_await_empty(directory, deadline) for directory in _unified_directories(leaf))


def kill(leaf: str) -> None:
    """Kills all processes of the leaf at once, so that none is orphaned, and removes the leaf."""
    for directory in _unified_directories(leaf):
        with suppress(FileNotFoundError):
            (directory / "cgroup.kill").write_text("1")
    if not await_empty(leaf, timeout_seconds=10):
        raise LabError(f"processes of {leaf} survive SIGKILL (stuck in the kernel?): {processes(leaf)}")
    remove(leaf)


def remove(leaf: str) -> None:
    """Removes an empty leaf; systemd collects its own scopes."""
    for hierarchy in _hierarchies():
        for directory, _, _ in os.walk(hierarchy / leaf, topdown=False):
            with suppress(FileNotFoundError):
                Path(directory).rmdir()


def signal_init(leaf: str, number: int) -> bool:
    """Sends a signal to the host's PID 1; False where it has none."""
    pid = init_process(leaf)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return True


def _hierarchies() -> list[Path]:
    """The hierarchies a leaf is made in: v2, and systemd's own v1 one where a machine still has it."""
    unified = unified_hierarchy()
    named = Path("/sys/fs/cgroup/systemd")
    return [path for path in (unified, named) if path is not None and (path / "cgroup.procs").exists()]


def _unified_directories(leaf: str) -> Iterator[Path]:
    hierarchy = unified_hierarchy()
    if hierarchy is not None:
        for directory in (hierarchy / leaf, hierarchy / "system.slice" / f"{leaf}.scope"):
            if directory.is_dir():
                yield directory


def _is_populated(directory: Path) -> bool:
    return "populated 1" in _read(directory / "cgroup.events")


def _await_empty(directory: Path, deadline: float) -> bool:
    with suppress(FileNotFoundError), (directory / "cgroup.events").open() as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI | select.POLLERR)
        while "populated 1" in events.read():
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:
                return False
            changes.poll(left_seconds * 1000)
            events.seek(0)
    return True


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the process or group went between listing and reading
        return ""
