"""An OpenAI endpoint as strict as vLLM without a tool parser, which remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What vLLM answers to tools it was not told how to parse (field notes, Open WebUI).
NO_TOOL_PARSER = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
PIECES = ("The capital of France", " is Paris.")


@dataclass
class FakeOpenAI:
    """What was asked of it, and the gate between the two pieces of a streamed reply."""

    key: str
    port: int = 0
    asked: list[str] = field(default_factory=list)  # "GET /v1/models"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    rest_may_follow: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def fake_openai(key: str) -> Iterator[FakeOpenAI]:
    """Serve on a free port of loopback until left; every request must carry `key`."""
    fake = FakeOpenAI(key)
    fake.rest_may_follow.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    server.daemon_threads = True
    fake.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeOpenAI

    def do_GET(self) -> None:
        if self._admitted():
            self._send(200, {"object": "list", "data": [{"id": "another-model", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return
        self.fake.bodies.append(body)
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "Not Found", "code": 404}})
        elif body.get("tools") and body.get("tool_choice", "auto") == "auto":
            self._send(400, {"error": {"message": NO_TOOL_PARSER, "type": "BadRequestError", "code": 400}})
        elif body.get("stream"):
            self._stream()
        else:
            message = {"role": "assistant", "content": "".join(PIECES)}
            self._send(200, _completion("chat.completion", message=message, finish_reason="stop"))

    def _admitted(self) -> bool:
        self.fake.asked.append(f"{self.command} {self.path}")
        if self.headers["Authorization"] == f"Bearer {self.fake.key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        first, rest = (_completion("chat.completion.chunk", delta={"content": piece}) for piece in PIECES)
        self._event(json.dumps(first))
        self.fake.rest_may_follow.wait(timeout=60)
        self._event(json.dumps(rest))
        self._event("[DONE]")
        self.close_connection = True

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Say nothing: what was asked is kept in `asked`."""


def _completion(kind: str, **choice: object) -> dict[str, Any]:
    return {"id": "1", "object": kind, "model": "any", "choices": [{"index": 0, **choice}]}
