"""The SSH transport of every host."""

from __future__ import annotations

import socket
from typing import Any

import paramiko

# A host that loses its power says no goodbye: without these the run would wait for its answer for ever.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}  # seconds, seconds, probes


def nodelay_transport(sock: Any, *args: Any, **kwargs: Any) -> paramiko.Transport:
    """A transport without Nagle's delay, that notices within 45 s when its host is gone.

    Nagle's algorithm against delayed acknowledgements costs about 42 ms per channel, a factor of 3 to 4 on a run
    (field notes, speed.md). Proxy commands are pipes and have no such option.
    """
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not every system that pyinfra runs on has all three
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return paramiko.Transport(sock, *args, **kwargs)
