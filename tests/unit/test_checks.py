"""Every check passes on a healthy host, and every check can fail."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from llmhost.checks import checks, figures, plan_hash, unreachable
from llmhost.evidence import FAILED, PASSED, SKIPPED, Check, Plan, evaluate
from llmhost.plan.model import EnginePlan, HostPlan, Model, Release, Service, WebuiPlan
from tests.unit import stand_ins

PLAN = stand_ins.plan_json()
CHECKS = {check.id: check for check in checks(PLAN)}

Evidence = dict[str, Any]
Change = Callable[[Evidence], None]


def put(path: str, value: Any) -> Change:
    def change(evidence: Evidence) -> None:
        *parents, last = path.split("/")
        node = evidence
        for name in parents:
            node = node[name]
        node[last] = value

    return change


def publish_worker(evidence: Evidence) -> None:
    evidence["processes"]["vllm.service"]["listeners"].append("10.77.0.11:40123")


# What must make each check fail: the check, and what is wrong on the host.
WRONG: list[tuple[str, Change]] = [
    ("plan.hash", put("plan/document/engine/port", 9000)),
    ("host.clock", put("probe/clock_seconds", 0.0)),
    ("host.clock", put("probe/clock_seconds", 9e9)),
    ("secrets.present", put("secrets/names", ["vllm.env VLLM_API_KEY"])),
    ("secrets.length", put("secrets/too_short", ["vllm.env VLLM_API_KEY"])),
    ("secrets.directory", put("secrets/directory", "0755 root:root")),
    ("secrets.files", put("secrets/files/vllm.env", "0644 root:root")),
    ("secrets.files", put("secrets/files/vllm.env", "0600 llmhost:root")),
    ("secrets.files", put("secrets/files/backup.env", "0644 root:root")),
    ("secrets.files", put("secrets/files", {"vllm.env": "0600 root:root"})),
    ("secrets.unexposed", put("leaks/places", ["the journal"])),
    ("network.private", publish_worker),
    ("network.private", put("processes/open-webui.service/listeners", ["0.0.0.0:7860"])),
    ("network.private", put("processes/open-webui.service/listeners", ["[::]:7860"])),
    ("network.private", put("processes/vllm.service/count", 0)),
    *[
        row
        for unit, part in (("vllm", "engine"), ("open-webui", "webui"))
        for row in (
            (f"services.{unit}.active", put(f"services/{unit}.service/active", "failed")),
            (f"services.{unit}.enabled", put(f"services/{unit}.service/enabled", "disabled")),
            (
                f"services.{unit}.stable",
                put(f"services/{unit}.service/stability", {"restarts": 3, "active_seconds": 9.0}),
            ),
            (f"services.{unit}.current", put(f"services/{unit}.service/stale", "yes")),
            (f"releases.{unit}.installed", put(f"releases/{part}/version", "0.31.0")),
            (f"releases.{unit}.linked", put(f"releases/{part}/current", "/opt/llmhost/releases/old")),
            (f"releases.{unit}.running", put(f"processes/{unit}.service/releases", ["old"])),
            (
                f"releases.{unit}.running",
                put(f"processes/{unit}.service/deleted", [PLAN[part]["release"]["identity"]]),
            ),
            (f"releases.{unit}.running", put(f"processes/{unit}.service/releases", [])),
            (f"network.{unit}", put(f"processes/{unit}.service/listeners", [])),
        )
    ],
    ("engine.health", put("engine/health/status", 503)),
    ("engine.version", put("engine/version/version", "0.31.0")),
    ("engine.models", put("engine/models/ids", ["another"])),
    ("engine.models", put("engine/models", {"status": 401, "seconds": 0.1})),
    ("services.llmhost.enabled", put("services/llmhost.target/enabled", "disabled")),
    ("services.llmhost.active", put("services/llmhost.target/active", "inactive")),
    ("engine.key_required", put("engine/models_without_key/status", 200)),
    ("engine.invocation_key_required", put("engine/invocation_without_key/status", 200)),
    ("engine.metrics_key_required", put("engine/metrics_without_key/status", 200)),
    ("engine.wrong_key_refused", put("engine/models_wrong_key/status", 200)),
    ("engine.completion_key_required", put("engine/completion_without_key/status", 200)),
    ("engine.completion", put("engine/completion/text", "I do not know.")),
    ("engine.completion", put("engine/completion/error", "the stream broke")),
    ("engine.streamed", put("engine/completion/pieces", 1)),
    ("engine.streamed", put("engine/completion/done", None)),
    ("engine.streamed", put("engine/completion/content_type", "application/json")),
    ("webui.health", put("webui/health/ok", False)),
    ("webui.ready", put("webui/ready", {"status": 503, "seconds": 0.1})),
    ("webui.version", put("webui/version/version", "0.12.3")),
    ("webui.sign_in_required", put("webui/config/sign_in_required", False)),
    ("webui.first_account", put("webui/config/without_accounts", True)),
    ("webui.signup_not_offered", put("webui/config/signup_open", True)),
    ("webui.signup_refused", put("webui/signup/status", 400)),
    ("webui.signup_refused", put("webui/signup/status", 200)),
    ("webui.token_required", put("webui/models_without_token/status", 200)),
    ("webui.wrong_password_refused", put("webui/signin_wrong/status", 200)),
    ("webui.sign_in", put("webui/signin", {"status": 400, "seconds": 0.2})),
    ("webui.sign_in", put("webui/signin/role", "user")),
    ("webui.models", put("webui/models/ids", [])),
    ("webui.chat_backends_local", put("webui/backends/urls", ["https://api.openai.com/v1"])),
    ("webui.chat_backends_local", put("webui/backends/urls", [])),
    ("webui.embeddings_local", put("webui/embedding/url", "https://api.openai.com/v1")),
    ("webui.ollama_off", put("webui/ollama/enabled", True)),
    ("webui.chat", put("webui/chat/text", "")),
    ("webui.chat", put("webui/chat", {"status": 400, "error": '"auto" tool choice requires', "text": "", "pieces": 0})),
    ("webui.streamed", put("webui/chat/pieces", 0)),
]

NOTHING: tuple[Any, ...] = ({}, None, [], "", {"could_not_look": "no permission"}, {"error": "connection refused"})


def state(check: Check, evidence: Evidence, plan: Plan = PLAN) -> str:
    return evaluate(check, plan, evidence).state


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_healthy_host_passes(check: Check) -> None:
    result = evaluate(check, PLAN, stand_ins.healthy_evidence())
    assert (result.state, result.remedy) == (PASSED, ""), result


@pytest.mark.parametrize(("name", "change"), WRONG, ids=[name for name, _ in WRONG])
def test_check_fails_when_its_matter_is_wrong(name: str, change: Change) -> None:
    evidence = stand_ins.healthy_evidence()
    change(evidence)
    result = evaluate(CHECKS[name], PLAN, evidence)
    assert result.state == FAILED
    assert result.remedy


def test_every_check_is_shown_to_fail() -> None:
    assert {name for name, _ in WRONG} == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_nothing_passes_without_evidence(check: Check) -> None:
    """Each level of what a check looks at taken away, emptied, or replaced by the reason why it is missing."""
    assert state(check, {}) == SKIPPED
    names = check.look.split("/")
    for depth in range(1, len(names) + 1):
        path = "/".join(names[:depth])
        for nothing in NOTHING:
            if nothing == [] and check.expected == []:
                continue  # an empty list is what a healthy host has there
            evidence = stand_ins.healthy_evidence()
            put(path, nothing)(evidence)
            if check.id == "webui.embeddings_local" and nothing == "" and depth == len(names):
                continue  # no address at all is local
            assert state(check, evidence) != PASSED, (path, nothing)


def test_could_not_look_is_no_failure_and_no_pass() -> None:
    evidence = stand_ins.healthy_evidence()
    evidence["services"] = {"could_not_look": "OSError: systemctl show ended with 1"}
    result = evaluate(CHECKS["services.vllm.active"], PLAN, evidence)
    assert result.state == SKIPPED
    assert "systemctl show ended with 1" in result.seen


def test_error_of_the_service_is_shown_with_its_status() -> None:
    evidence = stand_ins.healthy_evidence()
    evidence["webui"]["chat"] = {"status": 500, "error": "upstream is down", "seconds": 1.5}
    result = evaluate(CHECKS["webui.chat"], PLAN, evidence)
    assert (result.state, result.seen, result.seconds) == (FAILED, "500: upstream is down", 1.5)


def test_an_engine_that_came_back_once_is_healthy() -> None:
    evidence = stand_ins.healthy_evidence()
    evidence["services"]["vllm.service"]["stability"] = {"restarts": 1, "active_seconds": 5.0}
    assert state(CHECKS["services.vllm.stable"], evidence) == PASSED
    evidence["services"]["vllm.service"]["stability"] = {"restarts": 30, "active_seconds": 3600.0}
    assert state(CHECKS["services.vllm.stable"], evidence) == PASSED


def test_published_ports_are_expected_and_others_still_refused() -> None:
    plan = copy.deepcopy(PLAN)
    plan["webui"]["host"] = "0.0.0.0"
    evidence = stand_ins.healthy_evidence()
    evidence["processes"]["open-webui.service"]["listeners"] = ["0.0.0.0:7860"]
    assert state(CHECKS["network.private"], evidence, plan) == PASSED
    assert state(CHECKS["network.private"], evidence, PLAN) == FAILED
    publish_worker(evidence)
    assert state(CHECKS["network.private"], evidence, plan) == FAILED


def test_local_build_of_a_version_is_that_version() -> None:
    evidence = stand_ins.healthy_evidence()
    evidence["engine"]["version"]["version"] = "0.32.0+cpu"
    assert state(CHECKS["engine.version"], evidence) == PASSED


def test_any_reply_does_where_the_plan_knows_no_right_one() -> None:
    plan = copy.deepcopy(PLAN)
    plan["engine"]["model"]["proof_answer"] = ""
    evidence = stand_ins.healthy_evidence()
    evidence["engine"]["completion"]["text"] = "Bonjour"
    assert state(CHECKS["engine.completion"], evidence, plan) == PASSED
    evidence["engine"]["completion"]["text"] = " \n"
    assert state(CHECKS["engine.completion"], evidence, plan) == FAILED


def test_another_plan_on_the_host_is_named_by_its_settings() -> None:
    evidence = stand_ins.healthy_evidence()
    evidence["plan"]["document"]["engine"]["flags"]["max-model-len"] = 4096
    seen = evaluate(CHECKS["plan.hash"], PLAN, evidence).seen
    assert seen.endswith(", differs in engine.flags.max-model-len")


def test_checks_follow_the_plan() -> None:
    only_engine = {**PLAN, "webui": None}
    assert {check.group for check in checks(only_engine)} == {
        *("plan", "host", "secrets", "network", "services", "releases", "engine")
    }


def test_unreachable_host_is_skipped_with_its_reason() -> None:
    results = unreachable(PLAN, "could not run: no route to host", "check the cable")
    assert {result.id for result in results} == set(CHECKS)
    assert {(result.state, result.seen) for result in results} == {(SKIPPED, "could not run: no route to host")}


def test_figures_are_those_measured() -> None:
    evidence = stand_ins.healthy_evidence()
    del evidence["webui"]["chat"]["tokens_per_second"]
    assert figures(evidence) == {
        "ttft_seconds": 0.06,
        "tokens_per_second": 95.2,
        "completion_tokens": 7,
        "webui_ttft_seconds": 0.06,
        "probe_seconds": 1.4,
    }
    assert figures({}) == {}


def test_hash_is_the_plans_own() -> None:
    plan = HostPlan(host="lab1", decisions=(), problems=())
    assert plan_hash(plan.as_json()) == plan.hash


def test_plan_of_these_tests_has_the_planners_names() -> None:
    for part, model in (("engine", EnginePlan), ("webui", WebuiPlan)):
        assert set(PLAN[part]) <= names(model)
        assert set(PLAN[part]["release"]) <= names(Release)
        assert set(PLAN[part]["service"]) <= names(Service)
    assert set(PLAN["engine"]["model"]) <= names(Model)
    assert set(PLAN) <= names(HostPlan)


def names(model: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(model)}
