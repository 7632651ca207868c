"""The spine on lab hosts as an operator uses it: real commands, started, watched, killed; and what the host shows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import cgroups, ssh, state

REPOSITORY = Path(__file__).resolve().parents[2]
PYINFRA = [sys.executable, "-m", "pyinfra"]
LLMHOST = [sys.executable, "-c", "from llmhost.cli import app; app()"]
INVENTORY = "inventories/lab.py"

NewHost = Callable[..., str]  # of a label, an operating system and simulated GPUs: see conftest.py


@dataclass(frozen=True)
class Ended:
    """A command that has ended. `results` is what pyinfra's --json says of each operation."""

    code: int
    output: str
    seconds: float
    results: list[dict[str, Any]]

    @property
    def changed(self) -> list[str]:
        """The operations that changed something, by name."""
        return [operation["name"] for operation in self.results if operation["success"]]

    @property
    def unchanged(self) -> list[str]:
        return [operation["name"] for operation in self.results if operation["no_change"]]


class Deploy:
    """`pyinfra inventories/lab.py deploy.py -y --limit HOST` in a process group of its own, as a terminal has it."""

    def __init__(
        self,
        host: str,
        *words: str,
        inventory: str = INVENTORY,
        environment: dict[str, str] | None = None,
        program: str = "deploy.py",
    ) -> None:
        # Files, not pipes: nobody has to read along for the run to go on.
        self._stdout = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - read after this returns
        self._stderr = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - the same
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [*PYINFRA, inventory, program, "-y", "--json", "--limit", host, *words],
            cwd=REPOSITORY,
            env={**os.environ, "LLMHOST_LAB": state.prefix_of(host), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """What it has told so far."""
        return Path(self._stderr.name).read_text()

    def wait_until(self, what: str, holds: Callable[[], object], timeout_seconds: float = 120) -> None:
        """Wait for a moment of this run; a run that ends before it fails the test."""
        deadline = time.monotonic() + timeout_seconds
        while not holds():
            assert self._process.poll() is None, f"the deploy ended before: {what}\n{self.output}"
            assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}\n{self.output}"
            time.sleep(0.01)  # nothing announces it

    def kill(self) -> None:
        """SIGKILL, to the whole group: as when the terminal, or the operator's machine, is gone."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self, timeout_seconds: float = 400) -> Ended:
        """Wait for its end."""
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the deploy did not end within {timeout_seconds} s:\n{self.output}") from None
        told = Path(self._stdout.name).read_text()
        results = json.loads(told)["results"]["operations"] if told.strip() else []
        return Ended(code, self.output, time.monotonic() - self._began, results)


def deploy(
    host: str,
    *words: str,
    inventory: str = INVENTORY,
    environment: dict[str, str] | None = None,
    timeout_seconds: float = 400,
    program: str = "deploy.py",
) -> Ended:
    """Deploy one host to the end."""
    run = Deploy(host, *words, inventory=inventory, environment=environment, program=program)
    try:
        return run.end(timeout_seconds)
    except BaseException:
        run.kill()
        raise


def command(
    *words: str, prefix: str = "", cwd: Path = REPOSITORY, timeout_seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command of the repository; `prefix` is the lab that inventories/lab.py means."""
    return subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "LLMHOST_LAB": prefix},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_seconds,
    )


def planned(printed: str) -> list[dict[str, Any]]:
    """The operations of `--dry --json`."""
    operations: list[dict[str, Any]] = json.loads(printed)["plan"]
    return operations


def wait_until(what: str, holds: Callable[[], object], timeout_seconds: float = 60) -> float:
    """Wait for what nothing announces; returns the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < timeout_seconds, f"not within {timeout_seconds} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def write_inventory(directory: Path, data: dict[str, dict[str, Any]]) -> str:
    """An inventory of the lab's hosts named, with data of their own; its certificates lie where the lab's lie."""
    file = directory / "lab.py"
    file.write_text(
        "import runpy\n"
        f"_data = {data!r}\n"
        f"_lab = dict(runpy.run_path({str(REPOSITORY / INVENTORY)!r})['hosts'])\n"
        "hosts = [(name, {**_lab[name], **own}) for name, own in _data.items()]\n"
    )
    return str(file)


# --- the host, seen from outside: no connection, nothing on it disturbed


def disk(host: str) -> Path:
    """The root of the host's file system."""
    return Path(state.find_host(host)[1].directory, "root")


def processes(host: str) -> dict[int, str]:
    """{process id on this machine: name} of all that runs on the host."""
    found = {}
    for pid in cgroups.processes(state.find_host(host)[1].leaf):
        try:
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # it ended meanwhile
            continue
    return found


def runs(host: str, name: str) -> bool:
    """Whether a process of this name runs on the host."""
    return name in processes(host).values()


def kill_process(host: str, name: str) -> None:
    """SIGKILL to the one process of this name."""
    [pid] = [pid for pid, found in processes(host).items() if found == name]
    os.kill(pid, signal.SIGKILL)


# What a host writes by itself while someone logs in and looks.
_ITS_OWN = re.compile(r"^(var/log|var/lib/systemd|var/lib/dhcp|root/\.cache|run|tmp)(/|$)")


def written(host: str) -> dict[str, tuple[int, int, int]]:
    """{path: (mode, size, modification time)} of all that differs from the host's image: the touched and the made."""
    upper = Path(state.find_host(host)[1].directory, "upper")
    found = {}
    for place in upper.rglob("*"):
        path = str(place.relative_to(upper))
        status = place.lstat()
        if not _ITS_OWN.match(path) and not place.is_dir():
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


# --- the host, asked


def on(host: str, script: str, timeout_seconds: float = 60) -> str:
    """Output of a shell script on the host, as root."""
    return ssh.run(host, script, timeout_seconds=timeout_seconds).strip()


def unit(host: str, name: str, *properties: str) -> dict[str, str]:
    """Properties of a unit."""
    told = on(host, f"systemctl show {name} --property={','.join(properties)}")
    return dict(line.split("=", 1) for line in told.splitlines())


_COMPLETION = r"""
. /etc/llmhost/secrets/vllm.env
python3 - "$VLLM_API_KEY" <<'END'
import json, sys, urllib.request
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
question = {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
url = "http://127.0.0.1:8000/v1/completions"
request = urllib.request.Request(url, json.dumps(question).encode(), headers)
try: print(json.load(urllib.request.urlopen(request, timeout=20))["choices"][0]["text"])
except OSError as error: print("no reply:", error)
END
"""


def completion(host: str) -> str:
    """What the engine replies to "The capital of France is"."""
    return on(host, _COMPLETION)


def certificate(host: str) -> dict[str, Any]:
    """The host's certificate."""
    found: dict[str, Any] = json.loads(certificate_path(host).read_text())
    return found


def certificate_path(host: str) -> Path:
    return REPOSITORY / "reports/lab" / f"{host}.json"


# --- the lab's hub


@contextmanager
def hub_fault(host: str, **fault: Any) -> Iterator[None]:
    """The hub's answers go wrong as lab/mirror/hub.py describes, and are right again afterwards."""
    _tell_hub(host, fault)
    try:
        yield
    finally:
        _tell_hub(host, {})


def _tell_hub(host: str, fault: dict[str, Any]) -> None:
    hub = state.find_host(host)[0].settings["mirror_hub"]
    urllib.request.urlopen(urllib.request.Request(f"{hub}/_fault", json.dumps(fault).encode()), timeout=10).close()


def say(text: str) -> None:
    """Leave a line for the reader of the test's output (pytest -rP, or on failure)."""
    print(text, flush=True)
