"""Files on this machine that settings name: read and checked before any host is touched. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from llmhost import openpgp
from llmhost.plan.model import Problem
from llmhost.settings import Loaded, Settings

# A CA, perhaps with its intermediate ones. It travels in a command, which Linux limits to 128 KiB.
MOST_CERTIFICATE_BYTES = 64 << 10

_PRIVATE_PACKETS = (b"\x94", b"\x95", b"\xc5")  # tag 5, old and new format (RFC 9580, 4.2)

_CERTIFICATE_REMEDY = (
    "Give the PEM certificate of the CA that signs your mirrors, or that your proxy signs with (docs/mirrors.md)"
)
_KEY_REMEDY = 'Give the public key that signs the repository, as its maker publishes it, or "vendor"'


class Unusable(ValueError):
    """Why a file cannot be used, in words for the operator."""


def problems(loaded: Loaded) -> tuple[Problem, ...]:
    """A problem for each setting whose file on this machine is missing or not what it should be."""
    return tuple(_problems(loaded))


def _problems(loaded: Loaded) -> Iterator[Problem]:
    settings = loaded.settings
    if settings.ca_certificate:
        try:
            certificates(settings.ca_certificate)
        except Unusable as error:
            yield Problem("ca_certificate", loaded.source("ca_certificate"), str(error), _CERTIFICATE_REMEDY)
    for name in key_settings():
        path = getattr(settings, name)
        if path != "vendor":
            try:
                public_key(path)
            except Unusable as error:
                yield Problem(name, loaded.source(name), str(error), _KEY_REMEDY)


def key_settings() -> list[str]:
    """The settings that hold "vendor" or the path of a repository's key."""
    return [name for name in Settings.model_fields if name.startswith("mirror_") and name.endswith("_key")]


def certificates(path: str, now: datetime | None = None) -> tuple[str, ...]:
    """Each CA certificate of a file as PEM text of its own. Raises Unusable.

    + now: the moment at which they must be valid; by default the present
    """
    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise Unusable(f"{path} holds a private key, which must not travel to hosts")
    if len(data) > MOST_CERTIFICATE_BYTES:
        size = f"{len(data) >> 10} KiB"
        raise Unusable(f"{path} is {size}: expected the few certificates of your own CA, not a whole bundle")
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError:
        form = "it looks like DER: openssl x509 -inform der turns it into PEM" if data[:1] == b"0" else "expected PEM"
        raise Unusable(f"{path} holds no certificate that can be read: {form}") from None
    for certificate in found:
        _check(path, certificate, now or datetime.now(UTC))
    return tuple(certificate.public_bytes(Encoding.PEM).decode() for certificate in found)


def _check(path: str, certificate: x509.Certificate, now: datetime) -> None:
    subject = certificate.subject.rfc4514_string() or "without a name"
    if certificate.not_valid_after_utc < now:
        raise Unusable(f"{path}: the certificate {subject} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if certificate.not_valid_before_utc > now:
        raise Unusable(f"{path}: the certificate {subject} begins on {certificate.not_valid_before_utc:%Y-%m-%d}")
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca:
        raise Unusable(f"{path}: the certificate {subject} is no CA's, it cannot vouch for others (basicConstraints)")


def public_key(path: str) -> bytes:
    """An OpenPGP public key, as the file has it: armoured or binary. Raises Unusable."""
    data = _read(path)
    if b"PGP PRIVATE KEY" in data or data[:1] in _PRIVATE_PACKETS:
        raise Unusable(f"{path} holds a private key, which must not travel to hosts")
    if wrong := openpgp.fault(data, ""):
        raise Unusable(f"{path} is no OpenPGP public key: {wrong}")
    return data


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise Unusable(f"there is no file {path} on this machine") from None
    except OSError as error:
        raise Unusable(f"{path} cannot be read on this machine: {error.strerror}") from None
