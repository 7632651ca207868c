#!/usr/bin/env python3
# llmhost: lab/gpu/programs/daemon.py - stand-in for nvidia-persistenced and nv-fabricmanager on lab hosts.
"""Forks once it is ready, holds what the real daemon holds for as long as it lives, and says why where it cannot."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

VERSION = "@VERSION@"
RUN = Path("/run/llmhost-lab")
RECOUNT = "/usr/local/lib/llmhost-lab/recount"
NAME = Path(sys.argv[0]).name


def main() -> int:
    loaded = Path("/sys/module/nvidia/version")
    if not loaded.exists():
        return failed("Failed to query NVIDIA devices. Please ensure that the NVIDIA driver is loaded.")
    if loaded.read_text().strip() != VERSION:
        return failed(f"its version {VERSION} is not that of the loaded NVIDIA module, {loaded.read_text().strip()}")
    if NAME == "nv-fabricmanager":
        if not Path("/proc/driver/nvidia-nvswitch/devices").exists():
            return failed("request to query NVSwitch device information failed: NV_WARN_NOTHING_TO_DO")
        return serve("fabric.lock", [], Path("/run/nvidia-fabricmanager/nv-fabricmanager.pid"))
    pid_file = Path("/run/nvidia-persistenced/nvidia-persistenced.pid")
    nodes = ["/dev/nvidiactl"]
    if "--no-persistence-mode" in sys.argv:
        return serve("", nodes, pid_file)
    return serve("persistence.lock", [*nodes, *map(str, sorted(Path("/dev").glob("nvidia[0-9]*")))], pid_file)


def serve(lock: str, nodes: list[str], pid_file: Path) -> int:
    """Locks, opens, tells the parent, and waits to be stopped."""
    held = [os.open(node, os.O_RDWR) for node in nodes]
    if lock:
        held.append(os.open(RUN / lock, os.O_RDONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
    pid_file.parent.mkdir(exist_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    ready, tell = os.pipe()
    child = os.fork()
    if child:
        for descriptor in (*held, tell):
            os.close(descriptor)
        os.read(ready, 1)
        pid_file.write_text(f"{child}\n")
        return 0
    subprocess.run([RECOUNT], check=True)
    print(f"{NAME}: running", flush=True)
    os.write(tell, b"1")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    for descriptor in held:
        os.close(descriptor)
    subprocess.run([RECOUNT], check=True)
    return 0


def failed(words: str) -> int:
    print(f"{NAME}: {words}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
