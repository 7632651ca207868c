"""What Open WebUI is told: the table, what it depends on, and the two files rendered from it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhost.plan.model import EnginePlan, Model, Release, Service, WebuiPlan
from llmhost.plan.webui import REASONS, RUNTIMES, SECRETS, Runtime, environment, plan_webui
from llmhost.render import render
from llmhost.settings import Settings

RELEASE = Release(
    package="open-webui",
    version="0.12.4",
    lock="locks/open-webui-0.12.4-py311.txt",
    lock_sha256="0" * 64,
    python="3.11",
    python_source="system",
    torch_index=False,
    alias="",
    cuda_home="",
    os_packages=(),
    identity="open-webui-0.12.4-000000000000",
    path="/opt/llmhost/releases/open-webui-0.12.4-000000000000",
    current="/opt/llmhost/current-open-webui",
    download_mib=212,
    disk_mib=650,
)
MODEL = Model(
    name="smollm2-135m-instruct",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="0" * 40,
    directory="/var/lib/llmhost/models/smollm2",
    served_name="smollm2-135m-instruct",
    weights_bytes=270 << 20,
    licence="apache-2.0",
    proof_question="What is the capital of France?",
    proof_answer="Paris",
)
ENGINE = EnginePlan(
    accelerator="cpu",
    version="0.32.0",
    runtime="venv",
    host="127.0.0.1",
    port=8000,
    release=RELEASE,
    model=MODEL,
    service=Service("vllm.service", (), 600),
    flags={},
    environment={},
    kv_cache_tokens=None,
    kv_cache_bytes=1 << 30,
    memory_bytes=None,
)
CONTAINER = Runtime(data_dir="/app/backend/data", engine_host="engine.internal")

ports = st.integers(1024, 65535)
settings = st.builds(Settings, webui_port=ports, webui_publish=st.booleans())
engines = st.builds(
    lambda accelerator, port, tools, weights: dataclasses.replace(
        ENGINE,
        accelerator=accelerator,
        port=port,
        flags={"enable-auto-tool-choice": True} if tools else {},
        model=dataclasses.replace(MODEL, weights_bytes=weights),
    ),
    st.sampled_from(["cpu", "nvidia"]),
    ports,
    st.booleans(),
    st.none() | st.integers(1, 1 << 40),
)


def planned(engine: EnginePlan = ENGINE, **data: object) -> WebuiPlan:
    return plan_webui(Settings.model_validate(data), engine, RELEASE)[0]


@given(settings, engines, st.sampled_from([RUNTIMES["venv"], CONTAINER]))
def test_every_variable_is_one_line_named_as_a_variable_and_no_secret(
    settings: Settings, engine: EnginePlan, runtime: Runtime
) -> None:
    for name, value in environment(settings, engine, runtime).items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", name)
        assert isinstance(value, str)
        assert "\n" not in value
        assert name not in SECRETS
        assert not re.search(r"(_KEY|_PASSWORD|_SECRET|_TOKEN)S?$", name)


@given(settings, engines, st.sampled_from([RUNTIMES["venv"], CONTAINER]))
def test_no_value_names_a_host_elsewhere(settings: Settings, engine: EnginePlan, runtime: Runtime) -> None:
    for name, value in environment(settings, engine, runtime).items():
        hosts = set(re.findall(r"https?://([^:/;\"]+)", value))
        assert hosts <= {"127.0.0.1", "localhost", runtime.engine_host}, name


@given(settings, engines)
def test_a_container_gets_the_same_table_seen_from_inside(settings: Settings, engine: EnginePlan) -> None:
    venv = environment(settings, engine, RUNTIMES["venv"])
    container = environment(settings, engine, CONTAINER)
    moved = {name for name in venv if venv[name] != container[name]}
    assert list(venv) == list(container)
    assert moved == {"DATA_DIR", "STATIC_DIR"} | {name for name in venv if name.endswith("OPENAI_API_BASE_URL")}
    assert not any(RUNTIMES["venv"].data_dir in value for value in container.values())
    assert container["OPENAI_API_BASE_URL"] == f"http://engine.internal:{engine.port}/v1"


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1))
def test_the_connection_names_the_served_model(name: str) -> None:
    engine = dataclasses.replace(ENGINE, model=dataclasses.replace(MODEL, served_name=name))
    variables = planned(engine).environment
    assert json.loads(variables["OPENAI_API_CONFIGS"])["0"]["model_ids"] == [name]
    assert variables["DEFAULT_MODELS"] == name


@given(engines)
def test_tools_are_offered_only_to_an_engine_that_parses_their_calls(engine: EnginePlan) -> None:
    variables = planned(engine).environment
    parses = "enable-auto-tool-choice" in engine.flags
    assert json.loads(variables["DEFAULT_MODEL_PARAMS"])["function_calling"] == ("native" if parses else "legacy")
    assert json.loads(variables["DEFAULT_MODEL_METADATA"])["capabilities"]["builtin_tools"] is parses


@pytest.mark.parametrize(("weights_bytes", "greedy"), [(270 << 20, True), (16 << 30, False), (None, False)])
def test_only_a_model_known_to_be_small_answers_greedily(weights_bytes: int | None, greedy: bool) -> None:
    engine = dataclasses.replace(ENGINE, model=dataclasses.replace(MODEL, weights_bytes=weights_bytes))
    parameters = json.loads(planned(engine).environment["DEFAULT_MODEL_PARAMS"])
    assert parameters.get("temperature") == (0 if greedy else None)


def test_a_cpu_spends_no_completion_on_titles() -> None:
    on_gpu = dataclasses.replace(ENGINE, accelerator="nvidia")
    assert planned().environment["ENABLE_TITLE_GENERATION"] == "false"
    assert planned(on_gpu).environment["ENABLE_TITLE_GENERATION"] == "true"


def test_unpublished_it_listens_on_loopback_and_trusts_only_its_own_page() -> None:
    plan = planned(webui_port=7999)
    assert (plan.host, plan.port) == ("127.0.0.1", 7999)
    assert plan.environment["CORS_ALLOW_ORIGIN"] == "http://127.0.0.1:7999;http://localhost:7999"


def test_published_it_answers_under_any_name() -> None:
    plan = planned(webui_publish=True)
    assert (plan.host, plan.port) == ("0.0.0.0", 7860)
    assert plan.environment["CORS_ALLOW_ORIGIN"] == "*"
    assert plan.environment["WEBUI_URL"] == ""


@given(settings, engines)
def test_decisions_say_what_is_in_the_plan(settings: Settings, engine: EnginePlan) -> None:
    plan, decisions = plan_webui(settings, engine, RELEASE)
    assert {decision.concern for decision in decisions} == {"webui"}
    values = {decision.setting: decision.value for decision in decisions}
    assert values.pop("listen") == f"{plan.host}:{plan.port}"
    assert values.items() <= plan.environment.items()
    assert {"ENABLE_SIGNUP", "ENABLE_PERSISTENT_CONFIG", "OPENAI_API_BASE_URL"} <= values.keys()


def test_every_variable_has_a_reason_of_one_sentence_or_more() -> None:
    assert REASONS.keys() == planned().environment.keys()
    assert [reason for reason in REASONS.values() if "\n" in reason or not reason.endswith(".")] == []


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=64))
def test_the_rendered_environment_reads_back_the_same(admin_name: str) -> None:
    plan = planned(webui_admin_name=admin_name)
    assert read_environment_file(render("/etc/llmhost/open-webui.env", webui=plan, webui_reasons=REASONS)) == (
        plan.environment
    )


def read_environment_file(text: str) -> dict[str, str]:
    """What systemd reads from a file of single-line assignments (env-file.c: a value is a row of quoted pieces)."""
    variables = {}
    for line in text.split("\n"):
        if line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            assert re.fullmatch(r"""('[^']*'|"[^"\\`$]*")*""", value), line
            variables[name] = "".join(piece[1:-1] for piece in re.findall(r"""'[^']*'|"[^"]*\"""", value))
    return variables


@pytest.mark.parametrize("published", [False, True])
def test_the_unit_is_one_systemd_accepts(published: bool, tmp_path: Path) -> None:
    unit = write_unit(tmp_path, planned(webui_publish=published))
    result = systemd_analyze("verify", "--recursive-errors=no", str(unit))
    complaints = [line for line in result.stderr.splitlines() if "is not executable" not in line]
    assert complaints == []


@pytest.mark.parametrize("published", [False, True])
def test_the_unit_is_hardened(published: bool, tmp_path: Path) -> None:
    unit = write_unit(tmp_path, planned(webui_publish=published))
    result = systemd_analyze("security", "--offline=yes", "--threshold=20", str(unit))  # tenths: 2.0 of 10
    assert result.returncode == 0, result.stdout


def test_only_an_unpublished_unit_is_cut_off_from_the_network() -> None:
    assert "IPAddressDeny=any" in unit_text(planned())
    assert "IPAddressDeny" not in unit_text(planned(webui_publish=True))


def test_the_unit_names_its_source_and_carries_no_environment() -> None:
    text = unit_text(planned())
    assert text.startswith("# llmhost: templates/etc/systemd/system/open-webui.service.j2")
    assert not re.search(r"^Environment=", text, re.MULTILINE)


def unit_text(plan: WebuiPlan) -> str:
    return render("/etc/systemd/system/open-webui.service", webui=plan)


def write_unit(directory: Path, plan: WebuiPlan) -> Path:
    unit = directory / "open-webui.service"
    unit.write_text(unit_text(plan))
    return unit


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (package systemd)")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
