"""Every trap of Open WebUI's defaults, on the real program with the planned environment.

The engine is a stand-in that refuses what vLLM refuses. A second server runs with the defaults a newcomer would have:
on it the same questions get the bad answers, which shows that the checks can fail and that the rows are still needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmhost.plan.model import EnginePlan, Model, Release, Service
from llmhost.plan.webui import Runtime, environment
from llmhost.settings import Settings
from tests.lab.fake_openai import PIECES, FakeOpenAI, fake_openai

pytestmark = pytest.mark.lab

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "locks" / "open-webui-0.12.4-py311.txt"
MODEL = "smollm2-135m-instruct"
KEY = "engine-key-of-this-test-0001"
EMAIL, PASSWORD = "admin@localhost", "password-of-this-test"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "".join(PIECES)

# What a newcomer sets, and no more.
NAIVE = {"WEBUI_ADMIN_EMAIL": EMAIL, "USE_SLIM_DOCKER": "true", "ENABLE_PERSISTENT_CONFIG": "false"}


# --- the real program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def venv() -> Path:
    """The locked installation, built once per lock and kept in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmhost"
    cache = Path(os.environ.get("LLMHOST_CACHE") or cache) / "lab"
    finished = cache / "venvs" / f"open-webui-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    if not finished.exists():
        _install(finished, cache / "wheels")
    return finished


def _install(finished: Path, wheels: Path) -> None:
    # Built aside and renamed when complete, so that an interrupted run leaves nothing that looks finished.
    building = finished.with_name(f"{finished.name}.{os.getpid()}")
    python = sys.executable if sys.version_info[:2] == (3, 11) else "3.11"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--relocatable", "--python", python, str(building)], check=True)
    source = ["--no-index", "--find-links", str(wheels)] if any(wheels.glob("open_webui-*.whl")) else []
    into = ["--python", str(building / "bin" / "python"), "--require-hashes", "--only-binary", ":all:"]
    subprocess.run([*uv, "pip", "sync", *into, *source, str(LOCK)], check=True)
    try:
        building.rename(finished)
    except OSError:  # another run was faster
        shutil.rmtree(building)


class Server:
    """One run of Open WebUI, with a client and what it wrote."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        self.log, self.trace = directory.with_suffix(".log"), directory.with_suffix(".trace")
        self.started = time.time()
        self.client = httpx.Client(base_url=url, timeout=30)

    def sign_in(self, email: str = EMAIL, password: str = PASSWORD) -> httpx.Response:
        response = self.client.post("/api/v1/auths/signin", json={"email": email, "password": password})
        self.client.cookies.clear()  # each request says who asks
        return response

    def token(self, email: str = EMAIL, password: str = PASSWORD) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.sign_in(email, password).json()['token']}"}

    def sign_up(self) -> int:
        account = {"name": "Stranger", "email": "stranger@example.com", "password": "password-of-a-stranger"}
        return self.client.post("/api/v1/auths/signup", json=account).status_code

    def add_user(self, admin: dict[str, str], role: str = "user") -> dict[str, str]:
        account = {"name": role, "email": f"{role}@example.com", "password": "password-of-a-user", "role": role}
        self.client.post("/api/v1/auths/add", headers=admin, json=account).raise_for_status()
        return self.token(account["email"], account["password"])

    def models(self, who: dict[str, str]) -> list[str]:
        return [model["id"] for model in self.client.get("/api/models", headers=who).json()["data"]]

    def chat(self, who: dict[str, str], **more: object) -> httpx.Response:
        """Ask as the page does: with a session, at which Open WebUI adds its tools."""
        body = {"model": MODEL, "messages": QUESTION, "stream": False, "session_id": "a-page", **more}
        return self.client.post("/api/chat/completions", headers=who, json=body)

    def called(self) -> set[str]:
        """Every address the process tried to reach by TCP or UDP, as strace saw it."""
        seen = self.trace.read_text(errors="replace")
        four = re.findall(r'sin_port=htons\((\d+)\), sin_addr=inet_addr\("([^"]+)"\)', seen)
        six = re.findall(r'sin6_port=htons\((\d+)\).*?inet_pton\(AF_INET6, "([^"]+)"', seen)
        return {f"{address}:{port}" for port, address in [*four, *six]}


@contextlib.contextmanager
def open_webui(venv: Path, directory: Path, variables: dict[str, str]) -> Iterator[Server]:
    """Run it in `directory` as the unit does, under strace; stopped when left."""
    port = _free_port()
    directory.mkdir(exist_ok=True)
    server = Server(f"http://127.0.0.1:{port}", directory)
    secrets = {"WEBUI_SECRET_KEY": "s" * 32, "WEBUI_ADMIN_PASSWORD": PASSWORD, "OPENAI_API_KEY": KEY}
    variables = {"PATH": os.environ["PATH"], "HOME": str(directory), **variables, **secrets}
    # -D: the program is our child and strace its companion, so that it is stopped as systemd would.
    strace = ["strace", "-D", "--follow-forks", "--seccomp-bpf", f"--output={server.trace}"]
    strace.append("--trace=connect,sendto,sendmmsg")
    serve = [str(venv / "bin" / "open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with server.log.open("w") as output:
        process = subprocess.Popen([*strace, *serve], cwd=directory, env=variables, stdout=output, stderr=output)
        try:
            _wait_until_ready(server, process)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, server.log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError, ValueError):
            if server.client.get("/ready").json() == {"status": True}:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready after {seconds:.0f} s: {server.log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def planned(engine: FakeOpenAI, directory: Path) -> dict[str, str]:
    """The plan's own environment for this engine, with its data in `directory`."""
    release = Release("open-webui", "0.12.4", "", "", "3.11", "system", False, "", "", (), "", "", "", 0, 0)
    model = Model(MODEL, "", "", "", MODEL, 270 << 20, "", "", "Paris")
    service = Service("vllm.service", (), 600)
    plan = EnginePlan("cpu", "0.32.0", "venv", "127.0.0.1", engine.port, release, model, service, {}, {}, 0, 0, 0)
    settings = Settings.model_validate({"webui_admin_email": EMAIL})
    return environment(settings, plan, Runtime(data_dir=str(directory), engine_host="127.0.0.1"))


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeOpenAI]:
    with fake_openai(KEY) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(venv: Path, engine: FakeOpenAI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Open WebUI as planned."""
    if not shutil.which("strace"):
        pytest.fail("strace is not installed (package strace): without it nobody sees what Open WebUI calls")
    directory = tmp_path_factory.mktemp("planned") / "data"
    with open_webui(venv, directory, planned(engine, directory)) as running:
        yield running


@pytest.fixture(scope="module")
def admin(server: Server) -> dict[str, str]:
    return server.token()


@pytest.fixture(scope="module")
def user(server: Server, admin: dict[str, str]) -> dict[str, str]:
    return server.add_user(admin)


# --- who may enter ---------------------------------------------------------------------------------------------------


def test_the_first_admin_signs_in_for_a_day_and_no_longer(server: Server) -> None:
    response = server.sign_in()
    assert response.status_code == 200
    assert response.json()["role"] == "admin"
    assert response.json()["expires_at"] == pytest.approx(time.time() + 24 * 3600, abs=60)
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie.replace("samesite", "")  # over plain HTTP a browser would drop it


def test_a_wrong_password_is_refused(server: Server) -> None:
    assert server.sign_in(password="not-" + PASSWORD).status_code == 400


def test_nobody_signs_up(server: Server) -> None:
    assert server.sign_up() == 403
    assert server.client.get("/api/config").json()["features"]["enable_signup"] is False


def test_without_a_token_nothing_is_told(server: Server) -> None:
    assert server.client.get("/api/models").status_code == 401
    assert server.client.post("/api/chat/completions", json={"model": MODEL, "messages": QUESTION}).status_code == 401


def test_an_ordinary_user_sees_and_uses_the_model(server: Server, user: dict[str, str]) -> None:
    assert server.models(user) == [MODEL]
    assert server.chat(user).json()["choices"][0]["message"]["content"] == ANSWER


def test_an_account_not_yet_let_in_sees_nothing(server: Server, admin: dict[str, str]) -> None:
    pending = server.add_user(admin, role="pending")
    assert server.client.get("/api/models", headers=pending).status_code == 401


def test_only_its_own_page_may_open_the_socket_of_a_chat(server: Server) -> None:
    # The plan names port 7860, whatever port this server was given.
    assert _open_socket(server, "http://localhost:7860") == 101
    assert _open_socket(server, "http://elsewhere.example") == 403


def _open_socket(server: Server, origin: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(server.url).port, timeout=30)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Origin": origin}
    with contextlib.closing(connection):
        nonce = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        connection.request("GET", "/ws/socket.io/?EIO=4&transport=websocket", headers=upgrade | nonce)
        return connection.getresponse().status


# --- the chat --------------------------------------------------------------------------------------------------------


def test_loading_the_page_never_asks_the_engine_for_its_models(
    server: Server, engine: FakeOpenAI, admin: dict[str, str]
) -> None:
    for path in ("/", "/api/config", "/api/v1/users/user/settings", "/api/v1/chats/", "/api/v1/models/"):
        assert server.client.get(path, headers=admin).is_success, path
    assert server.models(admin) == [MODEL]
    assert server.client.get("/api/config", headers=admin).json()["default_models"] == MODEL
    assert "GET /v1/models" not in engine.asked


@pytest.mark.parametrize("more", [{}, {"params": {"function_calling": "native"}}], ids=["default", "native asked"])
def test_a_chat_from_the_page_works_without_a_tool_parser(
    server: Server, engine: FakeOpenAI, admin: dict[str, str], more: dict[str, object]
) -> None:
    assert server.chat(admin, **more).json()["choices"][0]["message"]["content"] == ANSWER
    assert "tools" not in engine.bodies[-1]


def test_the_trial_model_is_asked_greedily(server: Server, engine: FakeOpenAI, admin: dict[str, str]) -> None:
    server.chat(admin)
    assert engine.bodies[-1]["temperature"] == 0


def test_a_reply_arrives_piece_by_piece(server: Server, engine: FakeOpenAI, admin: dict[str, str]) -> None:
    engine.rest_may_follow.clear()
    body = {"model": MODEL, "messages": QUESTION, "stream": True, "session_id": "a-page"}
    with server.client.stream("POST", "/api/chat/completions", headers=admin, json=body) as response:
        pieces = (_piece(line) for line in response.iter_lines() if line.startswith("data: {"))
        assert next(pieces) == PIECES[0]  # here while the engine still holds the rest back
        engine.rest_may_follow.set()
        assert "".join(pieces) == PIECES[1]


def _piece(line: str) -> str:
    choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


def test_the_page_gets_its_reply_over_the_socket_for_one_completion(
    server: Server, engine: FakeOpenAI, admin: dict[str, str], venv: Path
) -> None:
    before = len(engine.asked)
    token = admin["Authorization"].removeprefix("Bearer ")
    page = [str(venv / "bin" / "python"), str(Path(__file__).with_name("page_chat.py"))]
    page += [server.url, token, MODEL, "What is the capital of France?"]
    assert json.loads(subprocess.check_output(page, timeout=60)) == list(PIECES)
    assert engine.asked[before:] == ["POST /v1/chat/completions"]  # no title, tags or follow-ups on a CPU


def test_a_question_about_a_document_costs_one_completion_and_holds_its_text(
    server: Server, engine: FakeOpenAI, user: dict[str, str]
) -> None:
    note = ("note.txt", b"The secret word is kumquat.", "text/plain")
    file = server.client.post("/api/v1/files/", headers=user, files={"file": note}).json()
    before = len(engine.asked)
    reply = server.chat(user, files=[{"type": "file", "id": _processed(server, user, file["id"])}])
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER
    assert "kumquat" in json.dumps(engine.bodies[-1]["messages"])
    assert engine.asked[before:] == ["POST /v1/chat/completions"]


def _processed(server: Server, who: dict[str, str], file_id: str, seconds: float = 30) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = server.client.get(f"/api/v1/files/{file_id}", headers=who).json()["data"].get("status")
        assert state != "failed"
        if state == "completed":
            return file_id
        time.sleep(0.1)
    raise AssertionError(f"the file was not read within {seconds:.0f} s")


# --- nothing leaves the host, nothing is run on it -------------------------------------------------------------------


def test_no_setting_names_openai(server: Server, admin: dict[str, str], engine: FakeOpenAI) -> None:
    embedding = server.client.get("/api/v1/retrieval/embedding", headers=admin).json()
    assert embedding["openai_config"]["url"] == engine.url
    everything: dict[str, Any] = server.client.get("/api/v1/configs/export", headers=admin).json()
    assert len(everything) > 400
    assert [name for name, value in everything.items() if "api.openai.com" in json.dumps(value)] == []


def test_updates_are_not_looked_for(server: Server, admin: dict[str, str]) -> None:
    assert server.client.get("/api/version/updates", headers=admin).json() == {"current": "0.12.4", "latest": "0.12.4"}


def test_code_and_sharing_are_switched_off(server: Server, admin: dict[str, str]) -> None:
    features = server.client.get("/api/config", headers=admin).json()["features"]
    off = ["plugins", "tools", "functions", "tool_servers", "code_execution", "code_interpreter", "memories"]
    off += ["community_sharing", "version_update_check", "web_search", "image_generation", "direct_connections"]
    assert {name: features[f"enable_{name}"] for name in off} == dict.fromkeys(off, False)


def test_no_plugin_runs_on_the_host(server: Server, admin: dict[str, str]) -> None:
    assert _create_plugin(server, admin).is_client_error
    assert not (server.directory / "plugin-ran").exists()


def _create_plugin(server: Server, admin: dict[str, str]) -> httpx.Response:
    code = "import pathlib\npathlib.Path('plugin-ran').touch()\nclass Filter:\n    pass\n"
    function = {"id": "probe", "name": "probe", "content": code, "meta": {"description": "probe"}}
    return server.client.post("/api/v1/functions/create", headers=admin, json=function)


def test_the_api_is_not_described_to_strangers(server: Server) -> None:
    assert "json" not in server.client.get("/openapi.json").headers["content-type"]


def test_it_writes_only_into_its_data(server: Server, venv: Path) -> None:
    assert (server.directory / "webui.db").exists()
    assert (server.directory / "static" / "favicon.png").exists()
    files = (path for path in venv.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert [path for path in files if path.stat().st_mtime >= server.started] == []


def test_it_called_nothing_but_the_engine(server: Server, engine: FakeOpenAI, admin: dict[str, str]) -> None:
    server.chat(admin)
    assert server.called() == {f"127.0.0.1:{engine.port}"}


# --- the next start --------------------------------------------------------------------------------------------------


def test_a_changed_setting_takes_effect_at_the_next_start_and_accounts_stay(venv: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with fake_openai(KEY) as first, fake_openai(KEY) as second:
        with open_webui(venv, directory, planned(first, directory)) as server:
            assert server.chat(server.token()).is_success
            user = server.add_user(server.token())
        with open_webui(venv, directory, planned(second, directory)) as server:
            assert server.chat(server.token()).is_success
            assert server.models(user) == [MODEL]  # the session outlives the restart: the secret key is the same
            assert server.sign_up() == 403
        assert (len(first.bodies), len(second.bodies)) == (1, 1)


# --- the traps are there ---------------------------------------------------------------------------------------------


def test_with_the_defaults_every_one_of_these_goes_wrong(venv: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with fake_openai(KEY) as engine:
        variables = {**NAIVE, "DATA_DIR": str(directory), "OPENAI_API_BASE_URL": engine.url}
        variables["STATIC_DIR"] = str(directory / "static")  # or the venv shared by these tests would be changed
        with open_webui(venv, directory, variables) as server:
            admin = server.token()
            assert server.sign_up() == 403
            assert server.models(admin) == ["another-model"]  # whatever the engine lists
            assert engine.asked.count("GET /v1/models") > 0
            embedding = server.client.get("/api/v1/retrieval/embedding", headers=admin).json()
            assert embedding["openai_config"]["url"].startswith("https://api.openai.com")
            assert "tool choice" in server.chat(admin, model="another-model").text
            assert server.models(server.add_user(admin)) == []
            assert server.client.get("/openapi.json").headers["content-type"] == "application/json"
            assert _open_socket(server, "http://elsewhere.example") == 101
            assert _create_plugin(server, admin).is_success
            assert (directory / "plugin-ran").exists()
            assert any(address.endswith(":11434") for address in server.called())
        with open_webui(venv, directory, variables) as server:
            assert server.sign_up() == 200
