"""The SSH transport of every host."""

from __future__ import annotations

import socket
from typing import Any

import paramiko


def nodelay_transport(sock: Any, *args: Any, **kwargs: Any) -> paramiko.Transport:
    """A transport without Nagle's delay.

    Nagle's algorithm against delayed acknowledgements costs about 42 ms per channel, a factor of 3 to 4 on a run
    (field notes, speed.md). Proxy commands are pipes and have no such option.
    """
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return paramiko.Transport(sock, *args, **kwargs)
