"""Hosts for the tests of the spine: one lab a session, a host once for all tests that share it."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator

import pytest

from lab import LabError, hosts, life, preflight, state
from tests.lab.spine import NewHost, certificate_path, deploy

# Started in the background of a script, pytest ignores Ctrl-C, and so would the programs whose interruption is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def new_host() -> Iterator[NewHost]:
    """new_host(label, os, gpu): a fresh host in the session's lab; one of that label before it is thrown away."""
    try:
        preflight.require(["debian-12", "debian-13"])
    except LabError as refusal:
        pytest.skip(str(refusal))  # names what this machine lacks; scripts/test refuses before
    prefix = f"sp{secrets.token_hex(2)}"

    def fresh(label: str, system: str = "debian-12", gpu: str = "") -> str:
        name = state.host_name(prefix, label)
        if lab := state.load(prefix):
            for host in [host for host in lab.hosts if host.name == name]:
                hosts.remove(lab, host)
        life.up(life.requests([f"{label}={system}"], 1, gpu), prefix, life.Options())
        made.append(name)
        return name

    made: list[str] = []
    try:
        yield fresh
    finally:
        life.down(prefix)
        for name in made:
            certificate_path(name).unlink(missing_ok=True)


@pytest.fixture(scope="session")
def first(new_host: NewHost) -> str:
    """The host that tests/lab/test_resume.py takes from bare to converged, and tests/lab/test_spine.py goes on with."""
    return new_host("a", "debian-12")


@pytest.fixture(scope="session")
def converged(first: str) -> str:
    """The same host, deployed and proven."""
    ended = deploy(first)
    assert ended.code == 0, ended.output
    return first
