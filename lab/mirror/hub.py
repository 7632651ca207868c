"""A model hub that Hugging Face's own client accepts: the trial model, by range, and with faults on demand.

POST /_fault  {"drop_after": BYTES | "corrupt": true | "rate": BYTES_PER_SECOND | "status": 503,
               "times": K, "path": FILE}     the next K requests for that file go wrong (1, the weights)
POST /_fault  {}                             all is well again
GET  /_requests                              what was asked for so far: [[method, path, Range header, status], ...]
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from threading import Lock
from typing import Any, BinaryIO
from urllib.parse import unquote

from lab.mirror.model import File, Repository
from lab.mirror.web import Handler

CHUNK_BYTES = 64 * 1024


@dataclass
class Fault:
    """What goes wrong with the next `times` requests for the file `path`."""

    drop_after: int | None = None  # bytes of the answer, then the connection is closed
    corrupt: bool = False  # one bit of the byte in the middle of the file
    rate: int | None = None  # bytes per second
    status: int | None = None  # answered instead of the file
    times: int = 1
    path: str = "model.safetensors"


class Hub:
    """The repository and what the connections share."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.requests: deque[list[str | int]] = deque(maxlen=1000)
        self._fault = Fault(times=0)
        self._lock = Lock()

    def set_fault(self, wanted: dict[str, Any]) -> None:
        """What goes wrong next, by the names of Fault; an empty dict heals. Raises TypeError for an unknown name."""
        fault = Fault(**wanted) if wanted else Fault(times=0)
        with self._lock:
            self._fault = fault

    def take_fault(self, path: str) -> Fault | None:
        """The fault that this request for `path` has to suffer, counted down."""
        with self._lock:
            if self._fault.times <= 0 or self._fault.path != path:
                return None
            self._fault.times -= 1
            return self._fault


class HubHandler(Handler):
    """The parts of the hub's API that `hf download`, `hf cache verify` and vLLM use."""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def send_response(self, code: int, message: str | None = None) -> None:
        self.hub.requests.append([self.command, self.path, self.headers.get("Range", ""), int(code)])
        super().send_response(code, message)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/_fault":
            self.reply(HTTPStatus.NOT_FOUND, {"error": f"nothing takes a POST at {self.path}"})
            return
        try:
            self.hub.set_fault(json.loads(body))
        except (TypeError, ValueError) as error:
            self.reply(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        else:
            self.reply(HTTPStatus.OK, {})

    def answer(self) -> None:
        repository = self.hub.repository
        owner, name = repository.name.split("/")
        match unquote(self.path.partition("?")[0]).strip("/").split("/"):
            case ["_requests"]:
                self.reply(HTTPStatus.OK, list(self.hub.requests))
            case ["api", "models", o, n, *rest] if (o, n) == (owner, name):
                self._answer_api(rest)
            case [o, n, "resolve", revision, *path] if (o, n) == (owner, name):
                self._answer_file(revision, "/".join(path))
            case ["api", "models", _, _, *_] | [_, _, "resolve", *_]:
                self._not_found("RepoNotFound", f"Repository not found: this hub holds {repository.name} alone.")
            case _:
                self._not_found("EntryNotFound", f"Nothing at {self.path}.")

    def _answer_api(self, rest: list[str]) -> None:
        match rest:
            case []:
                self.reply(HTTPStatus.OK, self._repository_info())
            case ["revision", revision] if self._is_known(revision):
                self.reply(HTTPStatus.OK, self._repository_info())
            case ["tree", revision, *_] if self._is_known(revision):
                files = self.hub.repository.files
                self.reply(HTTPStatus.OK, [tree_entry(name, file) for name, file in files.items()])
            case ["revision" | "tree", revision, *_]:
                self._not_found("RevisionNotFound", f"Invalid rev id: {revision}")
            case _:
                self._not_found("EntryNotFound", f"Nothing at {self.path}.")

    def _answer_file(self, revision: str, name: str) -> None:
        if not self._is_known(revision):
            self._not_found("RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if name not in self.hub.repository.files:
            self._not_found("EntryNotFound", f"Entry not found: {name}")
            return
        file = self.hub.repository.files[name]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": self.hub.repository.revision}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        fault = self.hub.take_fault(name) if self.command == "GET" else None
        if fault is None:
            self.send_file(file.path, headers)
        elif fault.status is not None:
            self.reply(HTTPStatus(fault.status), {"error": "a fault that a test asked for"})
        else:
            self.send_file(
                file.path, headers, lambda opened, first, count: self._send_badly(fault, opened, first, count)
            )

    def _send_badly(self, fault: Fault, file: BinaryIO, first: int, count: int) -> None:
        """The bytes asked for: slowly, with one bit flipped, or not all of them, as the fault says."""
        middle = file.seek(0, 2) // 2
        file.seek(first)
        sent, limit = 0, count if fault.drop_after is None else min(fault.drop_after, count)
        while sent < limit:
            chunk = bytearray(file.read(min(CHUNK_BYTES, limit - sent)))
            if fault.corrupt and 0 <= middle - first - sent < len(chunk):
                chunk[middle - first - sent] ^= 1
            self.wfile.write(chunk)
            sent += len(chunk)
            if fault.rate:
                time.sleep(len(chunk) / fault.rate)
        if limit < count:
            self.hang_up()

    def _is_known(self, revision: str) -> bool:
        return revision in ("main", self.hub.repository.revision)

    def _repository_info(self) -> dict[str, object]:
        repository = self.hub.repository
        return {
            "id": repository.name,
            "modelId": repository.name,
            "sha": repository.revision,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": ["license:apache-2.0"],
            "downloads": 0,
            "likes": 0,
            "siblings": [sibling(name, file) for name, file in repository.files.items()],
        }

    def _not_found(self, code: str, message: str) -> None:
        self.reply(HTTPStatus.NOT_FOUND, {"error": message}, headers={"X-Error-Code": code, "X-Error-Message": message})


def sibling(name: str, file: File) -> dict[str, object]:
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}} if file.is_lfs else {}
    return {"rfilename": name, "size": file.size, "blobId": file.git_sha1, **lfs}


def tree_entry(name: str, file: File) -> dict[str, object]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}} if file.is_lfs else {}
    return {"type": "file", "path": name, "size": file.size, "oid": file.git_sha1, **lfs}
