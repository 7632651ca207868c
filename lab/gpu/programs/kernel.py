#!/usr/bin/env python3
# llmhost: lab/gpu/programs/kernel.py - written to lab hosts with a simulated GPU, never to a real one.
"""Stand-in for the kernel of a machine with NVIDIA GPUs. The name it is called by says what it does:

    uname               the real one's words, with the recorded kernel's release
    modprobe, modinfo   NVIDIA's modules and nouveau; every other module is the real programs' business
    depmod              lists the modules of a kernel, as text
    update-initramfs    keeps the blacklists that the initial RAM disk of a kernel would know
    boot                at every boot of the host: devices and modules appear as on a machine that was switched on

A module is a text file /lib/modules/KERNEL/updates/dkms/NAME.ko with its version and licence. "Loaded" is a directory
below /run, seen at /sys/module through a bind mount: it is gone with the boot, as a real one's.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

RUN = Path("/run/llmhost-lab")
ETC = Path("/etc/llmhost-lab")
MODULES = Path("/lib/modules")
BOOT = Path("/boot")
MODULE = RUN / "module"
PCI = RUN / "pci"
PROC_DRIVER = RUN / "proc-driver"

DEPENDS = {
    "nvidia": (),
    "nvidia_uvm": ("nvidia",),
    "nvidia_modeset": ("nvidia",),
    "nvidia_drm": ("nvidia_modeset", "nvidia"),  # as lsmod of a real host has it: nvidia 3 uvm,drm,modeset
    "nvidia_peermem": ("nvidia",),
    "nouveau": (),
}
# What udev loads once nvidia is in (71-nvidia.rules); nvidia_uvm is left out: NVIDIA's repository has no rule for it.
UDEV = ("nvidia_modeset", "nvidia_drm")
# Devices that do nothing when opened, and that containers may not open unless given to them, as they may null:
# loop-control, fuse, kmsg. The first that this machine's kernel has stands for NVIDIA's.
CLONED = ((10, 237), (10, 229), (1, 11))
OPEN_SINCE = 0x1E00  # Turing; field notes, nvidia.md, section 0.3
OPEN_ONLY_SINCE = 0x2900  # Blackwell


def main() -> int:
    words = sys.argv[1:]
    match Path(sys.argv[0]).name:
        case "uname":
            return uname(words)
        case "modprobe":
            return modprobe(words)
        case "modinfo":
            return modinfo(words)
        case "depmod":
            return depmod(words)
        case "update-initramfs":
            return update_initramfs(words)
        case "boot":
            return boot()
        case "recount":
            recount()
            return 0
    print(f"{sys.argv[0]}: the lab's kernel knows no such name", file=sys.stderr)
    return 2


# --- the running kernel -----------------------------------------------------------------------------------------


def running_kernel() -> str:
    return (RUN / "kernel").read_text().strip()


def installed_kernels() -> list[str]:
    """As GRUB orders them: the newest first."""
    found = [path.name.removeprefix("vmlinuz-") for path in BOOT.glob("vmlinuz-*")]
    return sorted(found, key=natural, reverse=True)


def natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def uname(words: list[str]) -> int:
    done = subprocess.run(["/usr/bin/uname", *words], stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout.replace(os.uname().release, running_kernel()))
    return done.returncode


# --- modules on disk --------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    return name.replace("-", "_")


def module_file(name: str, kernel: str) -> Path:
    return MODULES / kernel / "updates/dkms" / f"{canonical(name).replace('_', '-')}.ko"


def fields(file: Path) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in file.read_text().splitlines())


def modinfo(words: list[str]) -> int:
    kernel, field, names = running_kernel(), "", []
    rest = iter(words)
    for word in rest:
        if word in ("-k", "--set-version"):
            kernel = next(rest)
        elif word in ("-F", "--field"):
            field = next(rest)
        elif not word.startswith("-"):
            names.append(word)
    if not all(canonical(name) in DEPENDS for name in names):
        os.execv("/usr/sbin/modinfo", ["modinfo", *words])
    for name in names:
        file = module_file(name, kernel)
        if not file.exists():
            print(f"modinfo: ERROR: Module {name} not found.", file=sys.stderr)
            return 1
        known = {"filename": str(file), **fields(file)}
        if field:
            print(known.get(field, ""))
        else:
            print("\n".join(f"{key + ':':<16}{value}" for key, value in known.items()))
    return 0


def depmod(words: list[str]) -> int:
    named = [word for word in words if not word.startswith("-")]
    kernel = named[0] if named else running_kernel()
    directory = MODULES / kernel
    text = "".join(f"{file.relative_to(directory)}:\n" for file in sorted(directory.rglob("*.ko")))
    (directory / "modules.dep").write_text(text)
    if (RUN / "kernel").exists() and kernel == running_kernel():
        (RUN / "modules.dep").write_text(text)  # what nvidia-cdi-refresh.path watches
    return 0


def update_initramfs(words: list[str]) -> int:
    kernel = words[words.index("-k") + 1] if "-k" in words else running_kernel()
    for version in installed_kernels() if kernel == "all" else [kernel]:
        print(f"update-initramfs: Generating /boot/initrd.img-{version}")
        (BOOT / f"initrd.img-{version}").write_text("".join(f"blacklist {name}\n" for name in sorted(blacklisted())))
    return 0


def blacklisted() -> set[str]:
    """Modules that udev may not load (modprobe.d(5))."""
    places = (Path("/etc/modprobe.d"), Path("/run/modprobe.d"), Path("/lib/modprobe.d"))
    return {name for place in places for file in place.glob("*.conf") for name in blacklist_lines(file)}


def blacklist_lines(file: Path) -> set[str]:
    lines = [line.split() for line in file.read_text().splitlines()]
    return {canonical(words[1]) for words in lines if len(words) == 2 and words[0] == "blacklist"}


# --- loading and unloading --------------------------------------------------------------------------------------


def modprobe(words: list[str]) -> int:
    options = {word for word in words if word.startswith("-")}
    names = [word for word in words if not word.startswith("-")]
    if not names or not all(canonical(name) in DEPENDS for name in names):
        os.execv("/usr/sbin/modprobe", ["modprobe", *words])
    wanted = names if options & {"-r", "--remove", "-a", "--all"} else names[:1]  # more words are module parameters
    with (RUN / "modprobe.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in wanted:
            if options & {"-r", "--remove"}:
                unload(canonical(name))
            else:
                load(canonical(name))
        recount()
    return 0


def load(name: str) -> None:
    if (MODULE / name).exists():
        return
    file = module_file(name, running_kernel())
    if name != "nouveau" and not file.exists():
        fatal(f"modprobe: FATAL: Module {name} not found in directory {MODULES}/{running_kernel()}")
    for needed in DEPENDS[name]:
        load(needed)
    if name in ("nvidia", "nouveau"):
        claim(name, "" if name == "nouveau" else fields(file)["license"])
    known = {"version": ""} if name == "nouveau" else fields(file)
    (MODULE / name / "holders").mkdir(parents=True)
    if known["version"]:
        (MODULE / name / "version").write_text(f"{known['version']}\n")
    (MODULE / name / "initstate").write_text("live\n")
    (MODULE / name / "refcnt").write_text("0\n")
    if name == "nvidia":
        appear(known["version"], known["license"])
        for other in UDEV:
            load(other)
    if name == "nvidia_uvm":
        make_nodes("nvidia-uvm", "nvidia-uvm-tools")


def claim(name: str, licence: str) -> None:
    """The module takes the GPUs that nothing drives; without one it does not stay."""
    taken = []
    for device in devices("gpu"):
        link = PCI / device["address"] / "driver"
        number = int(device["device"], 16)
        if not link.is_symlink() and (name == "nouveau" or "GPL" not in licence or number >= OPEN_SINCE):
            taken.append(link)
    if not taken:
        fatal(f"modprobe: ERROR: could not insert '{name}': No such device")
    for link in taken:
        link.symlink_to(driver_directory(name))
    for device in devices("nvswitch") if name == "nvidia" else []:
        (PCI / device["address"] / "driver").symlink_to(driver_directory("nvidia-nvswitch"))


def appear(version: str, licence: str) -> None:
    """What the driver shows once it drives something."""
    flavour = "Open Kernel Module for x86_64" if "GPL" in licence else "x86_64 Kernel Module"
    directory = PROC_DRIVER / "nvidia"
    directory.mkdir(exist_ok=True)
    (directory / "version").write_text(
        f"NVRM version: NVIDIA UNIX {flavour}  {version}  Release Build  (stand-in)\nGCC version:  none\n"
    )
    for number, device in enumerate(driven()):
        (directory / "gpus" / device["address"]).mkdir(parents=True, exist_ok=True)
        (directory / "gpus" / device["address"] / "information").write_text(
            f"Model: \t\t {device['name']}\nGPU UUID: \t {device['uuid']}\nBus Location: \t {device['address']}\n"
        )
        make_nodes(f"nvidia{number}")
    make_nodes("nvidiactl")
    for device in devices("nvswitch"):
        (PROC_DRIVER / "nvidia-nvswitch/devices" / device["address"]).mkdir(parents=True, exist_ok=True)
    # Closed modules drive no Blackwell: they load, and nvidia-smi finds no device.
    usable = [d for d in driven() if "GPL" in licence or int(d["device"], 16) < OPEN_ONLY_SINCE]
    (RUN / "usable").write_text("".join(f"{device['address']}\n" for device in usable))


def unload(name: str) -> None:
    if not (MODULE / name).exists():
        return
    recount()
    if name == "nouveau" or int((MODULE / name / "refcnt").read_text()):  # the console is nouveau's
        fatal(f"modprobe: FATAL: Module {name} is in use.")
    shutil.rmtree(MODULE / name)
    if name == "nvidia_uvm":
        remove_nodes("nvidia-uvm", "nvidia-uvm-tools")
    if name == "nvidia":
        remove_nodes("nvidiactl", *(f"nvidia{number}" for number in range(len(driven()))))
        for link in PCI.glob("*/driver"):
            if link.readlink().name.startswith("nvidia"):
                link.unlink()
        for place in ("nvidia", "nvidia-nvswitch"):
            shutil.rmtree(PROC_DRIVER / place, ignore_errors=True)
        (RUN / "usable").unlink()


def recount() -> None:
    """References of each loaded module: its holders, which are modules that need it, and open device nodes."""
    held = open_nodes()
    uvm = sum(name.startswith("nvidia-uvm") for name in held)
    for name in DEPENDS:
        if name != "nouveau" and (MODULE / name).exists():
            users = {other for other in DEPENDS if name in DEPENDS[other] and (MODULE / other).exists()}
            holders = MODULE / name / "holders"
            for gone in {path.name for path in holders.iterdir()} - users:
                (holders / gone).unlink()
            for other in users:
                (holders / other).touch()  # a link to the module in the kernel's
            nodes = {"nvidia_uvm": uvm, "nvidia": len(held) - uvm}.get(name, 0)
            (MODULE / name / "refcnt").write_text(f"{len(users) + nodes}\n")


def open_nodes() -> list[str]:
    """Names of NVIDIA's device nodes, once for each time that a process holds one open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            for descriptor in os.listdir(process / "fd"):
                with suppress(OSError):
                    target = os.readlink(process / "fd" / descriptor)
                    if target.startswith("/dev/nvidia"):
                        found.append(target.removeprefix("/dev/"))
    return found


def make_nodes(*names: str) -> None:
    for name in names:
        node = Path("/dev", name)
        if not node.exists() and not any(clone(node, os.makedev(*numbers)) for numbers in CLONED):
            fatal(f"none of the devices {CLONED} can be opened on this machine: the lab clones one of them as {node}")


def clone(node: Path, device: int) -> bool:
    """Makes the node, and says whether it opens; it stays only then."""
    os.mknod(node, 0o020666, device)
    node.chmod(0o666)
    try:
        os.close(os.open(node, os.O_RDWR))
    except OSError:
        node.unlink()
        return False
    return True


def remove_nodes(*names: str) -> None:
    for name in names:
        Path("/dev", name).unlink(missing_ok=True)


# --- the machine ------------------------------------------------------------------------------------------------


def devices(kind: str) -> list[dict[str, str]]:
    machine = json.loads((ETC / "machine.json").read_text())
    return [device for device in machine["devices"] if device["kind"] == kind]


def driven() -> list[dict[str, str]]:
    """The GPUs that NVIDIA's driver holds."""
    links = [(device, PCI / device["address"] / "driver") for device in devices("gpu")]
    return [device for device, link in links if link.is_symlink() and link.readlink().name == "nvidia"]


def driver_directory(name: str) -> Path:
    directory = RUN / "drivers" / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def boot() -> int:
    """Power on: PCI devices, the newest kernel with its modules not loaded, then what udev would load."""
    for directory in (PCI, MODULE, PROC_DRIVER):
        directory.mkdir(parents=True)
    (RUN / "kernel").write_text(f"{installed_kernels()[0]}\n")
    machine = json.loads((ETC / "machine.json").read_text())
    for device in machine["devices"]:
        directory = PCI / device["address"]
        directory.mkdir()
        for name in ("vendor", "device", "class"):
            (directory / name).write_text(f"{device[name]}\n")
        if device["kind"] == "gpu":
            (directory / "current_link_width").write_text("16\n")
            (directory / "max_link_width").write_text("16\n")
    mount("-o", "remount,bind,rw", "/sys")  # systemd-nspawn makes its own, read-only, and leaves /sys/module out
    Path("/sys/module").mkdir()
    mount("-o", "remount,bind,ro", "/sys")
    for tree, place in ((PCI, "/sys/bus/pci/devices"), (MODULE, "/sys/module"), (PROC_DRIVER, "/proc/driver")):
        mount("--bind", str(tree), place)
    for name in ("smi.xml", "gpus.tsv", "fabric"):
        shutil.copyfile(ETC / name, RUN / name)
    for name in ("persistence.lock", "fabric.lock", "modules.dep"):
        (RUN / name).touch()
    coldplug(machine["driver"])
    return 0


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def coldplug(driver: str) -> None:
    """What the initial RAM disk and udev do: a GPU gets the first driver that is there and not forbidden."""
    if driver == "vfio-pci":
        for device in devices("gpu"):
            (PCI / device["address"] / "driver").symlink_to(driver_directory(driver))
        return
    kernel = running_kernel()
    initrd = BOOT / f"initrd.img-{kernel}"
    early = blacklist_lines(initrd) if initrd.exists() else set()
    if driver == "nouveau" and not ("nouveau" in early and "nouveau" in blacklisted()):
        load("nouveau")
    elif module_file("nvidia", kernel).exists() and "nvidia" not in blacklisted():
        with suppress(SystemExit):  # as on a real machine, a driver that does not fit stops no boot
            load("nvidia")
            load("nvidia_uvm")
    recount()


def fatal(words: str) -> NoReturn:
    print(words, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
