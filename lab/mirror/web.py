"""What the mirror's servers share: a quiet, threaded HTTP/1.1 server that sends files whole or by range."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import BinaryIO

from lab import LabError

Body = Callable[[BinaryIO, int, int], None]  # sends (file, first byte, number of bytes)


class Server(ThreadingHTTPServer):
    """Answers each connection in a thread of its own; apt and uv open many at once."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are everyday here (tests kill them)."""


class Handler(BaseHTTPRequestHandler):
    """One connection. Subclasses answer GET (and HEAD through it) in `answer`."""

    protocol_version = "HTTP/1.1"
    server_version = "llmhost-lab"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Nothing: thousands of requests a run would hide what matters."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        """One request; `self.command` is GET or HEAD."""
        raise NotImplementedError  # each server answers in its own way

    def reply(
        self,
        status: HTTPStatus,
        body: str | dict[str, object] | list[object],
        content_type: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A short answer; what is not text is sent as JSON."""
        if not isinstance(body, str):
            body, content_type = json.dumps(body), "application/json" if "text" in content_type else content_type
        data = body.encode()
        self.begin(status, {"Content-Type": content_type, "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def begin(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        """Status line and headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, path: Path, headers: Mapping[str, str] | None = None, body: Body | None = None) -> None:
        """The file, or the part of it that a Range header asks for."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **(headers or {})}
        with path.open("rb") as file:
            size = path.stat().st_size
            first, last = self._wanted_range(size, headers)
            if first >= size > 0:
                self.reply(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "", headers={"Content-Range": f"bytes */{size}"})
                return
            partial = last - first + 1 < size
            if partial:
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            headers["Content-Length"] = str(last - first + 1)
            self.begin(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK, headers)
            if self.command != "HEAD":
                (body or self._copy)(file, first, last - first + 1)

    def hang_up(self) -> None:
        """Close the connection in the middle of an answer, as a broken network does."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _copy(self, file: BinaryIO, first: int, count: int) -> None:
        if count:  # the kernel copies from disk to socket
            self.connection.sendfile(file, first, count)

    def _wanted_range(self, size: int, headers: Mapping[str, str]) -> tuple[int, int]:
        """First and last byte to send; the whole file where no usable range is asked for."""
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        same_file = self.headers.get("If-Range") in (None, headers.get("ETag"), headers.get("Last-Modified"))
        if not wanted or not same_file or wanted[0] == "bytes=-":
            return 0, size - 1
        if not wanted[1]:
            return max(size - int(wanted[2]), 0), size - 1
        return int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)


def start(address: str, port: int, handler: Callable[..., Handler]) -> Server:
    """Serve in a thread until the process ends."""
    try:
        server = Server((address, port), handler)
    except OSError as error:
        raise LabError(
            f"the mirror cannot listen on {address} port {port}: {error.strerror}. "
            f"See what holds it with `ss -ltnp 'sport = :{port}'`."
        ) from error
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True, name=f"port {port}").start()
    return server
