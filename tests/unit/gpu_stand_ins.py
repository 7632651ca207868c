"""Stand-ins for a GPU host: its kernel's files below a root of their own, and programs on PATH with recorded words.

A healthy H200 with driver, Docker and container toolkit; a test breaks one thing and looks at it with the real probe.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).resolve().parents[2] / "lab/gpu/nvidia-smi-q-h200.xml"
VERSION = "580.159.04"  # of the recorded answer
KERNEL, NEWER = "6.8.0-99-generic", "6.8.0-100-generic"
CARD = "0000:00:06.0"
UPTIME_HOURS = 100
FROZEN_DRIVER, FROZEN_CONTAINERS = ["^nvidia-", "^libnvidia-"], ["^docker-ce", "^nvidia-container-toolkit"]
TOOLKIT = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)

LIBCUDA = r"""
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int cuInit(unsigned int flags) {
    const char *way = getenv("STAND_IN_CUINIT");
    if (way && !strcmp(way, "hangs")) for (;;) pause();
    if (way && !strcmp(way, "crashes")) abort();
    return way ? atoi(way) : 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { const char *n = getenv("STAND_IN_DEVICES"); *count = n ? atoi(n) : 1; return 0; }
"""

PROGRAMS = {
    "nvidia-smi": 'case "$1" in -L) echo "GPU 0: NVIDIA H200 (UUID: GPU-0)" ;; *) cat "$SAYS/smi.xml" ;; esac',
    "uname": 'case "$1" in -r) cat "$SAYS/kernel" ;; *) exec /bin/uname "$@" ;; esac',
    "modinfo": 'test -e "$SAYS/modinfo-$2" || { echo "modinfo: ERROR: Module nvidia not found." >&2; exit 1; }\n'
    'cat "$SAYS/modinfo-$2"',
    # Asked for seconds since boot, what it has kept the longest; else its last hours.
    "journalctl": 'case "$*" in *short-monotonic*) cat "$SAYS/kernel-log-kept" ;; *) cat "$SAYS/kernel-log" ;; esac',
    "dmesg": 'echo "dmesg: read kernel buffer failed: Operation not permitted" >&2; exit 1',
    "systemctl": 'case "$*" in\n*NeedDaemonReload*) cat "$SAYS/stale" ;;\ndaemon-reload) touch "$SAYS/reloaded" ;;\n'
    '*ActiveState*) cat "$SAYS/units" ;;\nesac',
    "dpkg-query": 'cat "$SAYS/packages"; exit 1',  # one of the patterns matches nothing
    "apt-config": 'cat "$SAYS/apt-config"',
    "apt": 'echo "WARNING: apt does not have a stable CLI interface." >&2; cat "$SAYS/upgradable"',
    "nvidia-ctk": 'echo "INFO[0000] Found 1 CDI devices" >&2; cat "$SAYS/cdi"',
    "docker": 'case "$1" in\n'
    "version) echo 29.7.2 ;;\n"
    "run) echo 0123456789ab ;;\n"
    'rm) touch "$SAYS/removed" ;;\n'
    "exec)\n"
    '  if test -e "$SAYS/loses-gpus" && test -e "$SAYS/reloaded"; then\n'
    '    echo "Failed to initialize NVML: Unknown Error"; exit 255\n'
    "  fi\n"
    '  shift 2; test "$1" = /usr/bin/python3 && { shift; set -- "$PYTHON" "$@"; }\n'
    '  exec "$@" ;;\n'
    "esac",
}


@dataclass
class GpuHost:
    """Healthy when made; `says`, `file`, `program` and the plan are what tests break."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root, self.bin, self.answers = (self.directory / name for name in ("root", "gpu-bin", "answers"))
        self.bin.mkdir(parents=True)
        self.answers.mkdir()
        self.plan = plan_json(self.directory)
        self.write_root()
        self.write_answers()
        for name, script in PROGRAMS.items():
            self.program(name, script)
        python = Path(self.plan["engine"]["release"]["path"]) / "venv/bin/python"
        python.parent.mkdir(parents=True)
        executable(python, 'cat "$SAYS/torch"')
        self.environment |= {"LD_LIBRARY_PATH": str(libcuda(self.directory)), "SAYS": str(self.answers)}

    def write_root(self) -> None:
        self.file(f"sys/bus/pci/devices/{CARD}/vendor", "0x10de\n")
        self.file(f"sys/bus/pci/devices/{CARD}/class", "0x030200\n")
        for other, kind in (("0000:00:06.1", "0x040300"), ("0000:00:07.0", "0x068000")):  # its audio, an NVSwitch
            self.file(f"sys/bus/pci/devices/{other}/vendor", "0x10de\n")
            self.file(f"sys/bus/pci/devices/{other}/class", f"{kind}\n")
        self.file("proc/uptime", f"{UPTIME_HOURS * 3600}.25 700000.00\n")
        self.started(0.02)
        self.file("sys/module/nvidia/version", f"{VERSION}\n")
        self.file("proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}\n")
        for kernel in (KERNEL, NEWER):
            self.file(f"boot/vmlinuz-{kernel}", "")
            self.file(f"lib/modules/{kernel}/modules.dep", "")
        (self.root / "lib/modules/6.8.0-101-generic/updates").mkdir(parents=True)  # what DKMS left of a removed one
        for node in ("nvidia0", "nvidiactl", "nvidia-uvm"):
            self.device(node)
        self.file("etc/cdi/other.yaml", "kind: example.com/net\n")
        self.specification("run/cdi/nvidia.yaml", VERSION)

    def write_answers(self) -> None:
        self.says("smi.xml", RECORDED.read_text())
        self.says("kernel", KERNEL)
        self.says(f"modinfo-{KERNEL}", VERSION)
        self.says(f"modinfo-{NEWER}", VERSION)
        self.says("kernel-log", "2026-11-20T08:00:00+00:00 host kernel: Linux version 6.8.0-99-generic\n")
        self.says("kernel-log-kept", "[    0.000000] host kernel: Linux version 6.8.0-99-generic\n")
        self.says("stale", "no\n\nno\n")
        self.units("active", "inactive")
        rows = [f"{name} 1.20.0-1 ii " for name in TOOLKIT]
        rows += [f"libnvidia-compute-580-server {VERSION}-0ubuntu0.24.04.1 ii ", "nvidia-utils-535 535.1-1 rc "]
        self.says("packages", "\n".join(rows))
        patterns = [f'Unattended-Upgrade::Package-Blacklist:: "{one}";' for one in FROZEN_DRIVER + FROZEN_CONTAINERS]
        self.says("apt-config", "\n".join(['Unattended-Upgrade::Package-Blacklist "";', *patterns]))
        self.says("upgradable", "Listing...\n")
        self.says("cdi", "nvidia.com/gpu=0\nnvidia.com/gpu=all\n")
        self.says("torch", '[W] a library talks\n{"version": "2.14.0", "cuda": "13.0", "devices": ["NVIDIA H200"]}\n')

    def file(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def started(self, seconds: float) -> None:
        """The first process did, this long after the kernel: later in a container."""
        ticks = round(seconds * os.sysconf("SC_CLK_TCK"))
        self.file("proc/1/stat", f"1 (systemd (x)) S 0 1 1 0 -1 4194560 {'0 ' * 12}{ticks} 22000 3000\n")

    def device(self, name: str) -> None:
        path = self.root / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/null")  # a character device that anybody may make

    def specification(self, name: str, version: str) -> None:
        library = f"/usr/lib/x86_64-linux-gnu/libcuda.so.{version}"
        self.file(name, f"kind: nvidia.com/gpu\n- hostPath: {library}\n  containerPath: {library}\n")

    def says(self, name: str, text: str) -> None:
        (self.answers / name).write_text(text)

    def forget(self, name: str) -> None:
        (self.answers / name).unlink()

    def units(self, persistenced: str, fabric_manager: str) -> None:
        blocks = (("nvidia-persistenced", persistenced), ("nvidia-fabricmanager", fabric_manager))
        self.says("units", "\n\n".join(f"Id={name}.service\nActiveState={state}" for name, state in blocks) + "\n")

    def smi(self, old: str, new: str) -> None:
        """The recorded answer with one value changed."""
        xml = (self.answers / "smi.xml").read_text()
        assert old in xml, old
        self.says("smi.xml", xml.replace(old, new))

    def program(self, name: str, script: str) -> None:
        executable(self.bin / name, script)

    def remove(self, name: str) -> None:
        path = self.root / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @property
    def variables(self) -> dict[str, str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return {"PATH": path, "LLMHOST_ROOT": str(self.root), "PYTHON": sys.executable, **self.environment}


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def libcuda(directory: Path) -> Path:
    """The directory of a library with the three calls of CUDA's that the probe makes."""
    place = directory / "lib"
    place.mkdir()
    library = place / f"libcuda.so.{VERSION}"
    library.write_bytes(compiled())
    (place / "libcuda.so.1").symlink_to(library)
    return place


@cache
def compiled() -> bytes:
    compiler = shutil.which("cc") or pytest.skip("no C compiler here to make a stand-in for libcuda with")
    with tempfile.NamedTemporaryFile(suffix=".so") as library:
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library.name]
        subprocess.run(command, input=LIBCUDA.encode(), check=True)
        return Path(library.name).read_bytes()


def plan_json(directory: Path) -> dict[str, Any]:
    """Of a HostPlan with a driver, what the GPU's rows read (test_gpu_probe holds its names to the model's)."""
    return {
        "host": "lab1",
        "decisions": [],
        "driver": {
            "branch": "580",
            "version": VERSION,
            "modules": "open",
            "source": "ubuntu-archive",
            "packages": ["nvidia-headless-no-dkms-580-server-open", "nvidia-utils-580-server"],
            "fabric_manager": False,
            "gpus": 1,
            "frozen": FROZEN_DRIVER,
        },
        "containers": {
            "docker_minimum": "26.1",
            "toolkit_version": "1.20.0",
            "toolkit_packages": [f"{name}=1.20.0-1" for name in TOOLKIT],
            "frozen": FROZEN_CONTAINERS,
        },
        "engine": {
            "accelerator": "nvidia",
            "runtime": "venv",
            "release": {"path": str(directory / "release")},
            "service": {"unit": "vllm.service"},
        },
    }
