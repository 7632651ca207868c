"""Fingerprints of public keys: the vendored ones', and those of keys that gpg makes, where gpg is there to ask."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost import openpgp
from llmhost.catalogue import ROOT
from llmhost.openpgp import KeyFault, armored, binary, fault, fingerprints

# As their makers publish them, and as keys/README.md has them.
VENDORED = {
    "docker.asc": "9DC858229FC7DD38854AE2D88D81803C0EBFCD88",
    "nvidia-container-toolkit.asc": "C95B321B61E88C1809C4F759DDCAE044F796ECB0",
}
needs_gpg = pytest.mark.skipif(shutil.which("gpg") is None, reason="gpg is not installed")


def key(name: str = "docker.asc") -> bytes:
    return (ROOT / "keys" / name).read_bytes()


@pytest.mark.parametrize(("name", "fingerprint"), VENDORED.items())
def test_a_vendored_key_is_the_one_it_is_said_to_be(name: str, fingerprint: str) -> None:
    assert fingerprints(key(name)) == [fingerprint]
    assert fault(key(name), fingerprint) == ""


@pytest.mark.parametrize(("name", "fingerprint"), VENDORED.items())
def test_a_vendored_key_is_in_the_readme(name: str, fingerprint: str) -> None:
    readme = (ROOT / "keys/README.md").read_text()
    (row,) = [line for line in readme.splitlines() if f"`{name}`" in line]
    assert fingerprint in row.replace(" ", "")


def test_every_vendored_key_is_known() -> None:
    assert {path.name for path in (ROOT / "keys").glob("*.asc")} == VENDORED.keys()


@pytest.mark.parametrize("name", VENDORED)
def test_binary_and_armored_are_the_same_key(name: str) -> None:
    raw = binary(key(name))
    assert raw[:1] != b"-"
    assert fingerprints(raw) == fingerprints(armored(raw).encode()) == fingerprints(key(name))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace(b"\n", b"\r\n"),
        lambda t: t.replace(b"BLOCK-----\n", b"BLOCK-----\nVersion: 1\nComment: a\n", 1),
    ],
)
def test_line_ends_and_headers_do_not_matter(change: object) -> None:
    assert callable(change)
    assert fingerprints(change(key())) == [VENDORED["docker.asc"]]


def test_a_wrong_key_is_named_with_both_fingerprints() -> None:
    said = fault(key(), VENDORED["nvidia-container-toolkit.asc"])
    assert said == f"it is the key {VENDORED['docker.asc']}, expected {VENDORED['nvidia-container-toolkit.asc']}"


def test_a_second_key_beside_the_right_one_is_a_fault() -> None:
    """apt would trust both."""
    both = key() + key("nvidia-container-toolkit.asc")
    assert fingerprints(both) == list(VENDORED.values())
    assert " and " in fault(both, VENDORED["docker.asc"])
    assert fault(binary(both), VENDORED["docker.asc"])


def test_an_operators_own_key_may_be_any() -> None:
    assert fault(key(), "") == ""
    assert fault(key(), VENDORED["docker.asc"].lower()) == ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no OpenPGP public key"),
        (b"<html>not found</html>", "no OpenPGP packets"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n*\n-----END PGP PUBLIC KEY BLOCK-----\n", "armor is damaged"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n", "no OpenPGP public key"),
        (b"\xc6\x05\x03abcd", "version 3, expected version 4"),
        (b"\xc6\xff\x00\x00\x00\x09\x04", "cut short"),
        (b"\xc6\xe1a", "unknown length"),
        (b"\x9b\x04", "unknown length"),
        (b"\xc6", "cut short"),
    ],
)
def test_what_is_no_key_is_said(data: bytes, words: str) -> None:
    with pytest.raises(KeyFault, match=words):
        fingerprints(data)
    assert words in fault(data, "")


def test_a_key_that_is_cut_short_is_no_key() -> None:
    raw = binary(key())
    assert "cut short" in fault(raw[:300], VENDORED["docker.asc"])


@given(st.integers(0, len(binary(key())) // 4), st.integers(1, 255))
def test_a_changed_bit_of_the_key_changes_its_fingerprint(at: int, flip: int) -> None:
    """The first quarter lies within the primary key's packet (4096 bits of 2.9 KB)."""
    raw = bytearray(binary(key()))
    at = min(at, 520)
    raw[at] ^= flip
    assert fault(bytes(raw), VENDORED["docker.asc"])


@given(st.binary(max_size=400))
def test_any_bytes_are_a_key_or_a_fault(data: bytes) -> None:
    try:
        found = fingerprints(data)
    except KeyFault:
        return
    assert all(re.fullmatch(r"[0-9A-F]{40}", each) for each in found)


def test_the_text_that_hosts_get_stands_alone() -> None:
    """infra/apt.py ships this module: no import of llmhost, and another Python reads it."""
    text = Path(openpgp.__file__).read_text()
    assert "llmhost." not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    program = text + f"\nprint(fingerprints(open({str(ROOT / 'keys/docker.asc')!r}, 'rb').read())[0])\n"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == VENDORED["docker.asc"]


@needs_gpg
@pytest.mark.parametrize("kind", ["ed25519", "rsa2048"])
def test_gpg_agrees(kind: str, tmp_path: Path) -> None:
    gpg = ["gpg", "--homedir", str(tmp_path), "--batch", "--quiet", "--passphrase", ""]
    tmp_path.chmod(0o700)
    subprocess.run([*gpg, "--quick-gen-key", "Vendor <vendor@example.org>", kind, "sign", "10y"], check=True)
    listed = subprocess.run([*gpg, "--with-colons", "--list-keys"], capture_output=True, text=True, check=True).stdout
    (expected,) = re.findall(r"^fpr:+([0-9A-F]{40}):", listed, re.MULTILINE)
    for form in ([], ["--armor"]):
        exported = subprocess.run([*gpg, "--export", *form], capture_output=True, check=True).stdout
        assert fingerprints(exported) == [expected]
    subprocess.run(["gpgconf", "--homedir", str(tmp_path), "--kill", "all"], check=True)


@needs_gpg
def test_gpg_reads_what_is_armored_here(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    file = tmp_path / "key.asc"
    file.write_text(armored(binary(key())))
    shown = ["gpg", "--homedir", str(tmp_path), "--batch", "--with-colons", "--show-keys", str(file)]
    assert VENDORED["docker.asc"] in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert base64.b64encode(binary(key())[:48]).decode() in file.read_text()
