"""Mirrors, an own CA and a proxy, on real hosts: what is set is used, what is unset leaves no trace."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import state
from lab.mirror import APT_PROXY_PORT, HUB_PORT, INDEX_PORT
from tests.lab.far_side import Authority, ForwardProxy, Front
from tests.lab.spine import PYINFRA, NewHost, command, disk, on, write_inventory, written

pytestmark = pytest.mark.lab

FETCH = "tests/lab/deploy_fetch.py"
BASE = (
    "from tasks.base import base_system\nfrom tasks.preflight import preflight\nplan = preflight()\nbase_system(plan)\n"
)
OUR_LIST = "/etc/apt/sources.list.d/llmhost-archive.sources"
OUR_CERTIFICATE = "usr/local/share/ca-certificates/llmhost.crt"
FAR = "mirror.far.example"  # only the proxy knows it


@dataclass
class Box:
    """A lab host and how it is deployed in part."""

    name: str
    directory: Path

    @property
    def address(self) -> str:
        """Of the lab's bridge, where the far side listens."""
        return state.find_host(self.name)[0].address

    def deploy(self, file: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
        """preflight and the base system, or another deploy file, with these settings."""
        if not file:
            file = str(self.directory / "base.py")
            Path(file).write_text(BASE)
        inventory = write_inventory(self.directory, {self.name: settings})
        words = (*PYINFRA, inventory, file, "-y", "--limit", self.name)
        return command(*words, prefix=state.prefix_of(self.name), timeout_seconds=300)

    def good(self, file: str = "", **settings: Any) -> str:
        ended = self.deploy(file, **settings)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def bad(self, file: str = "", **settings: Any) -> str:
        ended = self.deploy(file, **settings)
        assert ended.returncode != 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def read(self, path: str) -> str:
        return (disk(self.name) / path.lstrip("/")).read_text()

    def has(self, path: str) -> bool:
        return (disk(self.name) / path.lstrip("/")).exists()

    @property
    def archive(self) -> dict[str, str]:
        """Settings of the archive that the host's own list names, whatever it is in this lab."""
        text = self.read("/etc/apt/sources.list" if self.has("/etc/apt/sources.list") else SOURCES)
        uris = sorted(set(re.findall(r"https?://\S+", text)), key=lambda uri: "security" in uri)
        return {"mirror_apt_archive": uris[0], "mirror_apt_security": uris[1]}


SOURCES = "/etc/apt/sources.list.d/debian.sources"


@pytest.fixture(scope="module")
def bookworm(new_host: NewHost, tmp_path_factory: pytest.TempPathFactory) -> Box:
    return Box(new_host("m12", "debian-12"), tmp_path_factory.mktemp("m12"))


@pytest.fixture(scope="module")
def trixie(new_host: NewHost, tmp_path_factory: pytest.TempPathFactory) -> Box:
    """With its list as Debian 13's installer writes it, and a repository of somebody else's."""
    box = Box(new_host("m13", "debian-13"), tmp_path_factory.mktemp("m13"))
    main, security = box.archive.values()
    keyring = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    deb822 = (
        f"Types: deb deb-src\nURIs: {main}\nSuites: trixie trixie-updates trixie-backports\n"
        f"Components: main non-free-firmware\n{keyring}\n"
        f"# security\nTypes: deb\nURIs: {security}\nSuites: trixie-security\nComponents: main\n{keyring}"
    )
    (disk(box.name) / SOURCES.lstrip("/")).write_text(deb822)
    on(box.name, "rm /etc/apt/sources.list")
    return box


def settled(told: str) -> bool:
    """Whether a run found certificates, addresses, packages and what was fetched as they should be."""
    steps = ("trust and addresses", "distribution packages", "uv", "small environment", "model")
    found = re.findall(rf"\| (?:{'|'.join(steps)}) +(\d+) +(\S+) +(\S+) +(\d+)", told)
    return len(found) in (2, len(steps)) and set(found) == {("1", "-", "-", "1")}


def entries(box: Box) -> set[str]:
    """The files that apt's sources come from."""
    told = on(box.name, "apt-get indextargets --format '$(SOURCESENTRY)'")
    return {line.partition(":")[0] for line in told.splitlines()}


# --- the distribution's archive

STRANGER = {
    "/etc/apt/sources.list": "deb https://packages.vendor.example/apt stable tool\n",
    SOURCES: "\nTypes: deb\nURIs: https://packages.vendor.example/apt\nSuites: stable\nComponents: tool\n",
}


@pytest.mark.parametrize(("system", "own"), [("bookworm", "/etc/apt/sources.list"), ("trixie", SOURCES)])
def test_the_archive_is_where_the_setting_says_and_comes_back_from_there(
    system: str, own: str, request: pytest.FixtureRequest
) -> None:
    box: Box = request.getfixturevalue(system)
    settings = box.archive
    with (disk(box.name) / own.lstrip("/")).open("a") as file:
        file.write(STRANGER[own])
    before = box.read(own)

    refused = box.bad(mirror_apt_archive=settings["mirror_apt_archive"])
    assert "Refused: mirror_apt_security (default): is unset, but Debian's security updates" in refused
    wrong = box.bad(
        mirror_apt_archive=settings["mirror_apt_archive"], mirror_apt_security=settings["mirror_apt_archive"]
    )
    assert "(mirror_apt_security) as that of its security updates" in wrong
    assert f"{system}-security" in wrong
    assert (box.read(own), box.has(OUR_LIST)) == (before, False)

    told = box.good(**settings)
    assert f"rename {own} to {own}.disabled" in told
    assert "with it falls silent: https://packages.vendor.example/apt stable" in told
    assert re.search(r"distribution packages +1 +1 ", told)
    assert entries(box) == {OUR_LIST}
    assert (box.has(own), box.read(f"{own}.disabled")) == (False, before)
    assert (
        "Suites: trixie trixie-updates trixie-backports\nComponents: main non-free-firmware\n" in box.read(OUR_LIST)
    ) == (system == "trixie")
    assert settled(box.good(**settings))

    assert f"rename {own}.disabled back to {own}" in box.good()
    assert (box.read(own), box.has(OUR_LIST), box.has(f"{own}.disabled")) == (before, False, False)
    assert entries(box) == {own}
    assert settled(box.good())
    (disk(box.name) / own.lstrip("/")).write_text(before.removesuffix(STRANGER[own]))


# --- an own CA


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@dataclass
class Served:
    """The mirror behind TLS, and what to set for it."""

    index: Front
    hub: Front
    apt: Front

    def settings(self, name: str) -> dict[str, str]:
        index = f"https://{name}:{self.index.server_port}/simple/"
        return {
            "mirror_python_index": index,
            "mirror_torch_index": index,
            "mirror_hub": f"https://{name}:{self.hub.server_port}",
        }


@contextmanager
def served(box: Box, authority: Authority, archive: str = "") -> Iterator[Served]:
    here, context = box.address, authority.context(box.address, FAR)
    with (
        Front(here, context, f"{here}:{INDEX_PORT}") as index,
        Front(here, context, f"{here}:{HUB_PORT}") as hub,
        Front(here, context, f"{here}:{APT_PROXY_PORT}", archive) as apt,
    ):
        yield Served(index, hub, apt)


def python_trusts(box: Box, url: str) -> bool:
    """Whether a program that knows nothing of llmhost reaches it."""
    return on(box.name, f"python3 -c 'import urllib.request as u; u.urlopen(\"{url}\")' 2>/dev/null; echo $?") == "0"


def test_a_private_ca_is_named_where_it_lacks_and_serves_everything_once_given(
    bookworm: Box, authority: Authority, tmp_path: Path
) -> None:
    with served(bookworm, authority) as far:
        settings = far.settings(bookworm.address)
        before = written(bookworm.name)
        refused = bookworm.bad(**settings)
        for name in ("mirror_python_index", "mirror_hub"):
            assert re.search(rf"Refused: {name} .*does not trust the certificate of {settings[name]}", refused)
        assert "Set ca_certificate to the PEM certificate" in refused
        other = Authority(tmp_path, "Another CA")
        assert "ca_certificate is not the CA that signed it" in bookworm.bad(
            **settings, ca_certificate=str(other.certificate)
        )
        assert written(bookworm.name) == before

        ours = {**settings, "ca_certificate": str(authority.certificate)}
        told = bookworm.good(FETCH, **ours)
        assert "write /usr/local/share/ca-certificates/llmhost.crt" in told
        for step in ("uv", "small environment", "model"):
            assert re.search(rf"Fetch \| {step} +1 +1 ", told), told
        assert python_trusts(bookworm, settings["mirror_python_index"])
        assert settled(bookworm.good(FETCH, **ours))

        renewed = Authority(tmp_path)  # of the same name, with another key
        bookworm.good(ca_certificate=str(renewed.certificate))
        assert not python_trusts(bookworm, settings["mirror_python_index"])
        bookworm.good(ca_certificate=str(authority.certificate))
        assert python_trusts(bookworm, settings["mirror_python_index"])

        bookworm.good()
        assert not python_trusts(bookworm, settings["mirror_python_index"])
        assert not bookworm.has(OUR_CERTIFICATE)
        assert on(bookworm.name, "ls -l /etc/ssl/certs | grep -c llmhost || true") == "0"


def test_a_host_without_ca_certificates_gets_them_from_a_mirror_that_only_the_ca_vouches_for(
    trixie: Box, authority: Authority
) -> None:
    """apt's https needs what ca-certificates brings, which comes by apt: meanwhile the CA alone is trusted."""
    main, security = trixie.archive.values()
    on(
        trixie.name,
        "dpkg --purge --force-depends ca-certificates && rm -rf /etc/ssl/certs /usr/local/share/ca-certificates",
    )
    on(trixie.name, "mv /etc/apt/apt.conf.d/00lab-proxy /root/")  # the mirror is reached directly
    try:
        with served(trixie, authority, main) as far, served(trixie, authority, security) as updates:
            archive = f"https://{trixie.address}:{far.apt.server_port}"
            security = f"https://{trixie.address}:{updates.apt.server_port}"
            settings = {"mirror_apt_archive": archive, "mirror_apt_security": security}
            told = trixie.good(**settings, ca_certificate=str(authority.certificate))
            assert "install ca-certificates" in told
            assert python_trusts(trixie, f"{archive}/dists/trixie/InRelease")
            assert not trixie.has("/etc/apt/apt.conf.d/96llmhost-bootstrap")
            assert not trixie.has("/etc/apt/llmhost-bootstrap.pem")
            again = trixie.good(**settings, ca_certificate=str(authority.certificate))
            assert settled(again)
            trixie.good()
    finally:
        on(trixie.name, "mv /root/00lab-proxy /etc/apt/apt.conf.d/")


# --- a proxy


def test_everything_goes_through_the_proxy_where_no_other_way_is(bookworm: Box, authority: Authority) -> None:
    undo = "rm -rf /opt/llmhost/uv /opt/llmhost/cache /opt/llmhost/releases/small /var/lib/llmhost/models/*"
    on(bookworm.name, f"{undo}; apt-get -qq --yes purge python3-venv python3.11-venv; apt-get clean")
    here = bookworm.address
    proxied = ForwardProxy(here, {FAR: here}, f"{here}:{APT_PROXY_PORT}")
    with served(bookworm, authority) as far, proxied as proxy:
        settings = {
            **far.settings(FAR),
            "mirror_hub": f"http://{here}:{HUB_PORT}",  # bypassed
            "ca_certificate": str(authority.certificate),
        }
        refused = bookworm.bad(FETCH, **settings)
        assert re.search(rf"Refused: mirror_python_index .*{FAR}.* cannot be reached from the host: ", refused)
        assert "set proxy_http and proxy_https" in refused

        # A login shell's own proxy leads nowhere: the planned one is used.
        on(bookworm.name, "echo HTTPS_PROXY=http://127.0.0.1:1 > /etc/environment")
        url = f"http://{proxy.address}"
        settings |= {"proxy_http": url, "proxy_https": url, "proxy_bypass": f"localhost,127.0.0.1,{here}"}
        try:
            told = bookworm.good(FETCH, **settings)
            again = bookworm.good(FETCH, **settings)
        finally:
            on(bookworm.name, ": > /etc/environment")
    assert re.search(r"distribution packages +1 +1 ", told)
    assert any(re.match(r"GET http://\S+/pool/\S+/python3\.11-venv", line) for line in proxy.log), proxy.log
    assert f"CONNECT {FAR}:{far.index.server_port}" in proxy.log
    assert [line for line in proxy.log if f":{HUB_PORT}" in line] == []
    for step in ("uv", "small environment", "model"):
        assert re.search(rf"Fetch \| {step} +1 +1 ", told), told
    assert settled(again)


def test_a_proxy_that_does_not_answer_is_named(bookworm: Box) -> None:
    closed = f"http://{bookworm.address}:1"
    on(bookworm.name, "rm -rf /opt/llmhost/uv")
    refused = bookworm.bad(
        mirror_python_index="http://index.far.example/simple/", proxy_http=closed, proxy_https=closed
    )
    assert "cannot be reached from the host through its proxy" in refused
    assert "See proxy_http, proxy_https and proxy_bypass" in refused
