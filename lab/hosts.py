"""One disposable host: a disk over a shared image, booted by systemd-nspawn, found again by its name.

The disk is an overlay on a real file system (not systemd-nspawn's own --volatile=overlay, which loses all at a reboot).
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from lab import LabError, cgroups, network, shell, ssh, state
from lab.gpu import disk
from lab.state import Host, Lab

# systemd-nspawn --keep-unit does not restart a host that reboots: it exits with 133, to be started again.
SUPERVISOR = 'while :; do "$@"; [ $? -eq 133 ] || break; done'

# Which boot this is, then systemd's word for it: "running", "starting", or "degraded" with the units that failed.
BOOT_REPORT = "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running {wait}; systemctl --failed -q --plain"

NSPAWN = Path("/run/systemd/nspawn")


def create(lab: Lab, name: str, system: str, image: Path, gpu: str = "") -> Host:
    """Gives a new host its disk, address, identity and keys. It is recorded first, so that a half-made one is found."""
    directory = state.disk_directory(name)
    host = Host(name, system, network.free_address(lab), str(image), str(directory), gpu=gpu)
    lab.hosts.append(host)
    state.save(lab)
    for part in ("upper", "work", "root"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    _mount(host)
    _personalise(lab, host)
    if gpu:
        disk.simulate(directory / "root", system, gpu, lab.address)
        (directory / "docker").mkdir()
    return host


def start(lab: Lab, host: Host) -> None:
    """Switches the host on; `wait_ready` waits for it. A host that runs is left alone."""
    if host.running:
        return
    _sweep_nspawn(host.name)  # what a killed predecessor left, or nspawn refuses the name
    _mount(host)
    cgroups.spawn(
        host.leaf,
        ["sh", "-c", SUPERVISOR, "llmhost-lab", *_nspawn_command(lab, host)],
        output=console_log(host),
        environment={
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",  # cgroup v2 in the host, whatever this machine's controllers use
            "SYSTEMD_NSPAWN_TMPFS_TMP": "0",  # /tmp as the image has it, not a tenth of the memory
        },
    )


def wait_ready(lab: Lab, host: Host, timeout_seconds: float = 60, previous_boot: str = "") -> str:
    """Waits until the host answers an SSH login; returns systemd's word for its state ("running").

    The first time it also waits until the boot is finished; later its services may take minutes to start.
    With `previous_boot`, a boot_id, the boot waited for is a later one.
    """
    report = BOOT_REPORT.format(wait="" if host.ready else "--wait")
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if not host.running:
            raise LabError(f"{host.name} stopped while booting. The end of {console_log(host)}:\n{_console_tail(host)}")
        done = ssh.attempt(lab, host, report, timeout_seconds=max(deadline - time.monotonic(), 1))
        boot, _, told = done.stdout.partition("\n") if done else ("", "", "")
        if told and boot != previous_boot:
            _mark_ready(lab, host)
            return " ".join(told.split())
        time.sleep(0.05)  # nothing tells that a port has opened: ask again
    raise LabError(
        f"{host.name} ({host.ip}) did not answer SSH within {timeout_seconds:.0f} s. "
        f"The end of {console_log(host)}:\n{_console_tail(host)}"
    )


def reboot(lab: Lab, host: Host) -> None:
    """Reboots the host from within and waits until it is back: same disk, new boot_id."""
    before = boot_id(lab, host)
    ssh.attempt(lab, host, "systemctl reboot")
    wait_ready(lab, host, previous_boot=before)


def boot_id(lab: Lab, host: Host) -> str:
    """Identity of the running boot; uptime would be the controller's."""
    done = ssh.attempt(lab, host, "cat /proc/sys/kernel/random/boot_id")
    if done is None or done.returncode != 0:
        raise LabError(f"{host.name} does not answer SSH: {done.stderr.strip() if done else 'no reply within 60 s'}")
    return done.stdout.strip()


def stop(host: Host, timeout_seconds: float = 30) -> None:
    """Shuts the host down in an orderly way; `start` brings it back with its disk."""
    cgroups.signal_init(host.leaf, signal.SIGRTMIN + 4)  # systemd as PID 1 takes it for "power off" (systemd(1))
    if not cgroups.await_empty(host.leaf, timeout_seconds):
        raise LabError(f"{host.name} did not shut down within {timeout_seconds:.0f} s. See {console_log(host)}")
    release(host.name)


def remove(lab: Lab, host: Host) -> None:
    """Kills the host and removes all that it had."""
    cgroups.kill(host.leaf)
    release(host.name)
    network.remove_interface(host.interface)
    shutil.rmtree(host.directory, ignore_errors=True)
    ssh.forget(lab, host)
    lab.hosts.remove(host)
    state.save(lab)


def release(name: str) -> None:
    """Takes from a host that no longer runs what this machine lent it: mounts and control group. Its disk stays."""
    _sweep_nspawn(name)
    unmount_below(state.disk_directory(name))
    cgroups.remove(f"llmhost-lab-{name}")


def unmount_below(directory: Path) -> None:
    """Unmounts everything in a directory, the last mounted first."""
    for place in reversed(mounts_below(directory)):
        if not shell.succeeds("umount", str(place)):
            shell.run("umount", "--lazy", str(place))  # someone's shell stands in it: gone when they leave


def mounts_below(directory: Path) -> list[Path]:
    """Mount points in a directory, in the order of mounting."""
    places = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [place for place in places if place.is_relative_to(directory)]


def console_log(host: Host) -> Path:
    """What the host printed on its console, boots and reboots in one file."""
    return Path(host.directory, "console.log")


def _mount(host: Host) -> None:
    directory = Path(host.directory)
    root = directory / "root"
    if not mounts_below(root):
        options = f"lowerdir={host.image},upperdir={directory}/upper,workdir={directory}/work"
        shell.run("mount", "-t", "overlay", "overlay", "-o", options, str(root))


def _personalise(lab: Lab, host: Host) -> None:
    """Writes what makes the image this host; through the mounted overlay, so that directories keep owner and mode."""
    root = Path(host.directory, "root")
    servers = network.name_servers() if lab.internet else []
    private_key, public_key = ssh.make_host_key(lab, host)
    authorized_key = lab.ssh_key.with_suffix(".pub").read_text()
    files = {
        "etc/hostname": f"{host.name}\n",
        "etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n::1 localhost ip6-localhost\n",
        "etc/resolv.conf": "".join(f"nameserver {server}\n" for server in servers),
        "etc/systemd/network/10-host0.network": (
            "[Match]\nName=host0\n"
            f"[Network]\nAddress={host.ip}/24\nGateway={lab.address}\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n"
        ),
        "etc/ssh/ssh_host_ed25519_key.pub": public_key,
    }
    if lab.apt_proxy:
        files["etc/apt/apt.conf.d/00lab-proxy"] = f'Acquire::http::Proxy "{lab.apt_proxy}";\n'
    for place, text in files.items():
        _write(root / place, text, mode=0o644)
    _write(root / "etc/ssh/ssh_host_ed25519_key", private_key, mode=0o600)
    for home in ("root", "home/admin"):
        owner = (root / home).stat()
        _write(root / home / ".ssh/authorized_keys", authorized_key, mode=0o600)
        os.chown(root / home / ".ssh/authorized_keys", owner.st_uid, owner.st_gid)


def _write(file: Path, text: str, mode: int) -> None:
    file.unlink(missing_ok=True)  # a link in the image would lead out of the host's disk
    file.touch(mode=mode)
    file.write_text(text)
    file.chmod(mode)


def _nspawn_command(lab: Lab, host: Host) -> list[str]:
    return [
        "systemd-nspawn",
        "--quiet",
        f"--directory={host.directory}/root",
        f"--machine={host.name}",
        "--boot",
        "--network-veth",
        f"--network-bridge={lab.bridge}",
        "--register=no",  # no machined is needed
        "--keep-unit",  # nor systemd as PID 1 of this machine
        "--console=pipe",
        "--resolv-conf=off",  # written once, above
        "--timezone=off",
        "--link-journal=no",
        # As much of a machine as a container can be (Docker runs in it), but this machine's clock, modules and ports.
        "--capability=all",
        "--drop-capability=CAP_SYS_TIME,CAP_SYS_MODULE,CAP_SYS_RAWIO",
        "--system-call-filter=add_key keyctl bpf",
        # Docker's own overlay cannot lie on the host's: without this it would take the driver "vfs" and say nothing.
        *([f"--bind={host.directory}/docker:/var/lib/docker"] if host.gpu else []),
    ]


def _sweep_nspawn(name: str) -> None:
    """Removes what a killed systemd-nspawn leaves: its lock, a mount per host, directories."""
    root = state.disk_directory(name) / "root"
    if mounts_below(root):
        seen = root.stat()
        (NSPAWN / f"locks/inode-{seen.st_dev}:{seen.st_ino}").unlink(missing_ok=True)
    for directory in NSPAWN.glob(f"*/{name}"):
        unmount_below(directory)
        with suppress(OSError):
            directory.rmdir()


def _mark_ready(lab: Lab, host: Host) -> None:
    if not host.ready:
        host.ready = True
        state.save(lab)


def _console_tail(host: Host) -> str:
    with suppress(FileNotFoundError):
        return "\n".join(console_log(host).read_text(errors="replace").splitlines()[-12:])
    return ""
