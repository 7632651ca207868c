"""runtime/wait-ready against real HTTP servers and a real main process.

Only the journal is a stand-in, at the system's boundary: a script named journalctl, earlier in PATH, which prints what
an engine's start was seen to write.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmhost.catalogue import ROOT
from tests.unit.stand_ins import Answer, Handler, Request, Route, Served, as_json

PROGRAM = str(ROOT / "runtime/wait-ready")
KEY = "key-of-the-engine"
MODELS = as_json(200, {"object": "list", "data": [{"id": "smollm2", "object": "model"}]})
COMPLETION = as_json(200, {"choices": [{"text": ","}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
READY = as_json(200, {"status": True})

# What vLLM 0.32.0 writes when the engine's process cannot start: the cause, then the processes that lost it.
FAILED_START = """\
(APIServer pid=1480) INFO 11-20 08:09:31 [api_server.py:1870] vLLM API server version 0.32.0
(EngineCore pid=1513) ERROR 11-20 08:09:43 [core.py:900] EngineCore failed to start.
(EngineCore pid=1513) ERROR 11-20 08:09:43 [core.py:900] Traceback (most recent call last):
(EngineCore pid=1513) ERROR 11-20 08:09:43 [core.py:900]   File "/opt/venv/vllm/v1/engine/core.py", line 891, in run
(EngineCore pid=1513) ERROR 11-20 08:09:43 [core.py:900]     raise ValueError(
(EngineCore pid=1513) ERROR 11-20 08:09:43 [core.py:900] ValueError: To serve at least one request with the model's \
max seq len (8192), 0.35 GiB KV cache is needed, which is larger than the available 0.10 GiB.
(EngineCore pid=1513) Process EngineCore:
(EngineCore pid=1513) Traceback (most recent call last):
(EngineCore pid=1513) ValueError: the same once more
(APIServer pid=1480) Traceback (most recent call last):
(APIServer pid=1480) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
CAUSE = "ValueError: To serve at least one request with the model's max seq len (8192), 0.35 GiB KV cache is needed"
# One error in two tracebacks: the second says more.
RAISED_AGAIN = """\
(APIServer pid=1480) Traceback (most recent call last):
(APIServer pid=1480) json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)
(APIServer pid=1480)
(APIServer pid=1480) During handling of the above exception, another exception occurred:
(APIServer pid=1480)
(APIServer pid=1480) Traceback (most recent call last):
(APIServer pid=1480) OSError: It looks like the config file at '/m/config.json' is not a valid JSON file.
"""
WRONG_FLAG = """\
usage: vllm serve [model_tag] [options]
vllm serve: error: argument --max-num-seqs: invalid int value: 'many'
"""
WEBUI_CRASH = """\
INFO:     Started server process [812]
Traceback (most recent call last):
  File "/opt/venv/open_webui/main.py", line 12, in <module>
sqlite3.OperationalError: attempt to write a readonly database
"""


@dataclass
class Unit:
    """A service as systemd starts it: its main process, and the journal of this start."""

    directory: Path
    main: subprocess.Popen[bytes]
    waits: list[subprocess.Popen[str]] = field(default_factory=list)

    def says(self, lines: str) -> None:
        (self.directory / "journal").write_text(lines)

    def wait_ready(self, *arguments: str, timeout: int = 30) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.directory}:{os.environ['PATH']}",
            "MAINPID": str(self.main.pid),
            "INVOCATION_ID": "9ec6f7c1",
            "VLLM_API_KEY": KEY,
            "http_proxy": "http://192.0.2.1:9",  # a proxy of the host is not asked for the host itself
        }
        command = [sys.executable, PROGRAM, "--timeout", str(timeout), *arguments]
        wait = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.waits.append(wait)
        return wait


@pytest.fixture
def new_unit(tmp_path: Path) -> Iterator[Callable[[], Unit]]:
    made: list[Unit] = []

    def start() -> Unit:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        stand_in = directory / "journalctl"
        # Only for the right invocation: the journal of an earlier start holds an earlier error.
        only = "*_SYSTEMD_INVOCATION_ID=9ec6f7c1*"
        stand_in.write_text(f'#!/bin/sh\ncase "$*" in {only}) cat {directory}/journal 2>/dev/null ;; esac\n')
        stand_in.chmod(0o755)
        made.append(Unit(directory, subprocess.Popen(["sleep", "600"])))
        return made[-1]

    yield start
    for unit in made:
        for wait in unit.waits:
            end(wait)
        end(unit.main)


def end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def unit(new_unit: Callable[[], Unit]) -> Unit:
    return new_unit()


def ended(wait: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said; standard output stays empty."""
    out, err = wait.communicate(timeout=30)
    assert out == ""
    return wait.returncode, err


def gave_up(unit: Unit, wait: subprocess.Popen[str]) -> str:
    """The one line that wait-ready said when it gave up; by then the main process is killed."""
    code, said = ended(wait)
    assert code == 1
    assert unit.main.wait(timeout=5) != 0
    (line,) = said.splitlines()
    assert line.startswith("wait-ready: ")
    return line.removeprefix("wait-ready: ")


def is_alive(unit: Unit) -> bool:
    return unit.main.poll() is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service(Served):
    """A service on this port, or on any free one."""

    def __init__(self, routes: dict[str, Route], port: int = 0) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", port), Handler)
        self.routes, self.unknown = routes, always(Answer(404, b""))
        self.requests = []

    def __enter__(self) -> Service:
        super().__enter__()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def always(answer: Answer) -> Route:
    return lambda request: answer


def engine(models: Answer = MODELS, completion: Answer = COMPLETION) -> dict[str, Route]:
    return {
        "GET /health": always(Answer(200, b"")),
        "GET /v1/models": always(models),
        "POST /v1/completions": always(completion),
    }


# --- ready ------------------------------------------------------------------------------------------------------


def test_a_json_answer_is_ready(unit: Unit) -> None:
    with Service({"GET /ready": always(READY)}) as server:
        assert ended(unit.wait_ready(f"{server.url}/ready")) == (0, "")
    assert is_alive(unit)


def test_a_completion_is_ready_and_was_asked_with_the_key(unit: Unit) -> None:
    with Service(engine()) as server:
        assert ended(unit.wait_ready("--completion", server.url)) == (0, "")
        ((_, models), (place, asked)) = server.requests
    assert place == "POST /v1/completions"
    assert (models.token, asked.token) == (KEY, KEY)
    assert (asked.body["model"], asked.body["max_tokens"]) == ("smollm2", 1)
    assert is_alive(unit)


def test_a_service_that_comes_later_is_waited_for(unit: Unit) -> None:
    port = free_port()
    wait = unit.wait_ready(f"http://127.0.0.1:{port}/ready")
    with pytest.raises(subprocess.TimeoutExpired):
        wait.wait(timeout=0.6)
    with Service({"GET /ready": always(READY)}, port=port):
        assert ended(wait) == (0, "")


# --- not ready --------------------------------------------------------------------------------------------------


def given_up(new_unit: Callable[[], Unit], services: dict[str, dict[str, Route]], *arguments: str) -> None:
    """Each of these services is waited for one second, all at once, and is not ready."""
    path = "" if arguments else "/ready"
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Service(routes)) for name, routes in services.items()}
        units = {name: new_unit() for name in servers}
        waits = {
            name: units[name].wait_ready(*arguments, server.url + path, timeout=1) for name, server in servers.items()
        }
        said = {name: gave_up(units[name], wait) for name, wait in waits.items()}
        assert {name: text for name, text in said.items() if not text.startswith("not ready after 1 s")} == {}
        assert all(server.requests for server in servers.values())


def test_only_a_json_200_is_ready(new_unit: Callable[[], Unit]) -> None:
    answers = {
        "page": Answer(200, b"<!doctype html><html>the page</html>", "text/html"),
        "empty": Answer(200, b""),
        "503": as_json(503, {"status": False}),
    }
    given_up(new_unit, {name: {"GET /ready": always(answer)} for name, answer in answers.items()})


def test_health_without_a_completion_is_not_ready(new_unit: Callable[[], Unit]) -> None:
    completions = {
        "500": as_json(500, {"error": {"message": "EngineDeadError"}}),
        "no token": as_json(200, {"choices": [], "usage": {"completion_tokens": 0}}),
        "no usage": as_json(200, {"choices": []}),
        "usage null": as_json(200, {"usage": None}),
        "null": as_json(200, None),
        "no JSON": Answer(200, b"ok", "text/plain"),
    }
    given_up(new_unit, {name: engine(completion=answer) for name, answer in completions.items()}, "--completion")


def test_an_engine_without_a_model_is_not_ready(new_unit: Callable[[], Unit]) -> None:
    models = {
        "none": as_json(200, {"data": []}),
        "a list": as_json(200, []),
        "401": as_json(401, {"error": "Unauthorized"}),
    }
    given_up(new_unit, {name: engine(models=answer) for name, answer in models.items()}, "--completion")


def test_the_last_answer_is_told(unit: Unit) -> None:
    with Service(engine(models=as_json(401, {"error": "Unauthorized"}))) as server:
        said = gave_up(unit, unit.wait_ready("--completion", server.url, timeout=1))
    assert said == f"not ready after 1 s ({server.url}/v1/models answers 401)"


def test_a_port_that_speaks_something_else_is_not_ready(unit: Unit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=greet, args=(other,), daemon=True).start()
        said = gave_up(unit, unit.wait_ready(f"http://127.0.0.1:{other.getsockname()[1]}/ready", timeout=1))
    assert "not ready after 1 s" in said


def greet(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


@pytest.mark.parametrize("hanging", ["GET /v1/models", "POST /v1/completions"])
def test_an_engine_that_hangs_is_given_up_in_time(unit: Unit, hanging: str) -> None:
    """A probe may not outlive the wait: systemd's own timeout would end it without a word."""
    released = threading.Event()

    def hang(request: Request) -> Answer:
        released.wait(30)
        return as_json(503, {})

    began = time.monotonic()
    try:
        with Service({**engine(), hanging: hang}) as server:
            said = gave_up(unit, unit.wait_ready("--completion", server.url, timeout=2))
            released.set()
    finally:
        released.set()
    assert said.startswith("not ready after 2 s")
    assert time.monotonic() - began < 4


# --- a start that fails -----------------------------------------------------------------------------------------


def test_an_ended_process_is_told_at_once(unit: Unit) -> None:
    wait = unit.wait_ready(f"http://127.0.0.1:{free_port()}/ready")
    unit.says(WEBUI_CRASH)
    unit.main.terminate()  # not yet reaped: a zombie is no life
    said = gave_up(unit, wait)
    assert said == (
        "the process ended during its start: sqlite3.OperationalError: attempt to write a readonly database"
    )


def test_a_process_that_is_gone_is_told_at_once(unit: Unit) -> None:
    unit.main.kill()
    unit.main.wait()
    assert gave_up(unit, unit.wait_ready(f"http://127.0.0.1:{free_port()}/ready")) == (
        "the process ended during its start"
    )


def test_a_failed_engine_start_is_told_by_its_cause_and_the_process_is_killed(unit: Unit) -> None:
    """The API process lives on for minutes with the port closed."""
    unit.says(FAILED_START)
    said = gave_up(unit, unit.wait_ready("--completion", f"http://127.0.0.1:{free_port()}"))
    assert said.startswith(f"its start failed: {CAUSE}")
    assert "Engine core initialization failed" not in said
    assert unit.main.returncode == -9


def test_a_failure_in_the_middle_of_the_wait_is_noticed(unit: Unit) -> None:
    wait = unit.wait_ready("--completion", f"http://127.0.0.1:{free_port()}")
    unit.says(FAILED_START.splitlines()[0] + "\n")
    with pytest.raises(subprocess.TimeoutExpired):
        wait.wait(timeout=0.6)
    unit.says(FAILED_START)
    assert CAUSE in gave_up(unit, wait)


def test_an_error_raised_again_is_told_in_the_last_words(unit: Unit) -> None:
    unit.says(RAISED_AGAIN)
    unit.main.terminate()
    said = gave_up(unit, unit.wait_ready("--completion", f"http://127.0.0.1:{free_port()}"))
    assert said.endswith(": OSError: It looks like the config file at '/m/config.json' is not a valid JSON file.")


def test_a_flag_that_the_engine_refuses_is_told(unit: Unit) -> None:
    unit.says(WRONG_FLAG)
    said = gave_up(unit, unit.wait_ready("--completion", f"http://127.0.0.1:{free_port()}"))
    assert said == "its start failed: vllm serve: error: argument --max-num-seqs: invalid int value: 'many'"


def test_errors_that_do_not_end_the_start_are_waited_out(unit: Unit) -> None:
    unit.says("(APIServer pid=1480) ERROR 11-20 08:09:40 [registry.py:12] ImportError: no optional extra\n")
    with Service(engine()) as server:
        assert ended(unit.wait_ready("--completion", server.url)) == (0, "")
    assert is_alive(unit)


def test_the_key_is_never_said(unit: Unit) -> None:
    with Service(engine(models=as_json(401, {"error": KEY}))) as server:
        assert KEY not in gave_up(unit, unit.wait_ready("--completion", server.url, timeout=1))
