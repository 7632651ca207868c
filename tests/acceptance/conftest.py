"""Which hosts are proven, what is seen on them (once per host, all hosts at once), and what is written about it.

    pytest tests/acceptance --inventory inventories/home.py [--limit HOST] [--data KEY=VALUE]

Exit 0: every check of every host passed. 1: a check failed. 2: something could not run.
"""

from __future__ import annotations

import json
import shlex
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import testinfra

from llmhost import certificate
from llmhost.checks import checks, figures, simulated, unreachable
from llmhost.evidence import Check, Evidence, Result, evaluate
from llmhost.verify import Connection, Target, read_targets

CONNECT_SECONDS = 10
HOSTS_AT_ONCE = 32


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmhost", "which hosts to prove")
    group.addoption("--inventory", help="a pyinfra inventory: inventories/home.py")
    group.addoption("--limit", action="append", default=[], help="only this host or group; repeatable")
    group.addoption("--data", action="append", default=[], metavar="KEY=VALUE", help="a setting; repeatable")
    group.addoption("--targets", type=Path, help="hosts and plans as JSON, instead of --inventory (llmhost/verify.py)")
    group.addoption("--reports", type=Path, default=Path("reports"), help="where certificates are written")


@dataclass
class Sight:
    """What one look at one host came to: a result for every check of its plan."""

    started: datetime
    finished: datetime
    results: dict[str, Result]  # by the check's id
    figures: dict[str, float]
    simulated: list[str]  # the host's stand-ins; nothing on a real one, and of one nobody could look at


TARGETS = pytest.StashKey[list[Target]]()
SIGHTS = pytest.StashKey[dict[str, Sight]]()  # by host
ASKED = pytest.StashKey[list[Result]]()  # of the tests that ran: -k may choose some


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config.option, "targets"):
        return  # collected within a wider run (pytest tests): no host was named, nothing is proven
    config.stash[SIGHTS], config.stash[ASKED] = {}, []
    try:
        config.stash[TARGETS] = chosen(config)
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing was proven
        pytest.exit(f"cannot tell which hosts to prove: {error}", returncode=2)
    if not config.stash[TARGETS]:
        pytest.exit("no host to prove: see the inventory and --limit", returncode=2)


def chosen(config: pytest.Config) -> list[Target]:
    if file := config.getoption("targets"):
        return read_targets(file)
    if inventory := config.getoption("inventory"):
        with warnings.catch_warnings():
            # pyinfra makes sockets cooperative, and warns of those that pytest plugins imported before: none of ours.
            warnings.simplefilter("ignore")
            from infra.fleet import targets  # looks at the hosts and plans: only needed here

        return list(targets(inventory, config.getoption("limit"), config.getoption("data")))
    raise ValueError("give --inventory inventories/home.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per host and check of its plan: test_host[lab1-engine.completion]."""
    targets = metafunc.config.stash.get(TARGETS, [])
    rows = [(target, check) for target in targets for check in checks(target.plan)]
    names = [f"{target.host}-{check.id}" for target, check in rows]
    metafunc.parametrize(("target", "check"), rows, ids=names)


@pytest.fixture(scope="session")
def sights(pytestconfig: pytest.Config) -> dict[str, Sight]:
    """One look per host, all hosts at once; the tests only read what came of it."""
    targets, sights = pytestconfig.stash[TARGETS], pytestconfig.stash[SIGHTS]
    with ThreadPoolExecutor(min(HOSTS_AT_ONCE, len(targets))) as pool:
        for target, sight in zip(targets, pool.map(look, targets), strict=True):
            sights[target.host] = sight
    return sights


@pytest.fixture
def result(pytestconfig: pytest.Config, sights: dict[str, Sight], target: Target, check: Check) -> Result:
    """What one check came to on one host."""
    found = sights[target.host].results[check.id]
    pytestconfig.stash[ASKED].append(found)
    return found


def look(target: Target) -> Sight:
    """Run the probe on the host and read it. Whatever goes wrong is a sight too: one host must not hide the others."""
    started = datetime.now(UTC)
    stand_ins: list[str] = []
    try:
        if problems := target.plan.get("problems"):
            said = "; ".join(f"{problem['setting']}: {problem['message']}" for problem in problems)
            raise NoSight(f"no plan to prove it against: {said}", problems[0]["remedy"])
        evidence = run_probe(target.connection)
        stand_ins = simulated(evidence)
        results = [evaluate(check, target.plan, evidence) for check in checks(target.plan)]
        measured = figures(evidence)
    except NoSight as failure:
        results, measured = [*unreachable(target.plan, failure.reason, failure.remedy)], {}
    except Exception as error:  # noqa: BLE001 - told in the certificate, and no pass
        reason = f"could not run: {type(error).__name__}: {error}"
        results, measured = [*unreachable(target.plan, reason, f"try it by hand: {by_hand(target.connection)}")], {}
    return Sight(started, datetime.now(UTC), {result.id: result for result in results}, measured, stand_ins)


class NoSight(Exception):
    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = f"could not run: {' '.join(reason.split())}", remedy


def run_probe(connection: Connection) -> Evidence:
    command = ("sudo -n " if connection.sudo else "") + connection.probe
    earliest = time.time()
    try:
        done = backend(connection).run(command)
    except RuntimeError as error:  # testinfra's word for ssh's exit code 255; the CommandResult is its argument
        said = getattr(error.args[0], "stderr", str(error)).strip()
        raise NoSight(f"no SSH connection: {said}", f"try it by hand: {by_hand(connection)}") from error
    said = done.stderr.strip() or done.stdout.strip()
    if done.rc == 127 or "command not found" in said:
        raise NoSight(
            f"{connection.probe} is not on the host ({said})", "it was never deployed: pyinfra INVENTORY deploy.py"
        )
    if done.rc != 0:
        raise NoSight(f"{command} ended with {done.rc}: {said}", f"try it by hand: {by_hand(connection)}")
    try:
        document: Evidence = json.loads(done.stdout)
        document["probe"]["looked_between"] = [earliest, time.time()]
    except (ValueError, KeyError, TypeError) as error:
        raise NoSight(
            f"{connection.probe} printed no evidence: {done.stdout[:200]!r}", "deploy this host again"
        ) from error
    return document


def backend(connection: Connection) -> testinfra.host.Host:
    if connection.backend == "local":
        return testinfra.get_host("local://")
    user = f"{connection.user}@" if connection.user else ""
    port = f":{connection.port}" if connection.port else ""
    host = f"[{connection.hostname}]" if ":" in connection.hostname else connection.hostname
    return testinfra.get_host(
        f"ssh://{user}{host}{port}",
        ssh_config=connection.config_file or None,
        ssh_identity_file=connection.key or None,
        timeout=CONNECT_SECONDS,
        controlpersist=0,  # one command per host: no connection is worth keeping
        ssh_extra_args=ssh_options(connection),
    )


def ssh_options(connection: Connection) -> str:
    """BatchMode: nothing may ask. ServerAlive: a host that hangs is given up after 15 s of silence."""
    options = {"BatchMode": "yes", "LogLevel": "ERROR", "ServerAliveInterval": "5", "ServerAliveCountMax": "3"}
    if connection.known_hosts_file:
        options["UserKnownHostsFile"] = f'"{connection.known_hosts_file}"'  # quoted: blanks would separate two files
    if connection.strict:
        options["StrictHostKeyChecking"] = connection.strict
    if connection.key:
        options["IdentitiesOnly"] = "yes"
    return " ".join(f"-o {shlex.quote(f'{name}={value}')}" for name, value in options.items())


def by_hand(connection: Connection) -> str:
    command = ["sudo", "-n", connection.probe] if connection.sudo else [connection.probe]
    if connection.backend == "local":
        return " ".join(command)
    words = ["ssh", *(["-p", str(connection.port)] if connection.port else [])]
    words += ["-i", connection.key] if connection.key else []
    words += ["-o", f"UserKnownHostsFile={connection.known_hosts_file}"] if connection.known_hosts_file else []
    words += [f"{connection.user}@{connection.hostname}" if connection.user else connection.hostname]
    return " ".join(words + command)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write each host's certificate, whole whatever -k chose; the exit code is that of the tests that ran."""
    config = session.config
    if not config.stash.get(SIGHTS, {}):
        return  # nothing was looked at: --collect-only, or pytest was stopped before
    for target in config.stash[TARGETS]:
        sight = config.stash[SIGHTS][target.host]
        document = certificate.certificate(
            target.host,
            target.inventory,
            target.plan,
            list(sight.results.values()),
            sight.figures,
            sight.started,
            sight.finished,
            sight.simulated,
        )
        certificate.write(document, config.getoption("reports"))
    session.exitstatus = certificate.exit_code([certificate.overall([one]) for one in config.stash[ASKED]])
