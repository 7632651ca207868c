"""Plans for recorded hosts: what is decided, and what is refused with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmhost.catalogue import ROOT, models
from llmhost.hardware import Hardware
from llmhost.plan.engine import ENGINE_OVERHEAD_BYTES, NEIGHBOURS_BYTES
from llmhost.plan.host import plan
from llmhost.plan.model import HostPlan, Problem
from llmhost.settings import Layer, load
from tests.recorded import OS_RELEASES, bare, disks, memory

GOLDEN = ROOT / "tests/plan/golden"
SUPPORTED = ["Debian 12", "Debian 13", "Ubuntu 22.04", "Ubuntu 24.04", "Ubuntu 26.04"]
A100 = "0000:01:00.0 0x10de 0x20b0 0x030200 none"


def planned(hardware: Hardware, **data: Any) -> HostPlan:
    return plan(load([Layer("group_data/all.py", data)]), hardware, "box")


def only_problem(hardware: Hardware, **data: Any) -> Problem:
    (problem,) = planned(hardware, **data).problems
    return problem


def decision(p: HostPlan, setting: str) -> Any:
    return next(d.value for d in p.decisions if d.setting == setting)


@pytest.mark.parametrize("name", ["debian-12-bare", "debian-13-managed-python", "aarch64"])
def test_golden_plans(name: str, request: pytest.FixtureRequest) -> None:
    """Reviewed line by line; rewrite with `pytest tests/plan --golden`, and review the difference."""
    hardware = {
        "debian-12-bare": bare(),
        "debian-13-managed-python": bare(os_release=OS_RELEASES["Debian 13"]),
        "aarch64": bare(machine="aarch64", cpu="model name=Neoverse-N1\nFeatures=asimd\ncount=4"),
    }[name]
    # The lock's hash and what follows from it change with every lock; they are not what this plan is about.
    text = json.dumps(planned(hardware).as_json(), indent=1) + "\n"
    document = json.loads(text)
    for part in ("engine", "webui"):
        identity = document[part]["release"]["identity"]
        text = text.replace(identity, identity.rpartition("-")[0] + "-HASH")
        text = text.replace(document[part]["release"]["lock_sha256"], "SHA256")
    text = text.replace(document["hash"], "HASH")
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--golden"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_systems_are_planned(name: str) -> None:
    p = planned(bare(os_release=OS_RELEASES[name]))
    assert p.problems == ()
    assert p.engine and p.webui and p.base


@pytest.mark.parametrize("name", ["Debian 11", "Fedora"])
def test_other_systems_are_refused(name: str) -> None:
    problem = only_problem(bare(os_release=OS_RELEASES[name]))
    assert problem.setting == "operating system"
    assert "Ubuntu 24.04" in problem.remedy


def test_aarch64_is_planned_and_marked_untested() -> None:
    p = planned(bare(machine="aarch64"))
    assert p.problems == ()
    assert any("untested" in d.reason for d in p.decisions if d.setting == "machine")


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        ({"machine": "riscv64"}, "machine", "riscv64"),
        ({"init": "sh"}, "init", "process 1 is sh"),
        ({"elevates": ""}, "ssh_user", "cannot become root"),
        ({"controller_time": "1000000000", "host_time": "1000009000"}, "clock", "+9000 s"),
        ({"disks": disks(1.0)}, "disk", "MiB free for what is not yet installed, and has 1,024 MiB"),
        ({"cpu": "model name=Old\nflags=sse4_2\ncount=2"}, "accelerator", "lacks AVX2"),
        ({"listeners": "0.0.0.0:8000 812 nginx nginx.service"}, "engine_port", "taken by nginx (process 812"),
        ({"listeners": "127.0.0.1:7860 9 gradio -"}, "webui_port", "taken by gradio"),
    ],
)
def test_hosts_that_cannot_are_refused(changes: dict[str, str], setting: str, words: str) -> None:
    problems = planned(bare(**changes)).problems
    assert setting in [p.setting for p in problems]
    assert any(words in p.message for p in problems)


def test_a_port_held_by_llmhost_itself_is_its_own() -> None:
    assert planned(bare(listeners="127.0.0.1:8000 812 vllm vllm.service")).problems == ()


@pytest.mark.parametrize(
    ("data", "setting", "words", "remedy"),
    [
        ({"model": "smolm2-135m-instruct"}, "model", "no model 'smolm2-135m-instruct'", "smollm2-135m-instruct"),
        ({"model": "someone/some-model"}, "model_revision", "commit must be given", "40 hex digits"),
        ({"engine_version": "0.33.0"}, "engine_version", "no lock for vLLM 0.33.0", "0.32.0"),
        ({"engine_context_tokens": 16384}, "engine_context_tokens", "was trained on 8192", "at most 8192"),
        ({"engine_concurrency": 4096}, "engine_concurrency", "more than memory leaves", "at most"),
        ({"engine_kv_cache_gib": 4000}, "engine_kv_cache_gib", "more than memory leaves", "at most"),
        ({"webui_port": 8000}, "webui_port", "engine_port is 8000 too", "own port"),
        ({"accelerator": "nvidia"}, "accelerator", "no NVIDIA GPU", "cpu"),
        ({"mirror_apt_security": "http://m.example/s"}, "mirror_apt_security", "without mirror_apt_archive", "both"),
        ({"mirror_apt_archive": "http://m.example/d"}, "mirror_apt_security", "archive of their own", "debian-sec"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(data: dict[str, Any], setting: str, words: str, remedy: str) -> None:
    problem = only_problem(bare(), **data)
    assert problem.setting == setting
    assert problem.source == ("group_data/all.py" if setting in data else "default")
    assert words in problem.message
    assert remedy in problem.remedy


def test_a_model_that_cannot_fit_says_how_much_is_missing_and_what_would_fit() -> None:
    problem = only_problem(bare(meminfo=memory(8)), model="llama-3-8b-instruct")
    assert problem.setting == "model"
    assert "needs 17." in problem.message or "needs 18." in problem.message
    assert "GiB too little" in problem.message
    assert "qwen2.5-0.5b-instruct" in problem.remedy
    assert "llama" not in problem.remedy


def test_a_disk_mounted_for_llmhost_counts() -> None:
    assert planned(bare(disks=disks(1.0, opt=10.0))).problems == ()
    (problem,) = planned(bare(disks=disks(50.0, models=0.1))).problems
    assert "/var/lib/llmhost/models needs" in problem.message


def test_a_kernel_that_keeps_a_little_more_memory_changes_no_plan() -> None:
    for kilobytes in (3_900_000, 8_000_000, 24_684_092):
        plans = {
            planned(bare(meminfo=f"MemTotal: {kilobytes - less} kB\nMemAvailable: 1000000 kB")).hash
            for less in (0, 4096, 9000)
        }
        assert len(plans) == 1


def test_a_wish_without_effect_is_said() -> None:
    p = planned(bare(), engine_kv_cache_gib=1.0, engine_concurrency=2)
    reason = next(d.reason for d in p.decisions if d.setting == "kv_cache_bytes")
    assert "engine_concurrency does not size it" in reason


def test_a_cache_that_memory_cuts_short_says_so() -> None:
    p = planned(bare(meminfo="MemTotal: 3900000 kB\nMemAvailable: 3000000 kB"))
    assert p.engine
    reason = next(d.reason for d in p.decisions if d.setting == "kv_cache_bytes")
    assert p.engine.kv_cache_bytes and p.engine.kv_cache_bytes < 4 * 8192 * 23040
    assert "what memory leaves" in reason


def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert decision(planned(bare()), "accelerator") == "cpu"


def test_auto_takes_the_gpu_where_there_is_one_and_leaves_it_alone_on_request() -> None:
    p = planned(bare(pci=A100))
    assert p.problems == ()
    assert decision(p, "accelerator") == "nvidia"
    assert p.driver and p.containers
    on_the_cpu = planned(bare(pci=A100), accelerator="cpu")
    assert (on_the_cpu.problems, on_the_cpu.driver, on_the_cpu.containers) == ((), None, None)


def test_the_plan_of_a_converged_host_is_the_plan_of_the_bare_one() -> None:
    bare_plan = planned(bare())
    assert bare_plan.engine and bare_plan.webui
    installed = [f"release={bare_plan.engine.release.identity}", f"release={bare_plan.webui.release.identity}"]
    installed += [f"model={bare_plan.engine.model.directory}", "vllm.service=active", "open-webui.service=active"]
    converged = bare(
        installed="\n".join(installed),
        listeners="127.0.0.1:8000 812 vllm vllm.service\n127.0.0.1:7860 9 open-webui open-webui.service",
        disks=disks(0.6),  # what is installed needs no more room
    )
    assert planned(converged).as_json() == bare_plan.as_json()


def test_published_ports_listen_everywhere_others_on_loopback() -> None:
    p = planned(bare(), engine_publish=True)
    assert p.engine and p.webui
    assert (p.engine.host, p.webui.host) == ("0.0.0.0", "127.0.0.1")


def test_no_secret_is_in_a_plan() -> None:
    secrets = {"engine_api_key": "K" * 32, "webui_admin_password": "P" * 32, "model_hub_token": "T" * 32}
    text = json.dumps(planned(bare(), **secrets).as_json())
    assert not [value for value in secrets.values() if value in text]


def test_everything_decided_has_a_reason() -> None:
    assert all(d.reason.strip() for d in planned(bare()).decisions)


@settings(max_examples=200)
@given(
    gib=st.floats(1, 512),
    name=st.sampled_from(sorted(models())),
    profile=st.sampled_from(["latency", "balanced", "throughput"]),
    context=st.none() | st.integers(256, 40000),
    concurrency=st.none() | st.integers(1, 4096),
)
def test_what_is_planned_fits(
    gib: float, name: str, profile: str, context: int | None, concurrency: int | None
) -> None:
    data = {
        "model": name,
        "tuning_profile": profile,
        "engine_context_tokens": context,
        "engine_concurrency": concurrency,
    }
    hardware = bare(meminfo=memory(gib), disks=disks(1000))
    p = planned(hardware, **data)
    if p.refused:
        assert all(problem.message and problem.remedy for problem in p.problems)
        return
    assert p.engine and p.engine.kv_cache_tokens and p.engine.kv_cache_bytes
    entry = models()[name]
    held = NEIGHBOURS_BYTES + ENGINE_OVERHEAD_BYTES + entry.weights_bytes + p.engine.kv_cache_bytes
    assert held <= hardware.memory_bytes
    assert p.engine.kv_cache_tokens * entry.kv_bytes_per_token == p.engine.kv_cache_bytes
    assert p.engine.flags["max-model-len"] <= p.engine.kv_cache_tokens  # type: ignore[operator]  # a flag's value is any scalar
    assert context is None or p.engine.flags["max-model-len"] == context
