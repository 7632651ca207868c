"""The far side of a company's network, on the lab's bridge: a CA, servers it vouches for, and a forward proxy.

All three are real: TLS by Python's ssl, certificates by `cryptography`, a proxy that forwards and tunnels. Behind them
lies the lab's own mirror.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CHUNK_BYTES = 256 * 1024


class Authority:
    """A private CA; `certificate` is the file an operator is given."""

    def __init__(
        self, directory: Path, name: str = "Example Company CA", days: int = 30, *, is_ca: bool = True
    ) -> None:
        self.directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False
        )  # fmt: skip
        signed = (
            self._builder(self.name, self.key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.certificate = directory / f"{name.replace(' ', '-')}.pem"
        self.certificate.write_bytes(signed.public_bytes(Encoding.PEM))

    def context(self, *names: str) -> ssl.SSLContext:
        """For a server of these names or addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        signed = (
            self._builder(subject, key.public_key(), 7)
            .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(ours, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        file = self.directory / "server.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(private + signed.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _builder(self, subject: x509.Name, key: Any, days: int) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .issuer_name(self.name)
            .subject_name(subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=abs(days) + 1))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class Server(ThreadingHTTPServer):
    """Something on a free port of the bridge, as a context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def address(self) -> str:
        return f"{self.server_address[0]!s}:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that refuses our certificate hangs up: that is what some tests are about."""


class Front(Server):
    """https:// in front of one of the mirror's servers.

    + upstream: "HOST:PORT" that is asked
    + prefix: what stands before the path in the request line: the archive's URL where upstream is apt's proxy
    """

    def __init__(self, address: str, context: ssl.SSLContext, upstream: str, prefix: str = "") -> None:
        super().__init__((address, 0), _FrontHandler)
        self.upstream, self.prefix = upstream, prefix
        # The handshake takes place in the connection's own thread, at its first read.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)


class ForwardProxy(Server):
    """What a company's hosts reach the world through.

    + names: {name that only the proxy knows: address}; other hosts are archives, asked through `archives`
    + archives: "HOST:PORT" of the lab's cache for apt
    """

    def __init__(self, address: str, names: Mapping[str, str], archives: str) -> None:
        super().__init__((address, 0), _ProxyHandler)
        self.names, self.archives = names, archives
        self.log: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def relay(self, upstream: str, target: str) -> None:
        """Ask another server, and pass its answer on while it arrives."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        passed = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("connection", "proxy-connection")
        }
        connection = HTTPConnection(upstream, timeout=60)
        try:
            connection.request(self.command, target, body, passed)
            answer = connection.getresponse()
            length = answer.getheader("Content-Length")
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            if length is None:
                self.close_connection = True
                self.send_header("Connection", "close")
            self.end_headers()
            while chunk := answer.read(CHUNK_BYTES):
                self.wfile.write(chunk)
        finally:
            connection.close()


class _FrontHandler(_Handler):
    server: Front

    def answer(self) -> None:
        self.relay(self.server.upstream, self.server.prefix + self.path)

    do_GET = do_HEAD = do_POST = answer  # noqa: N815 - the names http.server calls


class _ProxyHandler(_Handler):
    server: ForwardProxy

    def answer(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        name = url.hostname or ""
        if name in self.server.names:
            self.relay(f"{self.server.names[name]}:{url.port or 80}", url.path or "/")
        else:
            self.relay(self.server.archives, self.path)

    do_GET = do_HEAD = do_POST = answer  # noqa: N815 - the names http.server calls

    def do_CONNECT(self) -> None:
        self.server.log.append(f"CONNECT {self.path}")
        name, _, port = self.path.rpartition(":")
        if name not in self.server.names:
            self.send_error(403)
            return
        with socket.create_connection((self.server.names[name], int(port)), timeout=10) as far:
            self.send_response(200)
            self.end_headers()
            self._tunnel(far)
        self.close_connection = True

    def _tunnel(self, far: socket.socket) -> None:
        ways = {self.connection: far, far: self.connection}
        while True:
            for ready in select.select(list(ways), [], [], 60)[0]:
                data = ready.recv(CHUNK_BYTES)
                if not data:
                    return
                ways[ready].sendall(data)
