"""tests/acceptance as operators run it: as a pytest session and through llmhost.verify, on hosts that a script plays.

The hosts' probe is a script that prints recorded evidence; everything from there on is real: testinfra's transport,
pytest, the certificates, the exit code.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmhost.verify import REPOSITORY, Connection, Target, verify, write_targets
from tests.unit import stand_ins

Evidence = dict[str, Any]


def healthy(evidence: Evidence) -> None:
    pass


def open_signup(evidence: Evidence) -> None:
    evidence["webui"]["signup"]["status"] = 400


def no_systemd(evidence: Evidence) -> None:
    evidence["services"] = {"could_not_look": "OSError: systemctl is missing"}


def stand_ins_for_hardware(evidence: Evidence) -> None:
    evidence["simulated"] = {"stand_ins": ["nvidia-smi tells recorded values"]}


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Target]:
    def make(name: str, change: Callable[[Evidence], None] = healthy, seconds: float = 0) -> Target:
        evidence = stand_ins.healthy_evidence()
        change(evidence)
        probe = tmp_path / f"probe-{name}"
        probe.write_text(
            f"#!{sys.executable}\n"
            "import json, time\n"
            f"evidence = json.loads({json.dumps(evidence)!r})\n"
            "evidence['probe']['clock_seconds'] = time.time()\n"
            f"time.sleep({seconds})\n"
            "print(json.dumps(evidence))\n"
        )
        probe.chmod(0o755)
        return target(name, Connection(backend="local", probe=str(probe)))

    return make


def target(name: str, connection: Connection) -> Target:
    return Target(name, "inventories/lab.py", stand_ins.plan_json(), connection)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def unreachable(name: str) -> Target:
    return target(name, Connection(hostname="127.0.0.1", port=closed_port(), user="root"))


def certificate(reports: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((reports / "lab" / f"{name}.json").read_text())
    return document


def session(tmp_path: Path, targets: list[Target], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pytest tests/acceptance` in a process of its own, as an operator would start it."""
    file = tmp_path / "targets.json"
    write_targets(targets, file)
    options = [f"--targets={file}", f"--reports={tmp_path / 'reports'}", *arguments]
    return pytest_process(*options)


def pytest_process(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "tests/acceptance", "-p", "no:cacheprovider", "-o", "addopts=", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if "-v" not in options:  # once with every plugin of this machine, as an operator has it; else without, to be quick
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY, env=environment)


def test_healthy_hosts_are_certified(
    tmp_path: Path, host: Callable[..., Target], capsys: pytest.CaptureFixture[str]
) -> None:
    targets = [host("lab1"), host("lab2")]
    assert verify(targets, tmp_path) == 0
    for name in ("lab1", "lab2"):
        document = certificate(tmp_path, name)
        assert document["result"] == "passed"
        assert document["figures"]["ttft_seconds"] == 0.06
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0] for line in lines] == ["lab1: passed ", "lab2: passed "]


def test_verifying_a_healthy_host_is_quick(tmp_path: Path, host: Callable[..., Target]) -> None:
    """At most 6 s are allowed with the probe's look, which takes up to 3 on two slow cores."""
    started = time.monotonic()
    assert verify([host("lab1")], tmp_path) == 0
    assert time.monotonic() - started < 3


def test_hosts_are_looked_at_side_by_side(tmp_path: Path, host: Callable[..., Target]) -> None:
    started = time.monotonic()
    assert verify([host(f"lab{number}", seconds=1.0) for number in range(5)], tmp_path) == 0
    assert time.monotonic() - started < 5


def test_failed_check_is_exit_1_and_says_what_to_do(
    tmp_path: Path, host: Callable[..., Target], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify([host("lab1"), host("lab2", open_signup)], tmp_path) == 1
    assert certificate(tmp_path, "lab1")["result"] == "passed"
    (failed,) = [check for check in certificate(tmp_path, "lab2")["checks"] if check["state"] == "failed"]
    assert (failed["id"], failed["expected"], failed["seen"]) == ("webui.signup_refused", 403, 400)
    said = capsys.readouterr().out
    assert "failed webui.signup_refused" in said
    assert failed["remedy"] in said


def test_certificates_as_json(tmp_path: Path, host: Callable[..., Target], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([host("lab1")], tmp_path, json=True) == 0
    assert json.loads(capsys.readouterr().out) == [certificate(tmp_path, "lab1")]


def test_a_simulated_hosts_line_begins_with_that(
    tmp_path: Path, host: Callable[..., Target], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify([host("lab1", stand_ins_for_hardware), host("lab2")], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("(")[0] for line in lines] == [
        "SIMULATED lab1: passed ",
        "  not real  nvidia-smi tells recorded values",
        "lab2: passed ",
    ]
    assert certificate(tmp_path, "lab1")["simulated"] == ["nvidia-smi tells recorded values"]
    assert certificate(tmp_path, "lab2")["simulated"] == []


def test_unreachable_host_is_exit_2(
    tmp_path: Path, host: Callable[..., Target], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify([host("lab1"), unreachable("lab2")], tmp_path) == 2
    assert certificate(tmp_path, "lab1")["result"] == "passed"
    assert certificate(tmp_path, "lab2")["result"] == "could-not-run"
    said = capsys.readouterr().out
    assert "Connection refused" in said
    assert "try it by hand: ssh -p" in said


def test_failure_outranks_an_unreachable_host(tmp_path: Path, host: Callable[..., Target]) -> None:
    assert verify([unreachable("lab1"), host("lab2", open_signup)], tmp_path) == 1


def test_check_that_could_not_be_made_is_exit_2(tmp_path: Path, host: Callable[..., Target]) -> None:
    assert verify([host("lab1", no_systemd)], tmp_path) == 2
    document = certificate(tmp_path, "lab1")
    skipped = [check for check in document["checks"] if check["state"] == "skipped"]
    assert {check["group"] for check in skipped} == {"services"}
    assert "systemctl is missing" in skipped[0]["seen"]


def test_host_never_deployed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = target("lab1", Connection(backend="local", probe=str(tmp_path / "absent")))
    assert verify([bare], tmp_path) == 2
    assert "never deployed: pyinfra INVENTORY deploy.py" in capsys.readouterr().out


def test_probe_that_prints_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = tmp_path / "probe"
    probe.write_text("#!/bin/sh\necho Last login: yesterday\n")
    probe.chmod(0o755)
    assert verify([target("lab1", Connection(backend="local", probe=str(probe)))], tmp_path) == 2
    assert "printed no evidence" in capsys.readouterr().out


def test_refused_plan_proves_nothing(
    tmp_path: Path, host: Callable[..., Target], capsys: pytest.CaptureFixture[str]
) -> None:
    healthy_host = host("lab1")
    problem = {"setting": "model", "source": "group_data/all.py", "message": "unknown model", "remedy": "name another"}
    plan = {"host": "lab1", "decisions": [], "problems": [problem], "engine": None, "webui": None}
    refused = Target("lab1", healthy_host.inventory, plan, healthy_host.connection)
    assert verify([refused], tmp_path) == 2
    assert "model: unknown model" in capsys.readouterr().out


def test_no_host_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([], tmp_path) == 2
    assert "no host" in capsys.readouterr().err


def test_older_certificate_is_not_taken_for_this_runs(
    tmp_path: Path, host: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest broken on this machine: yesterday's pass must not be printed as today's."""
    assert verify([host("lab1")], tmp_path) == 0
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "testinfra.py").write_text("raise ImportError('broken')")
    assert verify([host("lab1")], tmp_path) == 2


# --- the plain pytest session -----------------------------------------------------------------------------------


def test_plain_session_names_each_check(tmp_path: Path, host: Callable[..., Target]) -> None:
    done = session(tmp_path, [host("lab1"), host("lab2", open_signup)], "-v")
    assert done.returncode == 1, done.stdout
    assert "test_host[lab1-engine.completion] PASSED" in done.stdout
    assert "test_host[lab2-webui.signup_refused] FAILED" in done.stdout
    assert "expected 403; seen 400; remedy: " in done.stdout


def test_chosen_checks_decide_the_exit_code_and_the_certificate_stays_whole(
    tmp_path: Path, host: Callable[..., Target]
) -> None:
    done = session(tmp_path, [host("lab1", open_signup)], "-k", "engine")
    assert done.returncode == 0, done.stdout
    document = certificate(tmp_path / "reports", "lab1")
    assert document["result"] == "failed"
    assert {"webui", "engine", "services"} <= {check["group"] for check in document["checks"]}


def test_session_without_hosts_is_exit_2(tmp_path: Path) -> None:
    done = session(tmp_path, [])
    assert done.returncode == 2
    assert "no host to prove" in done.stdout + done.stderr


def test_session_without_inventory_is_exit_2() -> None:
    done = pytest_process()
    assert done.returncode == 2
    assert "--inventory inventories/home.py" in done.stdout + done.stderr


def test_inventory_that_does_not_exist_is_exit_2() -> None:
    done = pytest_process("--inventory", "inventories/hmoe.py")
    assert done.returncode == 2
    assert "inventories/hmoe.py" in done.stdout + done.stderr


def test_collecting_looks_at_no_host(tmp_path: Path) -> None:
    done = session(tmp_path, [unreachable("lab1")], "--collect-only")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "reports").exists()


# --- the contract with deploy.py --------------------------------------------------------------------------------


def test_targets_survive_json() -> None:
    connection = Connection("ssh", "10.77.0.11", 22, "ops", "/k", "/known", "yes", "/config", sudo=True)
    one = target("lab1", connection)
    assert Target.from_json(json.loads(json.dumps(one.as_json()))) == one
