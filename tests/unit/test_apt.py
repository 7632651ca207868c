"""What infra/apt.py runs on hosts, run here: lists read, keys fetched and compared; its files, read by apt itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import apt
from infra.packages import NewerPackages
from llmhost.catalogue import ROOT
from llmhost.plan.model import AptPin
from llmhost.render import render
from tests.plan.test_driver_tasks_fake import CUDA, DOCKER, DOCKER_KEY, DRIVER

needs_apt = pytest.mark.skipif(shutil.which("apt-config") is None, reason="apt is not installed")
needs_systemd = pytest.mark.skipif(shutil.which("systemctl") is None, reason="systemd is not installed")


# --- lists ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uris() -> Any:
    """The function that reads a list on the host."""
    functions: dict[str, Any] = {}
    exec(apt.AptState.program.partition("parts = ")[0], functions)
    return functions["uris"]


ONE_LINE = """\
# deb https://commented.example/ x main
deb [arch=amd64 signed-by=/k.asc] https://download.docker.com/linux/debian bookworm stable
deb-src http://plain.example/debian bookworm main # and more
"""
DEB822 = """\
# A comment
Types: deb
URIs: https://one.example/ https://two.example/
 https://three.example/
Suites: /

Enabled: no
Types: deb
URIs: https://off.example/

types: deb
uris:
 https://four.example/
#URIs: https://commented.example/
"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.list", ONE_LINE, ["https://download.docker.com/linux/debian", "http://plain.example/debian"]),
        ("a.sources", DEB822, [f"https://{name}.example/" for name in ("one", "two", "three", "four")]),
        ("b.list", "", []),
        ("b.sources", "", []),
    ],
)
def test_a_list_is_read_as_apt_reads_it(uris: Any, tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert uris(str(tmp_path / name)) == expected


# --- keys -------------------------------------------------------------------------------------------------------


@pytest.fixture
def vendor() -> Iterator[str]:
    """A server that has Docker's key at /key, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/key" else 404)
            self.end_headers()
            if self.path == "/key":
                self.wfile.write((ROOT / "keys/docker.asc").read_bytes())

        def log_message(self, format: str, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(url: str, fingerprint: str, path: Path, aside: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    key = {"setting": "mirror_cuda", "url": url, "fingerprint": fingerprint, "path": str(path)}
    asked = json.dumps({"fetch": [key], "aside": aside, "drop": []})
    direct = {**os.environ, "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-I", "-c", apt._APPLY]
    return subprocess.run(command, input=asked, capture_output=True, text=True, env=direct, timeout=60)


def test_the_right_key_is_installed_and_other_lists_are_set_aside(vendor: str, tmp_path: Path) -> None:
    rival, earlier = tmp_path / "docker.list", tmp_path / "docker.list.disabled"
    rival.write_text("new")
    earlier.write_text("earlier")
    path = tmp_path / "keyrings/a.asc"
    ended = fetch(f"{vendor}/key", DOCKER_KEY, path, (str(rival),))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert path.read_bytes() == (ROOT / "keys/docker.asc").read_bytes()
    assert path.stat().st_mode & 0o777 == 0o644
    assert not rival.exists()
    assert (earlier.read_text(), (tmp_path / "docker.list.1.disabled").read_text()) == ("earlier", "new")


def test_a_wrong_key_changes_nothing_and_is_named(vendor: str, tmp_path: Path) -> None:
    rival = tmp_path / "docker.list"
    rival.write_text("new")
    ended = fetch(f"{vendor}/key", CUDA.fingerprint, tmp_path / "a.asc", (str(rival),))
    assert ended.returncode == 1
    assert f"mirror_cuda: {vendor}/key: it is the key {DOCKER_KEY}, expected {CUDA.fingerprint}." in ended.stderr
    assert "mirror_cuda_key" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["docker.list"]


def test_a_key_that_cannot_be_fetched_is_named(vendor: str, tmp_path: Path) -> None:
    ended = fetch(f"{vendor}/gone", CUDA.fingerprint, tmp_path / "a.asc")
    assert ended.returncode == 1
    assert f"mirror_cuda: {vendor}/gone cannot be fetched from the host: " in ended.stderr
    assert "set mirror_cuda_key to the file of the right key" in ended.stderr


# --- what is newer ----------------------------------------------------------------------------------------------


def test_what_is_newer_is_asked_for_without_what_is_held(tmp_path: Path) -> None:
    """apt-get's own words of a simulation; the stand-ins say what they were asked."""
    stand_ins = {
        "dpkg-query": "printf 'ii  docker-ce\\nhi  docker-cli\\nii  bash\\nrc  docker.io\\nii  linux-image-amd64\\n'",
        "apt-get": f'echo "$*" >>{tmp_path}/asked; cat {tmp_path}/told',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "told").write_text(
        "Reading package lists...\nInst linux-image-6.1.0-41-amd64 (6.1.158-1 Debian:12.9 [amd64])\n"
        "Inst docker-ce [5:29.7.2-1] (5:29.8.0-1 Docker CE:bookworm [amd64]) []\nConf docker-ce (5:29.8.0-1)\n"
    )
    fact = NewerPackages()
    command = fact.command(
        patterns=["^docker-", r"^docker\.io$", "^linux-(image|headers)-"], script="set -u"
    ).get_raw_value()
    ended = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert fact.process(ended.stdout.splitlines()) == {
        "linux-image-6.1.0-41-amd64": ("", "6.1.158-1"),
        "docker-ce": ("5:29.7.2-1", "5:29.8.0-1"),
    }
    asked = (tmp_path / "asked").read_text()
    assert asked == "-s --only-upgrade --no-install-recommends install docker-ce linux-image-amd64\n"


# --- files, read by those who will read them on the host --------------------------------------------------------


@needs_apt
def test_apt_reads_the_preferences(tmp_path: Path) -> None:
    pins = (*DRIVER.pins, AptPin("bash*", "version 0.0.1-llmhost", 1001, "a package that every host has"))
    file = tmp_path / "llmhost"
    file.write_text(render("/etc/apt/preferences.d/llmhost", pins=pins))
    options = ["-o", f"Dir::Etc::preferences={file}", "-o", f"Dir::Etc::preferencesparts={tmp_path}/none"]
    ended = subprocess.run(["apt-cache", *options, "policy"], capture_output=True, text=True)
    assert "Invalid record" not in ended.stderr and ended.returncode == 0, ended.stderr


@needs_apt
def test_apt_reads_what_unattended_upgrades_leave_alone(tmp_path: Path) -> None:
    frozen = (*DRIVER.frozen, r"docker\.io$")
    file = tmp_path / "apt.conf"
    file.write_text(render("/etc/apt/apt.conf.d/52llmhost-unattended-upgrades", frozen=frozen))
    environment = {**os.environ, "APT_CONFIG": str(file)}
    dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, env=environment, check=True).stdout
    entries = [line for line in dumped.splitlines() if line.startswith("Unattended-Upgrade::Package-Blacklist:: ")]
    assert [line.split('"')[1] for line in entries] == list(frozen)


@needs_apt
@pytest.mark.parametrize(
    ("source", "release"),
    [(CUDA, CUDA.uri), (DOCKER, f"{DOCKER.uri}/dists/bookworm/")],
    ids=["flat", "with components"],
)
def test_apt_reads_a_repository(tmp_path: Path, source: Any, release: str) -> None:
    file = tmp_path / "a.sources"
    file.write_text(render("/etc/apt/sources.list.d/llmhost-repository.sources", source=source))
    options = [f"Dir::Etc::sourcelist={file}", "Dir::Etc::sourceparts=-", f"Dir::State::lists={tmp_path}"]
    command = ["apt-get", "--print-uris", *[word for option in options for word in ("-o", option)], "update"]
    asked = subprocess.run(command, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert f"'{release}InRelease'" in asked.stdout
    assert f"Signed-By: {apt.key_file(source)}\n" in file.read_text()


@needs_systemd
def test_the_drop_in_makes_the_static_unit_persistent_and_enableable(tmp_path: Path) -> None:
    """Ubuntu's unit as it is shipped: static, stopped when unneeded, without persistence mode."""
    units, drop_in = (
        tmp_path / "usr/lib/systemd/system",
        "/etc/systemd/system/nvidia-persistenced.service.d/llmhost.conf",
    )
    units.mkdir(parents=True)
    (units / "nvidia-persistenced.service").write_text(
        "[Unit]\nDescription=NVIDIA Persistence Daemon\nStopWhenUnneeded=true\n[Service]\nType=forking\n"
        "ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --no-persistence-mode --verbose\n"
    )
    for name in ("basic", "sysinit", "shutdown", "multi-user"):
        (units / f"{name}.target").write_text("[Unit]\n")
    for program in ("/bin/sh", "/usr/bin/nvidia-persistenced", "/usr/local/lib/llmhost/inputs"):
        file = tmp_path / program[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    enabled = ["systemctl", f"--root={tmp_path}", "is-enabled", "nvidia-persistenced.service"]
    assert subprocess.run(enabled, capture_output=True, text=True).stdout.strip() == "static"
    written = tmp_path / drop_in[1:]
    written.parent.mkdir(parents=True)
    written.write_text(render(drop_in, dropin=drop_in))
    verify = ["systemd-analyze", "verify", f"--root={tmp_path}", "--man=no", "nvidia-persistenced.service"]
    ended = subprocess.run(verify, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert subprocess.run(enabled, capture_output=True, text=True).stdout.strip() == "disabled"


@pytest.mark.parametrize(("exists", "user"), [(True, "--user nvidia-persistenced "), (False, "")])
def test_the_daemon_runs_as_its_user_where_the_host_has_it(tmp_path: Path, exists: bool, user: str) -> None:
    drop_in = "/etc/systemd/system/nvidia-persistenced.service.d/llmhost.conf"
    (start,) = re.findall(r"^ExecStart=(/.*)$", render(drop_in, dropin=drop_in), re.MULTILINE)
    program, option, script = shlex.split(start.replace("$$", "$"))  # as systemd reads it
    (tmp_path / "getent").write_text(f"#!/bin/sh\n[ \"$*\" = 'passwd nvidia-persistenced' ] && {str(exists).lower()}\n")
    (tmp_path / "getent").chmod(0o755)
    told = script.replace("/usr/bin/nvidia-persistenced", "echo")
    ended = subprocess.run([program, option, told], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/bin"})
    assert ended.stdout == f"{user}--persistence-mode --verbose\n"
