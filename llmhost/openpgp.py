"""Fingerprints of OpenPGP public keys, with the standard library alone.

One source of truth: infra/apt.py imports it for keys on the control machine, and ships this very text to hosts for keys
that they fetch. It therefore imports nothing of llmhost, and runs on Python 3.9.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

_BLOCK = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----[ \t]*\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL
)
_PUBLIC_KEY = 6  # the tag of a primary key's packet (RFC 9580, 5.5.1.1); subkeys have 14


class KeyFault(ValueError):
    """What is given is no public key; the message says why."""


def fingerprints(data: bytes) -> list[str]:
    """Of each primary key in armored or binary data: 40 capital hex digits. Raises KeyFault where there is none."""
    found = [_fingerprint(body) for tag, body in _packets(binary(data)) if tag == _PUBLIC_KEY]
    if not found:
        raise KeyFault("it holds no OpenPGP public key")
    return found


def fault(data: bytes, expected: str) -> str:
    """What is wrong with a key that shall be the one with this fingerprint ("" takes any): "" where it is right.

    One right key beside another is wrong too: apt would trust both.
    """
    try:
        found = fingerprints(data)
    except KeyFault as error:
        return str(error)
    if expected and found != [expected.upper()]:
        return f"it is the key {' and '.join(found)}, expected {expected.upper()}"
    return ""


def armored(data: bytes) -> str:
    """The same key as text, for files named .asc."""
    if b"-----BEGIN PGP" in data:
        return data.decode("ascii", "replace")
    text = base64.b64encode(data).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    # RFC 9580 calls the checksum superfluous; gpg 2.2 reads no armor without it.
    checksum = "=" + base64.b64encode(_crc24(data).to_bytes(3, "big")).decode()
    begin, end = (f"-----{word} PGP PUBLIC KEY BLOCK-----" for word in ("BEGIN", "END"))
    return "\n".join([begin, "", *lines, checksum, end, ""])


def _crc24(data: bytes) -> int:
    """RFC 9580, 6.1.1."""
    crc = 0xB704CE
    for octet in data:
        crc ^= octet << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc


def binary(data: bytes) -> bytes:
    """The packets of armored data, one block after the other; binary data as it is."""
    if b"-----BEGIN PGP" not in data:
        return data
    return b"".join(_unarmored(block) for block in _BLOCK.findall(data))


def _unarmored(block: bytes) -> bytes:
    # Headers ("Version: ...") end at the first empty line; where there are none, that line comes first.
    _, _, body = (b"\n" + block.replace(b"\r\n", b"\n")).partition(b"\n\n")
    lines = [line.strip() for line in body.split(b"\n")]
    try:
        return base64.b64decode(b"".join(line for line in lines if not line.startswith(b"=")), validate=True)
    except binascii.Error as error:
        raise KeyFault(f"its armor is damaged: {error}") from None


def _packets(data: bytes) -> list[tuple[int, bytes]]:
    """(tag, body) of each packet (RFC 9580, 4.2)."""
    packets, at = [], 0
    while at < len(data):
        header = data[at]
        if not header & 0x80:
            raise KeyFault("it holds no OpenPGP packets")
        tag, start, length = _new_format(data, at) if header & 0x40 else _old_format(data, at)
        if start + length > len(data):
            raise KeyFault("it is cut short")
        packets.append((tag, data[start : start + length]))
        at = start + length
    return packets


def _new_format(data: bytes, at: int) -> tuple[int, int, int]:
    tag, first = data[at] & 0x3F, _number(data, at + 1, 1)
    if first < 192:
        return tag, at + 2, first
    if first < 224:
        return tag, at + 3, ((first - 192) << 8) + _number(data, at + 2, 1) + 192
    if first == 255:
        return tag, at + 6, _number(data, at + 2, 4)
    raise KeyFault("it holds a packet of unknown length")


def _old_format(data: bytes, at: int) -> tuple[int, int, int]:
    tag, kind = data[at] >> 2 & 0x0F, data[at] & 3
    if kind == 3:
        raise KeyFault("it holds a packet of unknown length")
    octets = 1 << kind
    return tag, at + 1 + octets, _number(data, at + 1, octets)


def _number(data: bytes, at: int, octets: int) -> int:
    if at + octets > len(data):
        raise KeyFault("it is cut short")
    return int.from_bytes(data[at : at + octets], "big")


def _fingerprint(body: bytes) -> str:
    """RFC 9580, 5.5.4.2 (as in RFC 4880): SHA-1 over 0x99, the length in two octets, and the packet's body."""
    if body[:1] != b"\x04":
        raise KeyFault(f"it is a key of version {body[0] if body else 0}, expected version 4")
    digest = hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body)
    return digest.hexdigest().upper()
