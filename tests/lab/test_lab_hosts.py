"""The lab itself: hosts boot, survive what real machines survive, and leave nothing behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import LabError, cgroups, faults, hosts, life, network, preflight, shell, ssh, state

pytestmark = pytest.mark.lab
REPOSITORY = Path(__file__).resolve().parents[2]
NO_MIRROR = life.Options(mirror=False)


def lab_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lab", *words]


def run_lab(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        lab_command(*words),
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def traces(prefix: str) -> list[str]:
    """All that a lab with this prefix could leave on this machine, each trace named."""
    found = [f"control group {leaf}" for leaf in cgroups.leaves(prefix)]
    found += [f"mount {place}" for place in hosts.mounts_below(state.disks_directory(prefix))]
    found += [f"mount {place}" for place in hosts.mounts_below(hosts.NSPAWN) if place.name.startswith(f"{prefix}-")]
    found += [f"directory {place}" for place in hosts.NSPAWN.glob(f"*/{prefix}-*")]
    found += [f"interface {name}" for name in network.interfaces(prefix)]
    for table in ("filter", "nat"):
        rules = shell.run("iptables", "-w", "-t", table, "-S").splitlines()
        found += [f"rule {rule}" for rule in rules if f"llmhost-lab-{prefix} " in f"{rule} "]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process ended meanwhile
            continue
        found += [f"process {words}" for word in words if word.startswith(f"--machine={prefix}-")]
    places = (state.disks_directory(prefix), state.RUN / prefix, state.RUN / f".{prefix}.lock")
    return found + [f"file {place}" for place in places if place.exists()]


def wait_until(condition: str, holds: Callable[[], object], timeout_seconds: float = 60) -> None:
    """Waits for something that nothing announces; fails the test with its name."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline, f"{condition} did not happen within {timeout_seconds} s"
        time.sleep(0.01)


def answers(lab: state.Lab, host: state.Host) -> bool:
    """Whether a command on the host succeeds within a second; ssh may time out or learn that there is no route."""
    done = ssh.attempt(lab, host, "true", timeout_seconds=1)
    return done is not None and done.returncode == 0


def some_prefix() -> str:
    """A lab's name that no other lab on this machine has."""
    return f"t{secrets.token_hex(3)}"


@pytest.fixture(scope="module", autouse=True)
def _able_machine() -> None:
    try:
        preflight.require(["debian-12", "debian-13"])
    except LabError as refusal:
        pytest.skip(str(refusal))  # names what this machine lacks; scripts/test refuses before


@pytest.fixture
def prefix() -> Iterator[str]:
    name = some_prefix()
    yield name
    life.down(name)


@pytest.fixture(scope="module")
def lab() -> Iterator[state.Lab]:
    """Two hosts of two operating systems, shared by the tests that leave them as they were."""
    prefix = some_prefix()
    life.up(life.requests(["a=debian-12", "b=debian-13"], 1), prefix, NO_MIRROR)
    yield state.running(prefix)
    life.down(prefix)


def test_up_boots_hosts_that_answer_ssh(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lab("build", "--os", "debian-12").returncode == 0
    started = time.monotonic()
    done = run_lab("up", "--no-mirror", "--prefix", prefix, "--count", "2", "--json")
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\nlab: two hosts from cache to SSH answering in {seconds:.1f} s")  # a figure, not a limit: see bench/
    told = json.loads(done.stdout)
    assert [host["name"] for host in told["hosts"]] == [f"{prefix}-1", f"{prefix}-2"]
    for host in told["hosts"]:
        assert host["running"]
        assert run_lab("ssh", host["name"], "hostname").stdout.strip() == host["name"]


def test_a_host_is_what_a_cloud_image_gives(lab: state.Lab) -> None:
    for host, release in zip(lab.hosts, ("bookworm", "trixie"), strict=True):
        assert ssh.run(host.name, "systemctl is-system-running").strip() == "running"
        assert release in ssh.run(host.name, "cat /etc/os-release")
        assert ssh.run(host.name, "sudo id -u", user="admin").strip() == "0"
        assert ssh.run(host.name, "command -v pip pip3 g++ curl || echo none").strip() == "none"


def test_hosts_share_no_identity(lab: state.Lab) -> None:
    scripts = ("cat /etc/machine-id", "cat /etc/ssh/ssh_host_ed25519_key.pub", "cat /proc/sys/kernel/random/boot_id")
    for script in scripts:
        first, second = (ssh.run(host.name, script) for host in lab.hosts)
        assert first != second


def test_hosts_reach_each_other_and_this_machine_but_not_the_internet(lab: state.Lab) -> None:
    first, second = lab.hosts
    ssh.run(first.name, f"ping -c 1 -W 2 {second.ip} && ping -c 1 -W 2 {lab.address}")
    attempt = "timeout 5 bash -c 'echo > /dev/tcp/192.0.2.1/443' 2>&1; echo exit code $?"
    assert "Connection refused" in ssh.run(first.name, attempt)


def test_up_again_leaves_running_hosts_alone(lab: state.Lab) -> None:
    before = [hosts.boot_id(lab, host) for host in lab.hosts]
    done = run_lab("up", "--no-mirror", "--prefix", lab.prefix, "--os", "a=debian-12")
    assert done.returncode == 0, done.stderr
    assert [hosts.boot_id(lab, host) for host in lab.hosts] == before


def test_up_refuses_to_change_the_system_of_a_host(lab: state.Lab) -> None:
    done = run_lab("up", "--no-mirror", "--prefix", lab.prefix, "--os", "a=debian-13")
    assert done.returncode == 1
    assert f"{lab.prefix}-a already exists with debian-12, not debian-13" in done.stderr
    assert lab.hosts[0].running, "a refused `up` must not take the lab down"


def test_reboot_comes_back_with_its_disk(lab: state.Lab) -> None:
    for host in lab.hosts:
        identity = ssh.run(host.name, "echo kept > /var/lib/kept; cat /etc/machine-id")
        before = hosts.boot_id(lab, host)
        done = run_lab("reboot", host.name)
        assert done.returncode == 0, done.stderr
        assert hosts.boot_id(lab, host) != before
        assert ssh.run(host.name, "cat /var/lib/kept; cat /etc/machine-id") == f"kept\n{identity}"


def test_power_loss_and_return(lab: state.Lab) -> None:
    host = lab.hosts[0]
    ssh.run(host.name, "echo kept > /var/lib/kept")
    faults.lose_power(host.name)
    assert [other.name for other in state.running(lab.prefix).hosts] == [lab.hosts[1].name]
    faults.power_on(host.name)
    assert ssh.run(host.name, "cat /var/lib/kept") == "kept\n"


def test_orderly_stop_and_start(lab: state.Lab) -> None:
    host = lab.hosts[1]
    hosts.stop(host)
    assert not hosts.mounts_below(state.disk_directory(host.name))
    faults.power_on(host.name)
    assert "Reached target" in ssh.run(host.name, "journalctl -b -1 --no-pager | cat"), "the last boot ended in order"


def test_network_cut_and_restored(lab: state.Lab) -> None:
    host = lab.hosts[0]
    faults.cut_network(host.name)
    try:
        assert not answers(lab, host)
    finally:
        faults.restore_network(host.name)
    assert ssh.run(host.name, "echo back") == "back\n"


def test_frozen_host_hangs_and_goes_on(lab: state.Lab) -> None:
    host = lab.hosts[0]
    faults.freeze(host.name)
    try:
        assert not answers(lab, host)
    finally:
        faults.thaw(host.name)
    assert ssh.run(host.name, "echo on") == "on\n"


def test_pyinfra_reaches_the_hosts_by_the_inventory(lab: state.Lab) -> None:
    done = pyinfra_exec(lab.prefix)
    assert done.returncode == 0, done.stderr
    for host in lab.hosts:
        assert f"[{host.name}]" in done.stdout + done.stderr


def test_the_inventory_says_how_to_start_a_lab() -> None:
    done = pyinfra_exec(some_prefix())
    assert done.returncode != 0
    assert "Run: python -m lab up" in done.stdout + done.stderr


def pyinfra_exec(prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyinfra", "-y", "inventories/lab.py", "exec", "--", "hostname"],
        cwd=REPOSITORY,
        env={**os.environ, "LLMHOST_LAB": prefix},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_labs_side_by_side_do_not_meet(lab: state.Lab, prefix: str) -> None:
    other = life.up(life.requests(["debian-12"], 1), prefix, NO_MIRROR)
    assert other.subnet != lab.subnet
    life.down(prefix)
    assert traces(prefix) == []
    for host in lab.hosts:
        assert ssh.run(host.name, "echo here") == "here\n"


def test_internet_option_is_undone(prefix: str) -> None:
    def forwarding() -> dict[str, str]:
        files = Path("/proc/sys/net/ipv4/conf").glob("*/forwarding")
        return {file.parent.name: file.read_text() for file in files if "-" not in file.parent.name}

    before = forwarding()
    lab = life.up(life.requests(["debian-12"], 1), prefix, life.Options(internet=True, mirror=False))
    assert f"-s {lab.subnet} ! -d {lab.subnet}" in shell.run("iptables", "-w", "-t", "nat", "-S", "POSTROUTING")
    assert "nameserver" in ssh.run(lab.hosts[0].name, "cat /etc/resolv.conf")
    life.down(prefix)
    assert (forwarding(), traces(prefix)) == (before, [])


def test_the_mirror_serves_its_lab_and_goes_down_with_it(prefix: str) -> None:
    done = run_lab("up", "--prefix", prefix, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["mirror_running"]
    assert {"mirror_hub", "mirror_python_index", "model_revision"} <= set(told["settings"])
    # Without the Internet, through the mirror's proxy for apt.
    ssh.run(f"{prefix}-1", "apt-get -q update && apt-get -qy install libnuma1 && dpkg -s libnuma1", timeout_seconds=120)
    life.down(prefix)
    assert traces(prefix) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["first host booting", "keys written"])
def test_interrupted_up_leaves_nothing(prefix: str, number: signal.Signals, moment: str) -> None:
    reached: Callable[[], object] = {
        "first host booting": lambda: cgroups.leaves(prefix),
        "keys written": lambda: (state.RUN / prefix / "known_hosts").exists(),
    }[moment]
    up = start_up(prefix)
    wait_until(moment, reached)
    os.killpg(up.pid, number)  # to the whole group, as a terminal does
    _, told = up.communicate(timeout=60)
    assert up.returncode == 130, told
    assert traces(prefix) == []


def test_down_sweeps_what_a_killed_up_left(prefix: str) -> None:
    up = start_up(prefix)
    wait_until("first host booting", lambda: cgroups.leaves(prefix))
    os.killpg(up.pid, signal.SIGKILL)
    up.communicate(timeout=60)
    assert traces(prefix) != []
    assert run_lab("down", "--prefix", prefix).returncode == 0
    assert traces(prefix) == []


def test_up_replaces_what_a_killed_up_left(prefix: str) -> None:
    up = start_up(prefix)
    wait_until("first host booting", lambda: cgroups.leaves(prefix))
    os.killpg(up.pid, signal.SIGKILL)
    up.communicate(timeout=60)
    done = run_lab("up", "--no-mirror", "--prefix", prefix, "--count", "2")
    assert done.returncode == 0, done.stderr
    assert len(state.running(prefix).hosts) == 2


def test_down_takes_orphans_along(prefix: str) -> None:
    """With its supervisor killed, a host lives on by itself, its network included."""
    lab = life.up(life.requests(["debian-12"], 1), prefix, NO_MIRROR)
    init = cgroups.init_process(lab.hosts[0].leaf)
    for pid in cgroups.processes(lab.hosts[0].leaf):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name in {"sh", "systemd-nspawn"}:
            os.kill(pid, signal.SIGKILL)
    assert cgroups.init_process(lab.hosts[0].leaf) == init
    life.down(prefix)
    assert traces(prefix) == []


def test_down_sweeps_without_the_state(prefix: str) -> None:
    life.up(life.requests(["debian-12"], 1), prefix, NO_MIRROR)
    (state.RUN / prefix / "lab.json").unlink()
    life.down(prefix)
    assert traces(prefix) == []


def test_down_twice_is_fine(prefix: str) -> None:
    life.up(life.requests(["debian-12"], 1), prefix, NO_MIRROR)
    for _ in range(2):
        done = run_lab("down", "--prefix", prefix)
        assert (done.returncode, traces(prefix)) == (0, []), done.stderr


def start_up(prefix: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        lab_command("up", "--no-mirror", "--prefix", prefix, "--count", "2"),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupted_build_leaves_no_image(tmp_path: Path) -> None:
    build = subprocess.Popen(
        lab_command("build", "--os", "debian-12"),
        cwd=REPOSITORY,
        env={**os.environ, "LLMHOST_CACHE": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    images = tmp_path / "lab/images"
    wait_until("unpacking", lambda: list(images.glob("*.partial/etc")))
    os.killpg(build.pid, signal.SIGINT)
    _, told = build.communicate(timeout=60)
    assert build.returncode == 130, told
    assert [place.name for place in images.iterdir() if place.is_dir()] == []
    assert hosts.mounts_below(tmp_path) == []


def test_refused_without_root(prefix: str) -> None:
    done = subprocess.run(
        ["unshare", "--user", *lab_command("up", "--prefix", prefix)],  # a user of another number than 0
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "it must be root. Run the command with sudo." in done.stderr
    assert traces(prefix) == []


def test_missing_programs_are_named_with_their_packages(prefix: str) -> None:
    done = run_lab("up", "--prefix", prefix, environment={"PATH": "/nonexistent"})
    assert done.returncode == 1
    install = next(line for line in done.stderr.splitlines() if "apt-get install" in line)
    assert {"mmdebstrap", "openssh-client", "systemd-container"} <= set(install.split())
    assert traces(prefix) == []


def test_a_missing_archive_keyring_is_named_with_its_package() -> None:
    present = Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg").exists()
    assert ("ubuntu-keyring" in preflight.missing_packages(["ubuntu-24.04"])) is not present
    assert "ubuntu-keyring" not in preflight.missing_packages(["debian-12"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prefix", "Lab"], "the prefix 'Lab' must be 1 to 8 lower-case letters or digits"),
        (["--prefix", "a-b"], "the prefix 'a-b' must be"),
        (["--prefix", "verylong9"], "the prefix 'verylong9' must be"),
        (["--prefix", "bad", "--os", "averylongname=debian-12"], "must be at most 12"),
        (["--prefix", "bad", "--os", "under_score=debian-12"], "the host name 'bad-under_score'"),
        (["--prefix", "bad", "--os", "debian-11"], "the lab has no operating system 'debian-11'; it has: debian-12"),
        (["--prefix", "bad", "--os", "a=debian-12", "--os", "a=debian-13"], "two hosts would be called 'a'"),
        (["--prefix", "bad", "--count", "0"], "--count must be at least 1"),
    ],
)
def test_bad_names_are_refused_before_anything_is_made(words: list[str], told: str) -> None:
    done = run_lab("up", "--no-mirror", *words)
    assert done.returncode == 1
    assert told in done.stderr
    assert traces("bad") == []


def test_an_unknown_host_is_answered_with_those_there_are(lab: state.Lab) -> None:
    done = run_lab("ssh", f"{lab.prefix}-z", "true")
    assert done.returncode == 1
    assert f"its hosts: {lab.prefix}-a, {lab.prefix}-b" in done.stderr
