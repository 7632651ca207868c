"""runtime/fetch-model with the hub's own client, against the lab's hub."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from pathlib import Path

import pytest

from lab.mirror import hub, model, web
from llmhost.catalogue import ROOT

PROGRAM = str(ROOT / "runtime/fetch-model")
WEIGHTS = "model.safetensors"
WEIGHTS_BYTES = 400_000
TOKEN = "hf_a-token-of-an-operator"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> model.Repository:
    """One small text, weights that the hub keeps by LFS, and a format that no engine here reads."""
    directory = tmp_path_factory.mktemp("repository")
    (directory / "config.json").write_text('{"model_type": "llama"}\n')
    (directory / WEIGHTS).write_bytes(random.Random(7).randbytes(WEIGHTS_BYTES))
    (directory / "pytorch_model.bin").write_bytes(b"the same weights once more")
    model.describe(directory)
    return model.read(directory)


class Lab:
    """A hub, a directory to fetch into, and what was asked of the hub."""

    def __init__(self, repository: model.Repository, directory: Path) -> None:
        self.repository, self.directory = repository, directory / "models/revision"
        self.hub = hub.Hub(repository)
        self.server = web.start("127.0.0.1", 0, partial(hub.HubHandler, self.hub))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.home = directory / "home"

    def start(
        self, repository: str = model.REPOSITORY, revision: str = "", url: str = "", pause_seconds: float = 0.05
    ) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "HF_ENDPOINT": url or self.url,
            "HF_TOKEN": TOKEN,
            "LLMHOST_FETCH_PAUSE_SECONDS": str(pause_seconds),
        }
        arguments = [repository, revision or self.repository.revision, str(self.directory)]
        return subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fetch(self, repository: str = model.REPOSITORY, revision: str = "", url: str = "") -> tuple[int, str]:
        """Exit code and what was said."""
        return ended(self.start(repository, revision, url))

    def sent(self, name: str) -> int:
        """How often the hub was asked for the content of a file."""
        return sum(row[0] == "GET" and str(row[1]).endswith(f"/{name}") for row in self.hub.requests)

    def right(self) -> bool:
        """Whether every file is there with the revision's content, and no part of one is left."""
        wanted = {name: self.repository.files[name].sha256 for name in ("config.json", WEIGHTS)}
        found = {path.name: path for path in self.directory.iterdir() if not path.name.startswith(".")}
        return (
            wanted == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
            and not self.parts()
        )

    def parts(self) -> list[Path]:
        return list(self.directory.rglob("*.incomplete"))


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = run.communicate(timeout=60)
    assert TOKEN not in said
    return run.returncode, said


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "waited 30 s in vain"
        time.sleep(0.02)


@pytest.fixture
def lab(repository: model.Repository, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(repository, tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_fresh_fetch_is_verified_and_the_next_run_asks_nothing(lab: Lab) -> None:
    code, said = lab.fetch()
    assert code == 0, said
    assert lab.right()
    assert "2 files, 0 MiB, every checksum right" in said
    assert lab.sent("pytorch_model.bin") == 0
    lab.hub.requests.clear()
    assert lab.fetch() == (0, "")
    assert not lab.hub.requests


def test_a_flipped_bit_is_fetched_again_and_nothing_else_is(lab: Lab) -> None:
    lab.hub.set_fault({"corrupt": True, "times": 1})
    code, said = lab.fetch()
    assert code == 0, said
    assert f"wrong checksum: {WEIGHTS}; again in" in said
    assert lab.right()
    assert (lab.sent(WEIGHTS), lab.sent("config.json")) == (2, 1)


def test_a_small_file_is_verified_too(lab: Lab) -> None:
    """The hub's client trusts what it got; a file that Git itself holds is named by its sha1."""
    lab.hub.set_fault({"corrupt": True, "times": 1, "path": "config.json"})
    code, said = lab.fetch()
    assert code == 0, said
    assert "wrong checksum: config.json; again in" in said
    assert lab.right()


def test_a_hub_that_always_sends_it_wrong_is_given_up(lab: Lab) -> None:
    lab.hub.set_fault({"corrupt": True, "times": 1000})
    code, said = lab.fetch()
    assert code == 1
    last = said.splitlines()[-1]
    assert f"wrong checksum: {WEIGHTS}" in last
    assert lab.url in last
    assert "Setting: mirror_hub" in last
    assert not (lab.directory / WEIGHTS).exists()  # nothing wrong is left for an engine to load
    lab.hub.set_fault({})
    assert lab.fetch()[0] == 0
    assert lab.right()


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop_after": 100_000}], ids=["503", "connection lost"])
def test_a_passing_failure_is_retried(lab: Lab, fault: dict[str, int]) -> None:
    # The client itself resumes a lost connection five times and gives up at the first 503.
    lab.hub.set_fault({**fault, "times": 1})
    code, said = lab.fetch()
    assert code == 0, said
    assert lab.right()
    assert lab.sent(WEIGHTS) == 2


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        (model.REPOSITORY, "0" * 40, f"has no commit {'0' * 40} of {model.REPOSITORY}. Setting: model_revision"),
        ("someone/else", "0" * 40, "has no repository someone/else, or only for others. Settings: model, mirror_hub"),
    ],
)
def test_what_the_hub_lacks_is_told_at_once(lab: Lab, name: str, revision: str, words: str) -> None:
    began = time.monotonic()
    code, said = ended(lab.start(name, revision, pause_seconds=600))
    assert code == 1
    (line,) = said.splitlines()
    assert words in line
    assert lab.url in line
    assert time.monotonic() - began < 60


class Gated(hub.HubHandler):
    """What the hub answers for a model whose licence the token's owner has not accepted."""

    def answer(self) -> None:
        self.reply(HTTPStatus.FORBIDDEN, {"error": "gated"}, headers={"X-Error-Code": "GatedRepo"})


def test_a_gated_model_names_the_licence_and_the_token(lab: Lab) -> None:
    server = web.start("127.0.0.1", 0, partial(Gated, lab.hub))
    code, said = lab.fetch(url=f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()
    assert code == 1
    assert said == (
        f"fetch-model: {model.REPOSITORY} is gated: accept its licence on the hub, then set model_hub_token\n"
    )


def test_an_unreachable_hub_is_named_with_the_setting_that_changes_it(lab: Lab) -> None:
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        code, said = lab.fetch(url=url)
    assert code == 1
    last = said.splitlines()[-1]
    assert url in last
    assert "refused" in last
    assert "Setting: mirror_hub" in last


def test_a_run_killed_in_the_middle_is_completed_by_the_next(lab: Lab) -> None:
    lab.hub.set_fault({"rate": 20_000, "times": 1})
    run = lab.start()
    until(lambda: lab.parts() and lab.sent(WEIGHTS))
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert lab.parts()
    code, said = lab.fetch()
    assert code == 0, said
    assert lab.right()
    assert lab.sent("config.json") == 1


def test_a_client_that_outlives_its_run_is_waited_for(lab: Lab) -> None:
    """A kill of the program alone leaves the client writing; a second client beside it would fetch twice."""
    lab.hub.set_fault({"rate": 200_000, "times": 1})
    run = lab.start()
    until(lambda: lab.parts() and lab.sent(WEIGHTS))
    run.kill()
    run.wait()
    code, said = lab.fetch()
    assert run.stderr
    run.stderr.close()
    assert code == 0, said
    assert lab.right()
    assert lab.sent(WEIGHTS) == 1


def test_a_truncated_file_is_fetched_again(lab: Lab) -> None:
    assert lab.fetch()[0] == 0
    os.truncate(lab.directory / WEIGHTS, WEIGHTS_BYTES - 1)
    code, said = lab.fetch()
    assert code == 0, said
    assert lab.right()


def test_a_broken_manifest_proves_nothing(lab: Lab) -> None:
    """Damage that the sizes do not show is found where the manifest cannot be read."""
    assert lab.fetch()[0] == 0
    damaged = bytearray((lab.directory / WEIGHTS).read_bytes())
    damaged[1000] ^= 1
    (lab.directory / WEIGHTS).write_bytes(damaged)
    (lab.directory / ".llmhost-manifest.json").write_text('{"files": {"config.json": {}}}')
    code, said = lab.fetch()
    assert code == 0, said
    assert lab.right()
