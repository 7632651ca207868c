"""Lab hosts with a simulated NVIDIA GPU: `python -m lab up --gpu rtx-3060`, and docs/lab.md.

Stand-ins lie at the boundary to the hardware and to the vendor's packages, and nowhere else: apt, dpkg, systemd,
Docker, files, users, reboots are real. `STAND_INS` names each; such a host has the list in /etc/llmhost-lab/simulated.

    machines.py   the machines that can be imitated, as rows of a table
    disk.py       what is written to a host's disk before it boots
    packages.py   packages with the vendors' names and versions, which lab/mirror/vendor.py signs and serves
    programs/     what runs on the host in place of the kernel, of its modules and of the vendor's programs
"""

from __future__ import annotations

STAND_INS = (
    "hardware: /sys/bus/pci/devices, /sys/module and /proc/driver hold the tree of a machine with NVIDIA devices",
    "kernel: uname, modprobe, modinfo, depmod and update-initramfs work on recorded kernels; modules are text files",
    "devices: /dev/nvidia* answer to open and to nothing else",
    "packages: linux-image-*, linux-headers-* and dkms come from the lab, without a kernel and without a compiler",
    "packages: NVIDIA's driver, fabric manager and container toolkit have its names and versions, not its code",
    "nvidia-smi: tells recorded values; libcuda: cuInit looks at module, version and devices, and computes nothing",
    "packages: docker-ce and its parts hold Debian 13's Docker",
)
