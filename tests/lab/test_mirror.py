"""The lab's mirror as its clients see it: hf, uv, apt, and plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import LabError
from lab.mirror import apt, hub, index, model, python_builds, web, wheelhouse

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
REPOSITORY = model.REPOSITORY
WEIGHTS_BYTES = 24_000_000  # hf writes in steps of 10 MiB, and resumes after the last one


@contextmanager
def serving(handler: Callable[..., web.Handler]) -> Iterator[str]:
    """The base address of a server that runs inside the block."""
    server = web.start("127.0.0.1", 0, handler)
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


# -- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> model.Repository:
    """A small repository: one text, and weights that the hub treats as an LFS file."""
    directory = tmp_path_factory.mktemp("repository")
    (directory / "config.json").write_text('{"model_type": "llama"}\n')
    (directory / "model.safetensors").write_bytes(random.Random(7).randbytes(WEIGHTS_BYTES))
    model.describe(directory)
    return model.read(directory)


@pytest.fixture
def hub_url(repository: model.Repository) -> Iterator[str]:
    with serving(partial(hub.HubHandler, hub.Hub(repository))) as url:
        yield url


def hf(hub_url: str, home: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub_url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [str(BIN / "hf"), *arguments]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)


def set_fault(hub_url: str, **fault: Any) -> None:
    httpx.post(f"{hub_url}/_fault", json=fault).raise_for_status()


def weights_url(hub_url: str, repository: model.Repository) -> str:
    return f"{hub_url}/{REPOSITORY}/resolve/{repository.revision}/model.safetensors"


def weights(repository: model.Repository) -> bytes:
    return repository.files["model.safetensors"].path.read_bytes()


def receive(answer: httpx.Response, into: bytearray) -> None:
    for chunk in answer.iter_raw():
        into += chunk


def asked_for_files(hub_url: str) -> list[list[Any]]:
    requests = httpx.get(f"{hub_url}/_requests").json()
    return [request for request in requests if request[0] == "GET" and "/resolve/" in request[1]]


def test_hf_downloads_and_verifies_the_pinned_revision(
    hub_url: str, repository: model.Repository, tmp_path: Path
) -> None:
    where = ("--revision", repository.revision, "--local-dir", str(tmp_path / "model"))
    downloaded = hf(hub_url, tmp_path / "home", "download", REPOSITORY, *where)
    assert downloaded.returncode == 0, downloaded.stderr
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights(repository)
    verified = hf(hub_url, tmp_path / "home", "cache", "verify", REPOSITORY, *where)
    assert verified.returncode == 0, verified.stderr
    before = len(asked_for_files(hub_url))
    again = hf(hub_url, tmp_path / "home", "download", REPOSITORY, *where)
    assert again.returncode == 0, again.stderr
    assert len(asked_for_files(hub_url)) == before


def test_hf_runs_again_without_the_hub(repository: model.Repository, tmp_path: Path) -> None:
    with serving(partial(hub.HubHandler, hub.Hub(repository))) as url:
        assert hf(url, tmp_path, "download", REPOSITORY, "--revision", repository.revision).returncode == 0
    offline = hf(url, tmp_path, "download", REPOSITORY, "--revision", repository.revision, offline=True)
    assert offline.returncode == 0, offline.stderr


def test_hf_refuses_a_revision_that_the_hub_lacks(hub_url: str, tmp_path: Path) -> None:
    refused = hf(hub_url, tmp_path, "download", REPOSITORY, "--revision", "0" * 40)
    assert refused.returncode != 0
    assert "Revision not found" in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/someone/else", "RepoNotFound"),
        ("/someone/else/resolve/main/config.json", "RepoNotFound"),
        (f"/api/models/{REPOSITORY}/revision/no-such", "RevisionNotFound"),
        (f"/{REPOSITORY}/resolve/main/no-such.json", "EntryNotFound"),
    ],
)
def test_what_the_hub_lacks_is_named_as_the_client_expects(hub_url: str, path: str, code: str) -> None:
    answer = httpx.get(hub_url + path)
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (HTTPStatus.NOT_FOUND, code)


def test_revision_is_made_of_the_files(repository: model.Repository, tmp_path: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", repository.revision)
    for name, file in repository.files.items():
        (tmp_path / name).write_bytes(file.path.read_bytes())
    model.describe(tmp_path)
    assert model.read(tmp_path).revision == repository.revision
    (tmp_path / "config.json").write_text("{}\n")
    (tmp_path / model.RECORD).unlink()
    model.describe(tmp_path)
    assert model.read(tmp_path).revision != repository.revision


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-9", 0, 9), ("bytes=23999990-", 23_999_990, 23_999_999), ("bytes=-5", 23_999_995, 23_999_999)],
)
def test_hub_sends_the_range_asked_for(
    hub_url: str, repository: model.Repository, asked: str, first: int, last: int
) -> None:
    answer = httpx.get(weights_url(hub_url, repository), headers={"Range": asked})
    assert answer.status_code == HTTPStatus.PARTIAL_CONTENT
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{WEIGHTS_BYTES}"
    assert answer.content == weights(repository)[first : last + 1]


def test_a_range_beyond_the_end_is_refused(hub_url: str, repository: model.Repository) -> None:
    answer = httpx.get(weights_url(hub_url, repository), headers={"Range": f"bytes={WEIGHTS_BYTES}-"})
    assert answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


def test_corrupt_flips_one_bit_once(hub_url: str, repository: model.Repository) -> None:
    set_fault(hub_url, corrupt=True)
    bad, good = (httpx.get(weights_url(hub_url, repository)).content for _ in range(2))
    assert len(bad) == WEIGHTS_BYTES
    assert (int.from_bytes(bad) ^ int.from_bytes(weights(repository))).bit_count() == 1
    assert good == weights(repository)


def test_status_is_answered_as_often_as_asked(hub_url: str, repository: model.Repository) -> None:
    set_fault(hub_url, status=503, times=2)
    assert [httpx.get(weights_url(hub_url, repository)).status_code for _ in range(3)] == [503, 503, 200]


def test_a_dropped_connection_ends_after_so_many_bytes(hub_url: str, repository: model.Repository) -> None:
    set_fault(hub_url, drop_after=1_000_000)
    received = bytearray()
    with httpx.stream("GET", weights_url(hub_url, repository)) as answer, pytest.raises(httpx.RemoteProtocolError):
        receive(answer, received)
    assert len(received) == 1_000_000
    assert received == weights(repository)[:1_000_000]


def test_hf_resumes_a_dropped_download(hub_url: str, repository: model.Repository, tmp_path: Path) -> None:
    set_fault(hub_url, drop_after=15_000_000)
    where = ("--revision", repository.revision, "--local-dir", str(tmp_path / "model"))
    downloaded = hf(hub_url, tmp_path / "home", "download", REPOSITORY, *where)
    assert downloaded.returncode == 0, downloaded.stderr
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights(repository)
    ranges = [request[2] for request in asked_for_files(hub_url) if request[1].endswith("model.safetensors")]
    assert ranges == ["", f"bytes={10 * 2**20}-"]


def test_rate_slows_the_download_down(hub_url: str, repository: model.Repository) -> None:
    set_fault(hub_url, rate=60_000_000)
    started = time.monotonic()
    assert httpx.get(weights_url(hub_url, repository)).content == weights(repository)
    assert time.monotonic() - started >= WEIGHTS_BYTES / 60_000_000


def test_faults_are_taken_back(hub_url: str, repository: model.Repository) -> None:
    set_fault(hub_url, status=503, times=100)
    set_fault(hub_url)
    assert httpx.get(weights_url(hub_url, repository)).status_code == HTTPStatus.OK


def test_an_unknown_fault_is_refused(hub_url: str) -> None:
    answer = httpx.post(f"{hub_url}/_fault", json={"explode": True})
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert "explode" in answer.json()["error"]


# -- index -----------------------------------------------------------------------------------------------------------


def make_wheel(directory: Path, name: str, version: str) -> wheelhouse.Wheel:
    """A wheel with one module, as a build backend writes it."""
    path = directory / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}.py": f'VERSION = "{version}"\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{member},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", record)
    return wheelhouse.Wheel(path, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def wheel(tmp_path: Path) -> wheelhouse.Wheel:
    return make_wheel(tmp_path, "lab_sample", "1.2.3")


@pytest.fixture
def index_url(wheel: wheelhouse.Wheel, tmp_path: Path) -> Iterator[str]:
    builds = python_builds.PythonBuilds(tmp_path / "nothing-prepared")
    with serving(partial(index.IndexHandler, index.Index([wheel]), builds)) as url:
        yield url


def uv_install(index_url: str, wheel: wheelhouse.Wheel, target: Path) -> subprocess.CompletedProcess[str]:
    lock = target.with_suffix(".txt")
    lock.write_text(f"lab-sample==1.2.3 --hash=sha256:{wheel.sha256}\n")
    command = [str(BIN / "uv"), "pip", "install", "--no-config", "--no-cache", "--require-hashes"]
    command += ["--only-binary", ":all:", "--default-index", f"{index_url}/simple/"]
    command += ["--python", sys.executable, "--target", str(target), "-r", str(lock)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_uv_installs_a_hashed_wheel(index_url: str, wheel: wheelhouse.Wheel, tmp_path: Path) -> None:
    installed = uv_install(index_url, wheel, tmp_path / "target")
    assert installed.returncode == 0, installed.stderr
    assert (tmp_path / "target/lab_sample.py").read_text() == 'VERSION = "1.2.3"\n'


def test_uv_refuses_an_altered_wheel(index_url: str, wheel: wheelhouse.Wheel, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel.path, "a") as archive:
        archive.writestr("lab_sample_extra.py", "import os\n")
    refused = uv_install(index_url, wheel, tmp_path / "target")
    assert refused.returncode != 0
    assert "Hash mismatch" in refused.stderr
    assert not (tmp_path / "target/lab_sample.py").exists()


def test_pip_finds_the_wheel_too(index_url: str, wheel: wheelhouse.Wheel, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"lab-sample==1.2.3 --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "--isolated", "download", "--require-hashes", "--no-deps", "--no-cache-dir"]
    command += ["--index-url", f"{index_url}/simple/", "--dest", str(tmp_path / "got"), "-r", str(lock)]
    downloaded = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert downloaded.returncode == 0, downloaded.stderr
    assert (tmp_path / "got" / wheel.path.name).read_bytes() == wheel.path.read_bytes()


def test_index_speaks_html_and_json(index_url: str, wheel: wheelhouse.Wheel) -> None:
    page = httpx.get(f"{index_url}/simple/lab-sample/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert f"{wheel.path.name}#sha256={wheel.sha256}" in page.text
    listing = httpx.get(f"{index_url}/simple/lab-sample/", headers={"Accept": index.JSON_TYPE})
    assert listing.headers["Content-Type"] == index.JSON_TYPE
    assert listing.json()["files"][0]["hashes"] == {"sha256": wheel.sha256}
    metadata = httpx.get(f"{index_url}/files/{wheel.path.name}.metadata")
    assert "Version: 1.2.3" in metadata.text


@pytest.mark.parametrize(
    "path", ["/simple/no-such-project/", "/files/..%2f..%2fetc%2fpasswd", "/python/builds.json", "/"]
)
def test_index_has_nothing_else(index_url: str, path: str) -> None:
    assert httpx.get(index_url + path).status_code == HTTPStatus.NOT_FOUND


# -- apt proxy -------------------------------------------------------------------------------------------------------


class Archive(web.Handler):
    """A distribution's archive: a folder, and what was asked of it."""

    def __init__(self, directory: Path, asked: list[str], *arguments: Any) -> None:
        self.directory, self.asked = directory, asked
        super().__init__(*arguments)

    def answer(self) -> None:
        self.asked.append(self.path)
        path = self.directory / self.path.lstrip("/")
        if not path.is_file():
            self.reply(HTTPStatus.NOT_FOUND, "no such file\n")
        elif path.name.startswith("torn"):
            self.begin(HTTPStatus.OK, {"Content-Length": str(path.stat().st_size)})
            self.wfile.write(path.read_bytes()[:-1])
            self.hang_up()
        elif self.headers.get("If-Modified-Since") == apt.last_modified(path):
            self.begin(HTTPStatus.NOT_MODIFIED, {"Content-Length": "0"})
        else:
            self.send_file(path, {"Last-Modified": apt.last_modified(path)})


class Site:
    """An archive with the proxy in front of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "archive"
        self.directory.mkdir()
        self.asked: list[str] = []
        self.archive = web.start("127.0.0.1", 0, partial(Archive, self.directory, self.asked))
        self.proxy = web.start("127.0.0.1", 0, partial(apt.AptHandler, apt.AptCache(directory / "cache")))
        self.url = f"http://127.0.0.1:{self.archive.server_address[1]}"
        self.proxy_url = f"http://127.0.0.1:{self.proxy.server_address[1]}"

    def put(self, path: str, content: bytes, modified: int = 1_700_000_000) -> None:
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        os.utime(file, (modified, modified))

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}/{path}", headers=headers, proxy=self.proxy_url)

    def take_archive_down(self) -> None:
        self.archive.shutdown()
        self.archive.server_close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.take_archive_down()
    site.proxy.shutdown()
    site.proxy.server_close()


APT_TOOLS = ("apt-get", "dpkg-deb", "gpg")
DEB = "debian/pool/main/h/hello/hello_1_all.deb"
INRELEASE = "debian/dists/stable/InRelease"


@pytest.mark.parametrize("path", [DEB, "debian/dists/stable/main/by-hash/SHA256/0123"])
def test_what_never_changes_is_fetched_once(site: Site, path: str) -> None:
    site.put(path, b"content")
    assert [site.get(path).content for _ in range(3)] == [b"content"] * 3
    assert len(site.asked) == 1
    site.take_archive_down()
    assert site.get(path).content == b"content"


def test_inrelease_is_revalidated_and_outlives_the_archive(site: Site) -> None:
    site.put(INRELEASE, b"old", modified=1_700_000_000)
    assert [site.get(INRELEASE).content for _ in range(2)] == [b"old", b"old"]
    assert len(site.asked) == 2
    site.put(INRELEASE, b"new", modified=1_700_000_060)
    assert site.get(INRELEASE).content == b"new"
    site.take_archive_down()
    assert site.get(INRELEASE).content == b"new"


def test_apt_is_told_when_its_own_copy_is_current(site: Site) -> None:
    site.put(INRELEASE, b"content")
    modified = site.get(INRELEASE).headers["Last-Modified"]
    assert site.get(INRELEASE, **{"If-Modified-Since": modified}).status_code == HTTPStatus.NOT_MODIFIED


def test_apt_resumes_from_the_cache(site: Site) -> None:
    site.put(DEB, b"0123456789")
    site.get(DEB)
    rest = site.get(DEB, Range="bytes=4-")
    assert (rest.status_code, rest.content) == (HTTPStatus.PARTIAL_CONTENT, b"456789")


def test_many_hosts_at_once_make_one_download(site: Site) -> None:
    content = random.Random(1).randbytes(2_000_000)
    site.put(DEB, content)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: site.get(DEB).content, range(8)))
    assert answers == [content] * 8
    assert len(site.asked) == 1


def test_a_torn_download_is_not_kept(site: Site) -> None:
    torn = "debian/pool/main/t/torn_1_all.deb"
    site.put(torn, b"0123456789")
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            site.get(torn)
    assert len(site.asked) == 2


def test_what_the_archive_lacks_is_not_found(site: Site) -> None:
    assert site.get("debian/pool/main/n/none_1_all.deb").status_code == HTTPStatus.NOT_FOUND


def test_what_is_not_cached_fails_at_once_when_the_archive_is_down(site: Site) -> None:
    site.take_archive_down()
    answer = site.get(DEB)
    assert answer.status_code == HTTPStatus.GATEWAY_TIMEOUT
    assert "is not in the lab's cache" in answer.text


@pytest.mark.parametrize("path", ["", "index.html", "api/secrets"])
def test_the_proxy_is_no_way_to_the_internet(site: Site, path: str) -> None:
    assert site.get(path).status_code == HTTPStatus.FORBIDDEN
    assert site.asked == []


@pytest.mark.parametrize("path", ["dists/../../../x.deb", "dists/%2e%2e/%2e%2e/%2e%2e/x.deb"])
def test_the_proxy_writes_in_its_cache_alone(site: Site, tmp_path: Path, path: str) -> None:
    with socket.create_connection(("127.0.0.1", site.proxy.server_port)) as client:
        client.sendall(f"GET {site.url}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b" 403 " in client.recv(65536).split(b"\r\n")[0]
    assert list(tmp_path.rglob("x.deb")) == []


def test_https_is_refused(site: Site) -> None:
    with pytest.raises(httpx.ProxyError, match="403"):
        httpx.get("https://archive.example/dists/InRelease", proxy=site.proxy_url)


def clearsign(text: str, home: Path, public_key: Path) -> bytes:
    """`text` signed by a key made for it, whose public half is written to `public_key`."""
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"]
    subprocess.run([*gpg, "--quick-gen-key", "Lab <lab@example>", "ed25519", "sign"], check=True, capture_output=True)
    exported = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True).stdout
    public_key.write_bytes(exported)
    signed = subprocess.run([*gpg, "--clearsign"], input=text.encode(), check=True, capture_output=True).stdout
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True, capture_output=True)
    return signed


@pytest.mark.skipif(not all(map(shutil.which, APT_TOOLS)), reason=f"needs {', '.join(APT_TOOLS)}")
def test_apt_itself_updates_and_downloads_offline(site: Site, tmp_path: Path) -> None:
    tree = tmp_path / "hello/DEBIAN"
    tree.mkdir(parents=True)
    control = "Package: lab-hello\nVersion: 1\nArchitecture: all\nMaintainer: lab <lab@example>\nDescription: hello\n"
    (tree / "control").write_text(control)
    (site.directory / "pool").mkdir()
    deb = site.directory / "pool/lab-hello_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree.parent), str(deb)], check=True, capture_output=True)
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    packages = f"{control}Filename: pool/{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n\n".encode()
    site.put("dists/stable/main/binary-all/Packages", packages)
    listing = f" {hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-all/Packages\n"
    date = "Tue, 14 Nov 2023 22:13:20 UTC"
    release = f"Suite: stable\nComponents: main\nArchitectures: all\nDate: {date}\nSHA256:\n{listing}"
    key = tmp_path / "key.asc"
    site.put("dists/stable/InRelease", clearsign(release, tmp_path / "gpg", key))

    def apt_get(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        for folder in ("lists/partial", "cache/archives/partial", "down"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        (home / "sources.list").write_text(f"deb [signed-by={key} arch=all] {site.url} stable main\n")
        settings = {
            "Acquire::http::Proxy": site.proxy_url,
            "APT::Update::Error-Mode": "any",
            "APT::Sandbox::User": "root",
            "Dir::Etc": str(home),
            "Dir::Etc::SourceList": str(home / "sources.list"),
            "Dir::State::Lists": str(home / "lists"),
            "Dir::State::Status": str(home / "status"),
            "Dir::Cache": str(home / "cache"),
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        command = ["apt-get", "-q", *options, *arguments]
        return subprocess.run(command, cwd=home / "down", check=False, capture_output=True, text=True, timeout=60)

    for number, home in enumerate((tmp_path / "first", tmp_path / "second")):
        updated = apt_get(home, "update")
        assert updated.returncode == 0, updated.stderr
        downloaded = apt_get(home, "download", "lab-hello")
        assert downloaded.returncode == 0, downloaded.stderr
        assert (home / "down" / deb.name).read_bytes() == deb.read_bytes()
        if number == 0:
            site.take_archive_down()


# -- the whole process -----------------------------------------------------------------------------------------------


def mirror(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lab.mirror", *arguments]


def test_serving_an_empty_cache_says_what_to_run(tmp_path: Path) -> None:
    command = mirror("serve", "--bind", "127.0.0.1", "--cache", str(tmp_path))
    refused = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "run `python -m lab.mirror prepare`" in refused.stderr
    assert refused.stdout == ""


@pytest.mark.lab
def test_a_killed_prepare_leaves_nothing_that_could_be_taken_for_complete(tmp_path: Path) -> None:
    command = mirror("prepare", "--cache", str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        while "fetching" not in process.stdout.readline():
            pass
        os.killpg(process.pid, signal.SIGKILL)  # its pips too
    assert [path for path in tmp_path.glob("*/*") if ".partial-" not in path.name] == []
    with pytest.raises(LabError, match=r"run `python -m lab\.mirror prepare`"):
        wheelhouse.load(tmp_path)


@pytest.fixture(scope="module")
def announced() -> Iterator[dict[str, Any]]:
    """What a mirror over the real cache announces; prepared first, which takes a minute where the cache is empty."""
    subprocess.run(mirror("prepare", "--python-builds"), cwd=ROOT, check=True, timeout=900)
    address = f"127.{random.randrange(2, 250)}.{random.randrange(250)}.{random.randrange(2, 250)}"
    command = mirror("serve", "--bind", address)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield {**json.loads(process.stdout.readline()), "address": address}
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0


@pytest.mark.lab
def test_a_second_prepare_takes_no_time(announced: dict[str, Any]) -> None:
    started = time.monotonic()
    subprocess.run(mirror("prepare", "--python-builds"), cwd=ROOT, check=True, timeout=60)
    assert time.monotonic() - started < 1.5


@pytest.mark.lab
def test_the_mirror_listens_on_its_address_alone(announced: dict[str, Any]) -> None:
    listening = subprocess.run(["ss", "-Hltn"], check=True, capture_output=True, text=True).stdout
    for port in (8900, 8901, 8902, 3142):
        assert f"{announced['address']}:{port} " in listening
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.255.255.254", port), timeout=5)


@pytest.mark.lab
def test_a_second_mirror_on_the_same_address_says_what_is_wrong(announced: dict[str, Any]) -> None:
    command = mirror("serve", "--bind", announced["address"])
    refused = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert f"cannot listen on {announced['address']} port 8900" in refused.stderr


@pytest.mark.lab
@pytest.mark.parametrize("lock", wheelhouse.locks(), ids=lambda lock: lock.name)
def test_the_index_has_every_wheel_of_every_lock(announced: dict[str, Any], lock: Path, tmp_path: Path) -> None:
    command = [str(BIN / "uv"), "pip", "install", "--dry-run", "--no-config", "--no-cache", "--require-hashes"]
    command += ["--no-deps", "--only-binary", ":all:", "--default-index", announced["settings"]["mirror_python_index"]]
    command += ["--python-version", "3.11", "--python", sys.executable, "--target", str(tmp_path), "-r", str(lock)]
    resolved = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert resolved.returncode == 0, resolved.stderr
    assert f"Would install {wheelhouse.distributions(lock)} package" in resolved.stderr


@pytest.mark.lab
def test_the_hub_announces_the_revision_it_holds(announced: dict[str, Any]) -> None:
    settings = announced["settings"]
    info = httpx.get(f"{settings['mirror_hub']}/api/models/{REPOSITORY}/revision/{settings['model_revision']}").json()
    assert info["sha"] == settings["model_revision"]
    assert "model.safetensors" in {sibling["rfilename"] for sibling in info["siblings"]}


@pytest.mark.lab
def test_uv_installs_a_working_python(announced: dict[str, Any], tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "UV_PYTHON_DOWNLOADS_JSON_URL": announced["settings"]["mirror_python_builds_index"],
        "UV_PYTHON_INSTALL_DIR": str(tmp_path / "pythons"),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    uv = [str(BIN / "uv"), "--no-config"]
    subprocess.run([*uv, "python", "install", "--no-bin", "3.11"], env=environment, check=True, timeout=120)
    venv = [*uv, "venv", "--managed-python", "--no-python-downloads", "--python", "3.11", str(tmp_path / "venv")]
    subprocess.run(venv, env=environment, check=True, timeout=60)
    program = (
        "import sys, ssl, sqlite3, ctypes, lzma, bz2, zlib, uuid, sysconfig, pathlib\n"
        "assert pathlib.Path(sysconfig.get_path('include'), 'Python.h').exists()\n"
        "print(sys.version_info[:2], sys.base_prefix)"
    )
    run = [str(tmp_path / "venv/bin/python"), "-c", program]
    printed = subprocess.run(run, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed.startswith(f"(3, 11) {tmp_path}/pythons/")
