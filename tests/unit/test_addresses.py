"""Every address is a setting; and the pure half of mirrors: proxies, the archive, the files that settings name."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.trust import CERTIFICATES, CONFIGURATION, UPDATER, Change, Seen, TrustLook, change_of
from llmhost import addresses, local_files
from llmhost.addresses import (
    COMPONENTS,
    DISTRIBUTIONS,
    OWN_LISTS,
    SOURCES,
    NoArchive,
    archive,
    environment,
    repositories,
)
from llmhost.catalogue import ROOT
from llmhost.local_files import Unusable, certificates, public_key
from llmhost.plan.model import BasePlan
from llmhost.render import render
from llmhost.settings import Layer, Settings, load
from tests.lab.far_side import Authority

# --- no step needs an address that is not a setting -------------------------------------------------------------

PLACES = ("deploy.py", "upgrade.py", "tasks/*.py", "infra/*.py", "llmhost/**/*.py", "runtime/*", "templates/**/*.j2")
DEFAULTS = "llmhost/settings.py"  # where addresses belong
ADDRESS = re.compile(
    r"https?://(?!127\.0\.0\.1|\[::1\]|[{$<]|[a-z.]+\.example\b)[\w.-]+|\b(?:[a-z0-9-]+\.)+(?:com|org|net|io|cn|ai|dev|co)\b"
)
_REASON = "a reason in words: the default that the setting beside it replaces"
# What looks like an address and is none, by the one file that may say it ("" for any).
NO_ADDRESS = {
    ("", "nvidia.com"): "the vendor's part of a device's name in CDI (nvidia.com/gpu=all)",
    ("templates/etc/systemd/system/open-webui.service.j2", "https://docs.openwebui.com"): "Documentation=, for people",
    ("llmhost/plan/containers.py", "docker.io"): "the name of Debian's and Ubuntu's package",
    ("llmhost/plan/containers.py", "containerd.io"): "the name of a package of Docker's",
    ("llmhost/plan/webui.py", "api.openai.com"): _REASON,
    ("llmhost/plan/webui.py", "api.github.com"): _REASON,
    ("llmhost/plan/webui.py", "openwebui.com"): _REASON,
}


def spoken(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that a program acts on: no comments, no docstrings."""
    text = path.read_text()
    if path.suffix == ".py" or text.startswith("#!/usr/bin/env python3"):
        tree = ast.parse(text)
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for string in strings:
            if id(string) not in docstrings:
                yield from uncommented(str(string.value), string.lineno)
    else:
        yield from uncommented(text, 1)


def uncommented(text: str, first: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), first):
        if not re.match(r"\s*(#|//)", line):
            yield number, re.sub(r"\s#\s.*", "", line)


def found(path: Path, excepted: bool = True) -> list[str]:
    """Addresses in a file, with their lines."""
    place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [
        f"{place}:{number}: {match[0]}"
        for number, line in spoken(path)
        for match in ADDRESS.finditer(line)
        if not (excepted and NO_ADDRESS.keys() & {("", match[0]), (place, match[0])})
    ]


def files() -> list[Path]:
    listed = sorted({path for place in PLACES for path in ROOT.glob(place) if path.is_file()})
    return [path for path in listed if path.relative_to(ROOT).as_posix() != DEFAULTS]


def test_no_step_needs_an_address_that_is_not_a_setting() -> None:
    assert len(files()) > 40
    assert [hit for path in files() for hit in found(path)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", 'fetch("https://mirror.somewhere/x")'),
        ("a.py", 'pin = "origin developer.download.nvidia.com"'),
        ("a.py", 'def f(url):\n    """https://documented.com"""\n    return f"{url}" or "huggingface.co"'),
        ("a.py", 'PROGRAM = """\nset -e\ncurl https://get.docker.com\n"""'),
        ("a.sh", "curl -s http://169.254.169.254/meta-data"),
        ("a.j2", "[Service]\nEnvironment=HF_ENDPOINT=https://huggingface.co"),
        ("program", "#!/usr/bin/env python3\nimport os\nos.system('curl example.org')"),
    ],
)
def test_an_address_is_caught(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert len(found(tmp_path / name)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", '"""See https://documented.com"""\n# and https://explained.org\nurl = f"http://127.0.0.1:{8000}/v1"'),
        ("a.py", 'raise ValueError("expected a URL such as https://mirror.example/simple/")'),
        ("a.j2", "# https://explained.org\nURIs: {{ archive.uri }}"),
        ("a.sh", "echo x # https://explained.org"),
    ],
)
def test_what_is_only_said_is_not_caught(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert found(tmp_path / name) == []


@pytest.mark.parametrize(("place", "word"), NO_ADDRESS)
def test_each_exception_is_needed(place: str, word: str) -> None:
    paths = [ROOT / place] if place else files()
    assert any(hit.endswith(f" {word}") for path in paths for hit in found(path, excepted=False))


# --- docs/mirrors.md --------------------------------------------------------------------------------------------

DOCUMENT = (ROOT / "docs/mirrors.md").read_text()


def test_the_document_lists_every_address_as_the_schema_has_it() -> None:
    assert "\n".join(addresses.table()) in DOCUMENT
    named = [
        name for name in Settings.model_fields if name.startswith(("mirror_", "proxy_")) or name == "ca_certificate"
    ]
    assert [row.split("`")[1] for row in addresses.table()[2:]] == named


def test_each_example_of_the_document_loads(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(examples) >= 3
    for number, text in enumerate(examples):
        file = tmp_path / f"example{number}.py"
        file.write_text(text)
        values = {name: value for name, value in runpy.run_path(str(file)).items() if not name.startswith("__")}
        assert values
        loaded = load([Layer("docs/mirrors.md", values)])
        assert all(addresses.is_address(name) and loaded.source(name) == "docs/mirrors.md" for name in values)


# --- proxies and trust ------------------------------------------------------------------------------------------

BASE = BasePlan(
    packages=(), apt_archive="", apt_security="", apt_components=(), proxies={}, ca_certificate="", python_index="",
    torch_index="", python_builds="", python_builds_index="", hub="",
)  # fmt: skip
PROXIES = {
    "http_proxy": "http://proxy.example:3128",
    "no_proxy": "localhost,127.0.0.1,::1,.corp.example,10.0.0.0/8,hub.example",
}


def test_without_proxies_or_ca_programs_keep_their_environment() -> None:
    assert environment(BASE) == {}


def test_a_planned_proxy_leaves_nothing_of_a_login_shells() -> None:
    told = environment(replace(BASE, proxies=PROXIES))
    assert (told["http_proxy"], told["HTTP_PROXY"]) == ("http://proxy.example:3128",) * 2
    assert {told[name] for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")} == {""}
    assert "SSL_CERT_FILE" not in told


def test_programs_that_bring_their_own_certificates_use_the_hosts() -> None:
    told = environment(replace(BASE, ca_certificate="/ca.pem"))
    assert {told["SSL_CERT_FILE"], told["REQUESTS_CA_BUNDLE"]} == {"/etc/ssl/certs/ca-certificates.crt"}
    assert "http_proxy" not in told


def configuration(**changes: Any) -> str:
    base = replace(BASE, **changes)
    return render(CONFIGURATION, proxies=base.proxies, direct=addresses.direct_hosts(base.proxies))


def test_apt_retries_and_is_not_held_up_on_every_host() -> None:
    assert 'Acquire::Retries "3";\nAcquire::http::Timeout "20";' in configuration()
    assert "Proxy" not in configuration()


def test_apt_takes_the_planned_proxy_and_reaches_bypassed_hosts_directly() -> None:
    text = configuration(proxies=PROXIES)
    assert 'Acquire::http::Proxy "http://proxy.example:3128";\nAcquire::https::Proxy "DIRECT";' in text
    assert re.findall(r"https::Proxy::(\S+) ", text) == ["localhost", "127.0.0.1", "hub.example"]


# --- the distribution's archive ---------------------------------------------------------------------------------

UBUNTU = """\
Types: deb
URIs: http://one.example/ubuntu/
Suites: noble noble-updates noble-backports
Components: main universe
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg

## security
Types: deb
URIs: http://two.example/ubuntu/
Suites: noble-security
Components: main universe
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg
"""
DEBIAN = """\
# deb cdrom:[Debian]/ bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://one.example/debian bookworm main contrib
deb-src http://one.example/debian bookworm main
deb http://two.example/debian-security bookworm-security main non-free-firmware # updates
"""
MIRRORED = replace(BASE, apt_archive="http://m.example/debian", apt_security="http://m.example/debian-security")


def keyring(system: str) -> str:
    return DISTRIBUTIONS[system].keyrings[0]


def test_ubuntus_archive_has_what_drivers_need_and_the_suites_that_the_host_had() -> None:
    made = archive(replace(BASE, apt_archive="http://m.example/ubuntu"), "ubuntu", "noble", {OWN_LISTS[2]: UBUNTU}, [])
    assert made.components == ("main", "restricted", "universe", "multiverse")
    assert made.suites == ("noble", "noble-updates", "noble-backports")
    assert (made.uri, made.security_uri, made.security_suite) == ("http://m.example/ubuntu",) * 2 + ("noble-security",)
    assert made.keyring == keyring("ubuntu")


def test_debians_archive_keeps_the_components_that_the_host_had() -> None:
    made = archive(MIRRORED, "debian", "bookworm", {OWN_LISTS[0]: DEBIAN}, [])
    assert made.components == ("main", "contrib", "non-free-firmware")
    assert made.suites == ("bookworm", "bookworm-updates")
    assert made.security_uri == "http://m.example/debian-security"


def test_what_is_written_reads_back_as_what_was_meant() -> None:
    made = archive(MIRRORED, "debian", "bookworm", {OWN_LISTS[0]: DEBIAN}, [])
    first, second = repositories(SOURCES, render(SOURCES, archive=made))
    assert (first.uris, first.suites, first.components) == ((made.uri,), made.suites, made.components)
    assert (second.uris, second.suites, second.signed_by) == (
        (made.security_uri,),
        ("bookworm-security",),
        made.keyring,
    )


def test_a_disabled_entry_counts_for_nothing() -> None:
    assert repositories(SOURCES, UBUNTU.replace("Types: deb\n", "Types: deb\nEnabled: no\n", 1))[0].suites == (
        "noble-security",
    )
    assert [entry.suites for entry in repositories(OWN_LISTS[0], DEBIAN)] == [("bookworm",), ("bookworm-security",)]


# A cloud image's own list, and a one-line list without a key.
CLOUD = """\
Types: deb deb-src
URIs: mirror+file:///etc/apt/mirrors/debian.list
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: mirror+file:///etc/apt/mirrors/debian-security.list
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
CONTRIB = replace(BASE, apt_components=("contrib",))


def test_a_component_that_the_hosts_lists_leave_out_is_added_beside_them() -> None:
    first = bare({OWN_LISTS[1]: CLOUD})
    change = change_of(CONTRIB, [], first)
    assert (change.disable, change.restore) == ((), ())
    archived, security = repositories(COMPONENTS, change.write[COMPONENTS])
    assert archived.uris == ("mirror+file:///etc/apt/mirrors/debian.list",)
    assert (archived.suites, archived.components) == (("bookworm", "bookworm-updates"), ("contrib",))
    assert (archived.signed_by, security.signed_by) == ("", "/usr/share/keyrings/debian-archive-keyring.gpg")
    assert security.suites == ("bookworm-security",)
    second = seen(change, first)
    assert change_of(CONTRIB, [], second).is_none
    undone = change_of(BASE, [], second)
    assert (undone.write, undone.remove) == ({}, (COMPONENTS,))


def test_a_component_that_is_there_is_not_added() -> None:
    change = change_of(CONTRIB, [], bare({OWN_LISTS[0]: DEBIAN.replace("-security main", "-security main contrib")}))
    assert COMPONENTS not in change.write
    assert change_of(CONTRIB, [], bare({})).write.keys() == {CONFIGURATION}
    by_line = bare(
        {OWN_LISTS[0]: "deb http://one.example/debian bookworm main\ndeb http://one.example/debian bookworm contrib\n"}
    )
    assert COMPONENTS not in change_of(CONTRIB, [], by_line).write


def test_a_planned_archive_has_the_component_itself() -> None:
    base = replace(MIRRORED, apt_components=("contrib",))
    first = bare({OWN_LISTS[1]: CLOUD})
    assert archive(base, "debian", "bookworm", {OWN_LISTS[1]: CLOUD}, [keyring("debian")]).components == (
        "main",
        "contrib",
    )
    assert COMPONENTS not in change_of(base, [], first).write
    before = seen(change_of(CONTRIB, [], first), first)
    moved = change_of(base, [], before)
    assert COMPONENTS in moved.remove
    back = change_of(CONTRIB, [], seen(moved, before))
    assert COMPONENTS in back.write


@pytest.mark.parametrize(
    ("system", "codename", "keyrings", "words"),
    [
        ("fedora", "", (), "no archive is known for fedora"),
        ("debian", "bookworm", (), "the host has none of /usr/share/keyrings/debian-archive-keyring.gpg"),
    ],
)
def test_a_host_without_archive_or_keyring_is_told_so(system: str, codename: str, keyrings: Any, words: str) -> None:
    with pytest.raises(NoArchive, match=words):
        archive(MIRRORED, system, codename, {}, keyrings)


# --- what is changed on a host (the look itself, and the change, run in tests/lab/test_mirrors.py) --------------------


def seen(change: Change, before: Seen) -> Seen:
    """What a look finds after a change, were it done as announced."""
    after = replace(before, files=dict(before.files), lists=dict(before.lists))
    for path, content in change.write.items():
        after.files[path] = local_state(content)
    for path in change.remove:
        after.files.pop(path)
    for path in change.disable:
        after.lists[path + ".disabled"] = after.lists.pop(path)
    for path in change.restore:
        after.lists[path] = after.lists.pop(path + ".disabled")
    after.lists.pop(SOURCES, None)
    if SOURCES in after.files:
        text = change.write.get(SOURCES) or "\n".join(before.lists[SOURCES])
        after.lists[SOURCES] = text.splitlines()
    if change.rebuild_store:
        after.trusted = after.linked = {path for path in after.files if path.startswith(CERTIFICATES)}
    return after


def local_state(content: str) -> str:
    from hashlib import sha256

    return f"644:root:root {sha256(content.encode()).hexdigest()}"


def bare(lists: Mapping[str, str]) -> Seen:
    had = {path: text.splitlines() for path, text in lists.items()}
    return Seen("debian", "bookworm", {}, had, [keyring("debian")], set(), set(), updater=True)


def test_a_second_look_at_what_was_changed_finds_nothing_to_do_and_unsetting_undoes_it() -> None:
    first = bare({OWN_LISTS[0]: DEBIAN})
    change = change_of(MIRRORED, ["certificate"], first)
    assert (change.disable, change.rebuild_store) == ((OWN_LISTS[0],), True)
    second = seen(change, first)
    assert change_of(MIRRORED, ["certificate"], second).is_none
    undone = change_of(BASE, [], second)
    assert (undone.restore, undone.rebuild_store) == ((OWN_LISTS[0],), True)
    assert set(undone.remove) == {SOURCES, f"{CERTIFICATES}/llmhost.crt"}
    third = seen(undone, second)
    assert third.lists == first.lists
    assert change_of(BASE, [], third).is_none


def test_a_run_that_died_before_the_lists_were_renamed_is_taken_up() -> None:
    first = bare({OWN_LISTS[0]: DEBIAN})
    whole = change_of(MIRRORED, [], first)
    died = seen(replace(whole, disable=()), first)
    resumed = change_of(MIRRORED, [], died)
    assert (resumed.write, resumed.disable) == ({}, (OWN_LISTS[0],))


def test_a_run_that_died_before_the_store_was_rebuilt_is_taken_up() -> None:
    first = bare({})
    died = seen(replace(change_of(BASE, ["one"], first), rebuild_store=False), first)
    assert change_of(BASE, ["one"], died).rebuild_store
    removed = replace(seen(change_of(BASE, ["one"], first), first), files={CONFIGURATION: local_state(configuration())})
    assert change_of(BASE, [], removed).rebuild_store


def test_a_list_that_somebody_else_disabled_is_left_so() -> None:
    assert change_of(BASE, [], bare({f"{OWN_LISTS[0]}.disabled": DEBIAN})).restore == ()


def test_several_certificates_get_a_file_each() -> None:
    """update-ca-certificates links one certificate a file; of more, programs that look up links see none."""
    change = change_of(BASE, ["one", "two"], bare({}))
    assert [path for path in change.write if path.startswith(CERTIFICATES)] == [
        f"{CERTIFICATES}/llmhost.crt",
        f"{CERTIFICATES}/llmhost-2.crt",
    ]


def test_a_host_without_ca_certificates_trusts_the_ca_alone_until_it_has_them() -> None:
    change = change_of(BASE, ["one\n", "two\n"], replace(bare({}), updater=False))
    assert "one\ntwo\n" in change.write.values()
    assert not change.rebuild_store
    assert [path for path in change.write if "bootstrap" in path] == [
        "/etc/apt/llmhost-bootstrap.pem",
        "/etc/apt/apt.conf.d/96llmhost-bootstrap",
    ]


def test_the_look_is_read_as_the_host_prints_it() -> None:
    output = [
        "system debian bookworm",
        f"file {SOURCES} 644:root:root",
        f"sum {'a' * 64}  {SOURCES}",
        f"list {SOURCES}",
    ]
    output += [
        f"line {SOURCES} # disabled: {OWN_LISTS[0]}",
        f"line {SOURCES} ",
        f"trusted {CERTIFICATES}/llmhost.crt",
        "updater",
    ]
    look = TrustLook.process(TrustLook.__new__(TrustLook), output)
    assert look.files == {SOURCES: f"644:root:root {'a' * 64}"}
    assert look.lists == {SOURCES: [f"# disabled: {OWN_LISTS[0]}", ""]}
    assert (look.system, look.updater, look.trusted) == ("debian", True, {f"{CERTIFICATES}/llmhost.crt"})
    assert UPDATER in str(TrustLook.__new__(TrustLook).command())


# --- files on this machine --------------------------------------------------------------------------------------


def test_a_ca_is_taken_with_each_of_its_certificates(tmp_path: Path) -> None:
    one, two = Authority(tmp_path, "One").certificate, Authority(tmp_path, "Two").certificate
    both = tmp_path / "both.pem"
    both.write_text("# ours\r\n" + one.read_text().replace("\n", "\r\n") + two.read_text())
    assert certificates(str(both)) == (one.read_text(), two.read_text())


def refused(path: Path | str) -> str:
    (problem,) = local_files.problems(load([Layer("group_data/all.py", {"ca_certificate": str(path)})]))
    assert (problem.setting, problem.source) == ("ca_certificate", "group_data/all.py")
    assert "PEM certificate of the CA" in problem.remedy
    return problem.message


def test_what_is_no_ca_certificate_is_refused_with_the_reason(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    pem = Authority(tmp_path, "Good").certificate.read_bytes()
    private = pem + b"-----BEGIN PRIVATE KEY-----\n"
    assert "there is no file" in refused(tmp_path / "none.pem")
    assert "cannot be read" in refused(tmp_path)
    assert "holds no certificate that can be read: expected PEM" in refused(file("page", b"<html>"))
    assert "looks like DER" in refused(file("der", b"0\x82\x01"))
    assert "holds no certificate" in refused(file("cut", pem[: len(pem) // 2]))
    assert "a private key" in refused(file("private", private))
    assert "not a whole bundle" in refused(file("bundle", pem * 200))
    expired = Authority(tmp_path, "Old", days=-1).certificate
    assert re.search(r"CN=Old expired on \d{4}-", refused(expired))
    assert "CN=Server is no CA's" in refused(Authority(tmp_path, "Server", is_ca=False).certificate)
    assert "CN=Old expired" in refused(file("mixed", pem + expired.read_bytes()))


def test_a_certificate_of_the_future_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="begins on"):
        certificates(str(Authority(tmp_path).certificate), datetime.now(UTC) - timedelta(days=60))


@pytest.mark.parametrize("setting", local_files.key_settings())
def test_a_key_file_that_is_missing_or_no_key_is_refused_by_its_setting(setting: str, tmp_path: Path) -> None:
    page = tmp_path / "key.asc"
    page.write_text("<html>not found</html>")
    for path, words in ((tmp_path / "none.asc", "there is no file"), (page, "is no OpenPGP public key")):
        (problem,) = local_files.problems(load([Layer("home.py, host box", {setting: str(path)})]))
        assert (problem.setting, problem.source) == (setting, "home.py, host box")
        assert words in problem.message
        assert '"vendor"' in problem.remedy


def test_a_private_key_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key.asc"
    for data in (b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQ==\n-----END", b"\x95\x01\x02"):
        key.write_bytes(data)
        with pytest.raises(Unusable, match="holds a private key"):
            public_key(str(key))


def test_nothing_set_reads_no_file() -> None:
    assert local_files.problems(load([])) == ()
