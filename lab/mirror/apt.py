"""A caching proxy for apt: `Acquire::http::Proxy` points here, packages are fetched once and served offline afterwards.

A .deb and a by-hash index never change and are kept for ever. What does change (InRelease) is revalidated, and served
from the cache where the archive does not answer. Anything that is not of an archive's layout is refused: this is no way
to the Internet. (Debian's apt-cacher-ng answered "503 Host not found" in such a lab: field-notes/lab.md, section 6.)
"""

from __future__ import annotations

import email.utils
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Lock
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from lab.mirror.web import Handler

CONNECT_SECONDS = 10  # also the longest silence in the middle of a download
UNREACHABLE_SECONDS = 30  # an archive that did not answer is not asked again for this long
CHUNK_BYTES = 256 * 1024


class AptCache:
    """Archive files on disk, by host and path; their time is the archive's Last-Modified."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._guard = Lock()
        self._busy: dict[Path, Lock] = defaultdict(Lock)
        self._silent_until: dict[str, float] = {}

    def path(self, host: str, path: str) -> Path:
        """Where a file of an archive lies, or would lie, in the cache."""
        return self.directory / host / unquote(path).lstrip("/")

    def busy(self, path: Path) -> Lock:
        """Held while a file is fetched: of many hosts that want it at once, the first fetches, the others wait."""
        with self._guard:
            return self._busy[path]

    def is_silent(self, host: str) -> bool:
        """Whether the archive failed to answer a moment ago; asking again would cost each file the whole timeout."""
        return time.monotonic() < self._silent_until.get(host, 0)

    def note_silence(self, host: str) -> None:
        self._silent_until[host] = time.monotonic() + UNREACHABLE_SECONDS


class AptHandler(Handler):
    """A forward proxy: the request line carries a whole URL."""

    def __init__(self, cache: AptCache, *arguments: Any) -> None:
        self.cache = cache
        super().__init__(*arguments)

    def do_CONNECT(self) -> None:
        self.reply(HTTPStatus.FORBIDDEN, "the lab's apt proxy takes http:// archives only, not https://.\n")

    def answer(self) -> None:
        url = urlsplit(self.path)
        if url.scheme != "http" or not is_archive_path(url.path):
            self.reply(HTTPStatus.FORBIDDEN, f"the lab's apt proxy serves package archives only, not {self.path}\n")
            return
        path = self.cache.path(url.netloc, url.path)
        if not path.is_relative_to(self.cache.directory) or ".." in path.parts:
            self.reply(HTTPStatus.FORBIDDEN, "no.\n")
            return
        if is_immutable(url.path) and path.is_file():
            self._send_cached(path)
            return
        with self.cache.busy(path):
            if is_immutable(url.path) and path.is_file():  # another host has fetched it meanwhile
                self._send_cached(path)
            else:
                self._fetch(url.netloc, path)

    def _fetch(self, host: str, path: Path) -> None:
        """Ask the archive; fall back on the cached copy where it does not answer."""
        if self.cache.is_silent(host):
            self._send_stale(path, f"{host} did not answer a moment ago")
            return
        request = urllib.request.Request(self.path, headers={"User-Agent": "llmhost-lab"})
        if path.is_file():
            request.add_header("If-Modified-Since", last_modified(path))
        try:
            response = urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == HTTPStatus.NOT_MODIFIED:
                    self._send_cached(path)
                else:
                    self.reply(HTTPStatus(error.code), f"{self.path}: {error.reason}\n")
        except (OSError, HTTPException) as error:
            self.cache.note_silence(host)
            self._send_stale(path, str(error))
        else:
            with response:
                self._relay(response, path)

    def _relay(self, response: HTTPResponse, path: Path) -> None:
        """Pass the answer on while it arrives; it enters the cache once it is complete."""
        length = response.headers.get("Content-Length")
        headers = {name: value for name in ("Content-Type", "Last-Modified") if (value := response.headers.get(name))}
        self.close_connection = self.close_connection or length is None
        headers |= {"Content-Length": length} if length is not None else {"Connection": "close"}
        self.begin(HTTPStatus.OK, headers)
        if self.command == "HEAD":
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".incoming-", delete=False) as incoming:
            try:
                self._copy_to_both(response, incoming)
                complete = length is None or incoming.tell() == int(length)
            except (OSError, HTTPException):
                complete = False
        received = Path(incoming.name)
        if not complete:
            received.unlink()
            self.close_connection = True
            return
        with suppress(TypeError, ValueError):
            modified = email.utils.parsedate_to_datetime(response.headers["Last-Modified"]).timestamp()
            os.utime(received, (modified, modified))
        received.replace(path)

    def _copy_to_both(self, response: HTTPResponse, incoming: IO[bytes]) -> None:
        """To the client and to the cache; a client that hangs up does not stop the download."""
        listening = True
        while chunk := response.read(CHUNK_BYTES):
            incoming.write(chunk)
            if listening:
                try:
                    self.wfile.write(chunk)
                except OSError:
                    listening, self.close_connection = False, True

    def _send_stale(self, path: Path, reason: str) -> None:
        if path.is_file():
            self._send_cached(path)
        else:
            self.reply(
                HTTPStatus.GATEWAY_TIMEOUT, f"{self.path} is not in the lab's cache, and the archive: {reason}\n"
            )

    def _send_cached(self, path: Path) -> None:
        modified = last_modified(path)
        if self.headers.get("If-Modified-Since") == modified:
            self.begin(HTTPStatus.NOT_MODIFIED, {"Last-Modified": modified, "Content-Length": "0"})
        else:
            self.send_file(path, {"Last-Modified": modified})


def is_archive_path(path: str) -> bool:
    """Whether this is a file in the layout of a Debian archive."""
    return ("/dists/" in path or "/pool/" in path) and not path.endswith("/")


def is_immutable(path: str) -> bool:
    """Whether this address always names the same bytes."""
    return path.endswith((".deb", ".udeb", ".ddeb")) or "/by-hash/" in path


def last_modified(path: Path) -> str:
    """A file's time as HTTP writes it."""
    return email.utils.formatdate(path.stat().st_mtime, usegmt=True)
