"""The NVIDIA driver, Docker and the container toolkit on hosts whose GPUs are simulated (docs/lab.md).

apt, dpkg, systemd, Docker and reboots are real; hardware, kernel modules and the vendors' packages are stand-ins. Each
host goes through its tests in the order of this file: each finds what the one before it left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lab import faults, life, state
from lab.gpu import disk, packages
from tests.lab import gpu_host, spine
from tests.lab.spine import NewHost

pytestmark = pytest.mark.lab

LTS, NEWER = "580.178.04", "595.91.07"
TO_NEWER = ("--data", "driver_branch=595")


@pytest.fixture(scope="module")
def workstation(new_host: NewHost) -> str:
    """Debian 13, nouveau on its GPU."""
    return new_host("gw", "debian-13", "rtx-3060-nouveau")


@pytest.fixture(scope="module")
def server(new_host: NewHost) -> str:
    """Debian 12, eight GPUs behind NVSwitches."""
    return new_host("gh", "debian-12", "a100-hgx")


@pytest.fixture(scope="module")
def plain(new_host: NewHost) -> str:
    """Debian 13, a GPU that nothing drives."""
    return new_host("gp", "debian-13", "rtx-3060")


@pytest.fixture(scope="module")
def used(new_host: NewHost) -> str:
    """Debian 13, and not as bare as the others."""
    return new_host("gd", "debian-13", "rtx-3060")


def one_version(version: str) -> dict[str, str]:
    return dict.fromkeys(("loaded", "disk", "package", "smi", "cdi"), version)


# --- from bare to a certificate


def test_from_bare_to_certificate_with_a_reboot_on_the_way(workstation: str) -> None:
    before = gpu_host.boot_id(workstation)
    ended = spine.deploy(workstation)
    assert ended.code == 0, ended.output
    assert "reboot: nouveau holds the GPU" in ended.output
    assert gpu_host.boot_id(workstation) != before
    assert spine.on(workstation, "journalctl --list-boots --quiet --no-pager | wc -l") == "2", "one reboot is enough"
    assert gpu_host.versions(workstation) == one_version(LTS)
    proven = spine.certificate(workstation)
    assert proven["result"] == "passed", ended.output
    assert len(proven["simulated"]) > 5 and "NVIDIA GeForce RTX 3060" in proven["simulated"][0]
    assert f"SIMULATED {workstation}: passed" in ended.output
    skipped = [check["id"] for check in proven["checks"] if check["state"] == "skipped"]
    spine.say(f"{len(proven['checks'])} checks; skipped: {', '.join(skipped) or 'none'}")
    spine.say(f"Debian 13, nouveau: bare to certificate, with a reboot: {ended.seconds:.0f} s")


def test_the_certificate_tried_the_gpu_in_a_container_and_after_daemon_reload(workstation: str) -> None:
    states = {check["id"]: check["state"] for check in spine.certificate(workstation)["checks"]}
    tried = {name: state for name, state in states.items() if "container" in name or "cuda" in name}
    assert len(tried) >= 3, f"the certificate knows no such checks: {sorted(states)}"
    assert set(tried.values()) == {"passed"}, tried


def test_a_container_whose_devices_are_not_granted_does_not_reach_the_gpu(workstation: str) -> None:
    """As after the daemon-reload that takes devices away: the check above can fail, and then it says this."""
    places = ("/dev/nvidiactl", "/dev/nvidia0", "/usr/bin/nvidia-smi", "/run/llmhost-lab")
    volumes = " ".join(f"--volume {place}:{place}" for place in places)
    told = spine.on(
        workstation, f"docker run --rm {volumes} llmhost/gpu-check nvidia-smi -L 2>&1 || echo ended with $?"
    )
    assert told.splitlines() == ["Failed to initialize NVML: Unknown Error", "ended with 255"]


def test_a_second_run_changes_nothing(workstation: str) -> None:
    ended = spine.deploy(workstation)
    assert ended.code == 0, ended.output
    assert ended.changed == []
    assert any(name.startswith("NVIDIA driver | ") for name in ended.unchanged)


def test_a_stale_cdi_specification_is_made_anew(workstation: str) -> None:
    docker = spine.unit(workstation, "docker.service", "MainPID")
    spine.on(workstation, f"sed -i s/{LTS}/575.57.08/g /var/run/cdi/nvidia.yaml")
    ended = gpu_host.provision(workstation)
    assert ended.code == 0, ended.output
    assert ended.changed == ["Containers | CDI specification"]
    assert gpu_host.versions(workstation)["cdi"] == LTS
    assert spine.unit(workstation, "docker.service", "MainPID") == docker, "nothing called for a restart of Docker"


# --- eight GPUs and NVSwitches


def test_the_fabric_manager_runs_where_there_are_nvswitches(server: str) -> None:
    ended = gpu_host.provision(server)
    assert ended.code == 0, ended.output
    assert gpu_host.versions(server) == one_version(LTS)
    assert gpu_host.is_active(server, "nvidia-fabricmanager.service")
    assert spine.on(server, "nvidia-smi -q -x | grep -c '<state>Completed'") == "8"
    assert spine.on(server, "nvidia-smi -q -x | grep -c '<persistence_mode>Enabled'") == "8"
    assert gpu_host.packages(server, "nvidia-container-toolkit") == {"nvidia-container-toolkit": "1.20.0-1"}
    spine.say(f"Debian 12, HGX A100: driver and Docker from bare: {ended.seconds:.0f} s")


def test_its_second_run_changes_nothing(server: str) -> None:
    ended = gpu_host.provision(server)
    assert ended.code == 0, ended.output
    assert ended.changed == []


def test_reboot_allowed_never_stops_with_what_to_do(server: str) -> None:
    """An upgrade whose module cannot come in, as somebody uses the GPU."""
    before = gpu_host.boot_id(server)
    with gpu_host.held_gpu(server):
        ended = gpu_host.provision(server, *TO_NEWER, "--data", "reboot_allowed=never")
        assert ended.code == 1
        assert "reboot_allowed is never" in ended.output and "systemctl reboot" in ended.output, ended.output
        assert "trainer.service" in ended.output, "who holds the GPU is not told"
        assert gpu_host.boot_id(server) == before
        assert gpu_host.loaded(server) == LTS
        assert "No package was changed" in ended.output
        assert gpu_host.packages(server, "libcuda1") == {"libcuda1": f"{LTS}-1"}


def test_a_held_gpu_means_one_reboot(server: str) -> None:
    before = gpu_host.boot_id(server)
    with gpu_host.held_gpu(server):
        ended = gpu_host.provision(server, *TO_NEWER)
        assert ended.code == 0, ended.output
    assert gpu_host.boot_id(server) != before
    assert gpu_host.versions(server) == one_version(NEWER)
    assert gpu_host.is_active(server, "nvidia-fabricmanager.service")
    assert gpu_host.provision(server, *TO_NEWER).changed == []
    spine.say(f"upgrade 580 to 595 with a held GPU, one reboot: {ended.seconds:.0f} s")


# --- what goes wrong with repositories, locks and kernels


def test_a_repository_that_is_down_is_named_and_nothing_installed(plain: str) -> None:
    with gpu_host.vendor_fault(plain, status=503):
        ended = gpu_host.provision(plain)
    assert ended.code == 1
    assert "mirror_cuda" in ended.output and "503" in ended.output, ended.output
    assert gpu_host.packages(plain, "'*nvidia*'", "libcuda1") == {}


def test_a_repository_signed_by_a_stranger_is_named_and_nothing_installed(plain: str) -> None:
    with gpu_host.vendor_fault(plain, signed_by="another"):
        ended = gpu_host.provision(plain)
    assert ended.code == 1
    assert "mirror_cuda_key" in ended.output, ended.output
    assert gpu_host.packages(plain, "'*nvidia*'", "libcuda1") == {}


def test_it_waits_for_an_apt_that_holds_its_lock_for_a_minute(plain: str) -> None:
    gpu_host.hold_apt_locks(plain, seconds=60)
    ended = gpu_host.provision(plain)
    assert ended.code == 0, ended.output
    assert ended.seconds > 55, "it did not wait: were the locks held?"
    assert gpu_host.versions(plain) == one_version(LTS)
    spine.say(f"Debian 13, apt's lock held for 60 s: driver and Docker from bare: {ended.seconds:.0f} s")


def test_packages_on_hold_are_named_before_anything_is_touched(plain: str) -> None:
    spine.on(plain, "apt-mark hold libcuda1 nvidia-kernel-open-dkms")
    before = spine.written(plain)
    ended = gpu_host.provision(plain, *TO_NEWER)
    assert ended.code == 1
    assert "apt-mark unhold libcuda1 nvidia-kernel-open-dkms" in ended.output, ended.output
    assert spine.written(plain) == before
    spine.on(plain, "apt-mark unhold libcuda1 nvidia-kernel-open-dkms")


def test_an_upgrade_reloads_the_modules_without_a_reboot(plain: str) -> None:
    before = gpu_host.boot_id(plain)
    ended = gpu_host.provision(plain, *TO_NEWER)
    assert ended.code == 0, ended.output
    assert "reload the modules" in ended.output
    assert gpu_host.boot_id(plain) == before
    assert gpu_host.versions(plain) == one_version(NEWER)
    assert gpu_host.is_active(plain, "nvidia-persistenced.service")
    assert set(gpu_host.packages(plain, "'nvidia-driver-pinning-*'")) == {f"nvidia-driver-pinning-{NEWER}"}
    assert gpu_host.provision(plain, *TO_NEWER).changed == []
    spine.say(f"upgrade 580 to 595 by a reload: {ended.seconds:.0f} s")


def test_a_newer_kernel_without_modules_fails_now_and_not_at_the_next_boot(plain: str) -> None:
    kernel = disk.add_kernel(spine.disk(plain), "debian-13")
    spine.on(plain, f"apt-get -qq update && apt-get -qqy install linux-image-{kernel}", timeout_seconds=120)
    ended = gpu_host.provision(plain, *TO_NEWER)
    assert ended.code == 1
    assert f"no nvidia module for {kernel}, the newest installed kernel" in ended.output, ended.output
    spine.on(plain, f"apt-get -qqy install linux-headers-{kernel}", timeout_seconds=120)
    ended = gpu_host.provision(plain, *TO_NEWER)
    assert ended.code == 0, ended.output
    life.restart(plain)
    assert spine.on(plain, "uname -r") == kernel
    assert gpu_host.loaded(plain) == NEWER


# --- a host with a past


DISTRIBUTION = ("--data", "docker_source=distribution")


def test_power_lost_while_the_driver_is_installed(used: str) -> None:
    """Debian's own Docker is to come on it; somebody configured it, and somebody knew NVIDIA's repository before."""
    vendors = state.find_host(used)[0].gpu_settings["mirror_cuda"]
    old_list = f"deb [signed-by=/usr/share/keyrings/old.gpg] {vendors}/debian13/x86_64/ /"
    spine.on(
        used,
        f"echo '{old_list}' > /etc/apt/sources.list.d/cuda-debian13-x86_64.list; mkdir /etc/docker; "
        """echo '{"log-driver": "local"}' > /etc/docker/daemon.json""",
    )
    spine.on(used, "touch /run/llmhost-lab/hold-unpack")
    log = spine.disk(used) / "var/log/dpkg.log"
    half = "status half-installed nvidia-kernel-support"
    run = gpu_host.provisioning(used, *DISTRIBUTION)
    try:
        run.wait_until("a package is half installed", lambda: log.exists() and half in log.read_text())
        faults.lose_power(used)
        faults.power_on(used)
        assert run.end(timeout_seconds=90).code == 1
    finally:
        run.kill()
    assert "install reinstreq half-installed" in spine.on(used, "dpkg-query -W -f '${Status}' nvidia-kernel-support")


def test_the_next_run_finishes_the_driver(used: str) -> None:
    ended = gpu_host.provision(used, *DISTRIBUTION)
    assert ended.code == 0, ended.output
    assert spine.on(used, "dpkg --audit") == ""
    assert gpu_host.versions(used) == one_version(LTS)
    assert gpu_host.provision(used, *DISTRIBUTION).changed == []
    lists = spine.on(used, "ls /etc/apt/sources.list.d").split()
    assert "cuda-debian13-x86_64.list.disabled" in lists and "cuda-debian13-x86_64.list" not in lists


def test_debians_docker_gives_the_gpu_to_a_container_and_keeps_its_configuration(used: str) -> None:
    assert set(gpu_host.packages(used, "docker.io", "docker-ce")) == {"docker.io"}
    assert json.loads(spine.on(used, "cat /etc/docker/daemon.json"))["log-driver"] == "local"
    told = spine.on(used, "docker run --rm --device nvidia.com/gpu=all llmhost/gpu-check nvidia-smi -L")
    assert "NVIDIA GeForce RTX 3060" in told


# --- refused


# {label: (machine, settings, what is told)}
REFUSED = {
    "rv": ("vfio", {}, "gpu (the host): 0000:01:00.0 is bound to vfio-pci"),
    "ro": ("v100", {"accelerator": "nvidia"}, "current vLLM needs compute capability 7.5, this has 7.0"),
    "rm": ("mixed", {}, "gpu (the host): mixed generations"),
    "rb": (
        "b200",
        {"driver_modules": "closed"},
        "is closed, but NVIDIA B200 (10de:2901), blackwell runs with open modules",
    ),
    "rk": ("rtx-3060", {"mirror_cuda_key": "/nonexistent.asc"}, "there is no file /nonexistent.asc on this machine"),
}


def test_refusals_name_the_reason_and_touch_nothing(new_host: NewHost, tmp_path: Path) -> None:
    """Five machines in one run."""
    hosts = {label: new_host(label, "debian-12", gpu) for label, (gpu, _, _) in REFUSED.items()}
    before = {host: spine.written(host) for host in hosts.values()}
    data = {hosts[label]: settings for label, (_, settings, _) in REFUSED.items()}
    first, *others = hosts.values()
    more = [word for host in others for word in ("--limit", host)]
    ended = gpu_host.provision(first, *more, inventory=spine.write_inventory(tmp_path, data))
    assert ended.code == 1
    for label, (_, _, words) in REFUSED.items():
        told = "\n".join(line for line in ended.output.splitlines() if f"[{hosts[label]}]" in line)
        assert "Refused: " in told and words in told, told
    assert {host: spine.written(host) for host in hosts.values()} == before


# --- the lab itself


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "h300"], "the lab has no machine 'h300'; it has: rtx-3060"),
        (["--gpu", "v100", "--no-mirror"], "leave out --no-mirror"),
        (["--gpu", "v100", "--os", "ubuntu-24.04"], "none of ubuntu-24.04"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_is_made(words: list[str], told: str) -> None:
    done = spine.command(sys.executable, "-m", "lab", "up", "--prefix", "nogpu", *words)
    assert done.returncode == 1
    assert told in done.stderr
    assert state.load("nogpu") is None and not state.disks_directory("nogpu").exists()


def test_a_host_without_a_simulated_gpu_knows_nothing_of_one(new_host: NewHost) -> None:
    host = new_host("g0", "debian-12")
    lab, found = state.find_host(host)
    assert not {"driver_source", "mirror_cuda", "mirror_docker"} & lab.settings_of(found).keys()
    assert spine.on(host, "ls -d /etc/llmhost-lab /sys/module /run/llmhost-lab 2>/dev/null || true") == ""
    assert gpu_host.packages(host, "'linux-image-*'") == {}


def test_the_lab_builds_the_same_packages_again(tmp_path: Path) -> None:
    [package] = [package for package in packages.driver_packages(LTS) if package.name == "nvidia-smi"]
    built = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        built.append(packages.build(package, tmp_path / name).read_bytes())
    assert built[0] == built[1]
