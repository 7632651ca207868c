"""A converged host and what happens to it: changed settings, failed starts, killed processes, a reboot; two hosts.

The host is the one that tests/lab/test_resume.py took through its kills; on its own this file deploys it first.
"""

from __future__ import annotations

import io
import json
import select
import socket
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import life, state
from tests.lab import spine
from tests.lab.spine import Deploy, NewHost

pytestmark = pytest.mark.lab

# A start that cannot succeed must be told long before the 600 s a slow one may take.
FAILED_START_SECONDS = 120


@pytest.fixture(scope="module")
def host(converged: str) -> str:
    return converged


def prefix(host: str) -> str:
    return state.prefix_of(host)


def engine(host: str, *properties: str) -> dict[str, str]:
    return spine.unit(host, "vllm.service", *properties)


def running_flags(host: str) -> str:
    """What the running engine says it was started with; vllm.yaml would only say what is configured."""
    invocation = engine(host, "InvocationID")["InvocationID"]
    journal = f"journalctl _SYSTEMD_INVOCATION_ID={invocation} --output=cat --no-pager"
    return spine.on(host, f"{journal} | grep 'non-default args' | tail -n 1")


# --- looking changes nothing


def test_the_plan_of_recorded_facts_is_the_plan_of_the_host(host: str, tmp_path: Path) -> None:
    def plan(*words: str) -> list[dict[str, Any]]:
        done = spine.command(
            *spine.LLMHOST, "plan", spine.INVENTORY, "--limit", host, "--json", *words, prefix=prefix(host)
        )
        assert done.returncode == 0, done.stderr
        plans: list[dict[str, Any]] = json.loads(done.stdout)
        return plans

    recorded = spine.command(*spine.LLMHOST, "facts", spine.INVENTORY, "--limit", host, prefix=prefix(host))
    assert recorded.returncode == 0, recorded.stderr
    facts = tmp_path / "facts.json"
    facts.write_text(recorded.stdout)
    live = plan()
    assert live[0]["host"] == host and live[0]["problems"] == []
    assert plan("--hardware", str(facts)) == live
    assert json.loads(spine.on(host, "cat /etc/llmhost/plan.json")) == live[0]


def test_llmhost_verify_writes_the_certificate(host: str) -> None:
    spine.certificate_path(host).unlink()
    done = spine.command(*spine.LLMHOST, "verify", spine.INVENTORY, "--limit", host, "--json", prefix=prefix(host))
    assert done.returncode == 0, done.stdout + done.stderr
    [told] = json.loads(done.stdout)
    assert told == spine.certificate(host)
    assert told["result"] == "passed"
    assert {"ttft_seconds", "tokens_per_second"} <= told["figures"].keys()


def test_plain_pytest_proves_the_host(host: str, tmp_path: Path) -> None:
    words = ("tests/acceptance", "--inventory", spine.INVENTORY, "--limit", host, "--reports", str(tmp_path))
    done = spine.command(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, prefix=prefix(host))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout
    assert json.loads((tmp_path / "lab" / f"{host}.json").read_text())["result"] == "passed"


def test_only_ssh_is_open_to_the_network(host: str) -> None:
    """Every port, tried from another machine: the acceptance checks only read the host's own list of sockets."""
    assert open_ports(state.find_host(host)[1].ip) == [22]


def open_ports(address: str) -> list[int]:
    """Those of all TCP ports that accept a connection; a refusal comes at once, silence counts as closed after 5 s."""
    found = []
    for first in range(1, 1 << 16, 4096):
        waiting = {}
        poll = select.poll()
        for port in range(first, min(first + 4096, 1 << 16)):
            attempt = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            attempt.connect_ex((address, port))
            poll.register(attempt, select.POLLOUT)
            waiting[attempt.fileno()] = (port, attempt)
        while waiting and (answered := poll.poll(5000)):
            for descriptor, _ in answered:
                port, attempt = waiting.pop(descriptor)
                if attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.append(port)
                poll.unregister(descriptor)
                attempt.close()
        for _, attempt in waiting.values():
            attempt.close()
    return sorted(found)


def test_another_user_with_sudo_finds_nothing_to_change(host: str) -> None:
    ended = spine.deploy(host, "--data", "ssh_user=admin")
    assert ended.code == 0, ended.output
    assert ended.changed == []


# --- services come back


_SIGNUP = r"""
python3 - <<'END'
import json, urllib.error, urllib.request
account = {"name": "Mallory", "email": "mallory@example.com", "password": "long enough 1"}
request = urllib.request.Request("http://127.0.0.1:7860/api/v1/auths/signup", json.dumps(account).encode(),
    {"Content-Type": "application/json"})
try: print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error: print(error.code)
END
"""


def test_signup_stays_closed_after_a_restart(host: str) -> None:
    spine.on(host, "systemctl restart open-webui.service", timeout_seconds=120)
    assert spine.on(host, _SIGNUP) == "403"


@pytest.mark.parametrize("process", ["VLLM::EngineCor", "VLLM::Worker"])
def test_a_killed_engine_process_comes_back(host: str, process: str) -> None:
    before = int(engine(host, "NRestarts")["NRestarts"])
    spine.kill_process(host, process)
    spine.wait_until("systemd saw it end", lambda: int(engine(host, "NRestarts")["NRestarts"]) > before, 90)
    seconds = spine.wait_until("the engine answers again", lambda: spine.completion(host) == "Paris", 180)
    assert int(engine(host, "NRestarts")["NRestarts"]) == before + 1
    spine.say(f"{process} killed: answers again {seconds:.0f} s after its end")


# --- what runs is what is configured


def test_a_restart_that_an_interrupted_run_owed_is_made_up_for(host: str) -> None:
    """The lost handler: the file is written, the run dies, and to the next run the file is as it should be."""
    setting = ("--data", "engine_max_num_seqs=8")
    before = engine(host, "MainPID")["MainPID"]
    flags = spine.disk(host) / "etc/llmhost/vllm.yaml"
    run = Deploy(host, *setting)
    run.wait_until("the configuration is written", lambda: "max-num-seqs: 8\n" in flags.read_text())
    run.kill()
    assert engine(host, "MainPID", "ActiveState") == {"MainPID": before, "ActiveState": "active"}
    assert "'max_num_seqs': 8" not in running_flags(host), "the engine was restarted before the run could be killed"
    ended = spine.deploy(host, *setting)
    assert ended.code == 0, ended.output
    assert "Engine | vllm.service" in ended.changed
    assert "Engine | configuration of vllm" in ended.unchanged
    assert "start vllm.service: its configuration changed since it started" in ended.output
    assert engine(host, "MainPID")["MainPID"] != before
    assert "'max_num_seqs': 8" in running_flags(host)


def test_a_start_that_fails_is_told_with_the_engines_own_error(host: str) -> None:
    """A local model whose config.json is broken: known only to the engine, and told long before any timeout."""
    spine.on(host, "mkdir -p /srv/broken && echo '{\"architectures\": [' > /srv/broken/config.json")
    ended = spine.deploy(host, "--data", "model=/srv/broken")
    assert ended.code == 1
    assert ended.seconds < FAILED_START_SECONDS, ended.output
    said = "\n".join(line for line in ended.output.splitlines() if "vllm.service did not start" in line)
    assert "OSError: It looks like the config file at '/srv/broken/config.json' is not a valid JSON file" in said
    assert f"{host}: failed" in ended.output
    spine.say(f"a start that fails: exit 1 after {ended.seconds:.0f} s: {said.strip()}")


def test_the_right_settings_mend_it(host: str) -> None:
    ended = spine.deploy(host)
    assert ended.code == 0, ended.output
    assert spine.certificate(host)["result"] == "passed"
    assert spine.completion(host) == "Paris"


# --- a model that arrives wrong


def test_a_model_with_a_wrong_checksum_is_not_used(host: str) -> None:
    """Wrong every time: refused with the file's name. Wrong once: fetched again, and right."""
    models = "/var/lib/llmhost/models"
    spine.on(host, f"rm {models}/*/*/.llmhost-manifest.json {models}/*/*/model.safetensors")
    with spine.hub_fault(host, corrupt=True, times=99):
        ended = spine.deploy(host)
    assert ended.code == 1
    assert "wrong checksum: model.safetensors" in ended.output
    assert "mirror_hub" in ended.output
    assert spine.on(host, f"ls {models}/*/*/.llmhost-manifest.json {models}/*/*/model.safetensors || true") == ""
    with spine.hub_fault(host, corrupt=True, times=1):
        ended = spine.deploy(host)
    assert ended.code == 0, ended.output
    assert any(name.startswith("Model | ") for name in ended.changed)


def test_a_reboot_brings_everything_back(host: str) -> None:
    life.restart(host)

    def active() -> list[str]:
        return spine.on(host, "systemctl is-active vllm.service open-webui.service || true").split()

    seconds = spine.wait_until("both services are up", lambda: active() == ["active", "active"], 240)
    done = spine.command(*spine.LLMHOST, "verify", spine.INVENTORY, "--limit", host, prefix=prefix(host))
    assert done.returncode == 0, done.stdout + done.stderr
    spine.say(f"reboot: both services up {seconds:.0f} s after SSH answered again")


# --- several hosts


TAMPERED = "certifi"


class TamperedIndex(BaseHTTPRequestHandler):
    """The lab's index, but one wheel holds a file more than the one whose hash is in the lock."""

    upstream: str

    def do_GET(self) -> None:
        tampered = self.path.startswith(f"/files/{TAMPERED}-") and self.path.endswith(".whl")
        if self.path.startswith("/files/") and not tampered:
            self.send_response(302)
            self.send_header("Location", self.upstream + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        answer = httpx.get(self.upstream + self.path, headers={"Accept": self.headers.get("Accept", "*/*")})
        body = with_a_file_more(answer.content) if tampered else answer.content
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name http.server gives

    def log_message(self, *_: object) -> None:
        pass


def with_a_file_more(wheel: bytes) -> bytes:
    altered = io.BytesIO(wheel)
    with zipfile.ZipFile(altered, "a") as archive:
        archive.writestr(f"{TAMPERED}/backdoor.py", "print('in')\n")
    return altered.getvalue()


@contextmanager
def tampered_index(lab: state.Lab) -> Iterator[str]:
    """URL of an index whose wheels are not all what they should be."""
    TamperedIndex.upstream = lab.settings["mirror_python_index"].removesuffix("/simple/")
    server = ThreadingHTTPServer((lab.address, 0), TamperedIndex)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{lab.address}:{server.server_port}/simple/"
    finally:
        server.shutdown()
        server.server_close()


def test_a_host_that_fails_neither_stops_nor_hides_the_other(new_host: NewHost, tmp_path: Path) -> None:
    """A bare Debian 13, reached as a user with sudo, converges; a bare Debian 12 gets a wheel that its lock disowns."""
    good, bad = new_host("good", "debian-13"), new_host("bad", "debian-12")
    with tampered_index(state.find_host(bad)[0]) as index:
        data = {good: {"ssh_user": "admin"}, bad: {"mirror_python_index": index, "mirror_torch_index": index}}
        ended = spine.deploy(good, "--limit", bad, inventory=spine.write_inventory(tmp_path, data))
    assert ended.code == 1
    lines = ended.output.splitlines()
    summary = [line.strip() for line in lines[lines.index("--> Hosts:") + 1 :]]
    assert f"{good}: done" in summary and f"{bad}: failed" in summary, ended.output
    told = "\n".join(line for line in lines if f"[{bad}]" in line)
    assert "ash mismatch" in told and TAMPERED in told, told
    assert "mirror_python_index" in told
    assert spine.certificate(good)["result"] == "passed"
    assert not spine.certificate_path(bad).exists()
    assert spine.completion(good) == "Paris"
    spine.say(f"two hosts, one broken: {ended.seconds:.0f} s")
