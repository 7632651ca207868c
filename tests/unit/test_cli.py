"""The llmhost command as a user runs it, on recorded hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmhost.catalogue import ROOT
from llmhost.hardware import parse
from tests.recorded import BARE, OS_RELEASES, facts

COMMAND = str(Path(sys.executable).parent / "llmhost")
HOME, EDGE = "inventories/home.py", "inventories/edge.py"
RECORDED = ("--hardware", str(BARE))


def llmhost(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def plans(*arguments: str, exits: int = 0) -> list[dict[str, Any]]:
    ended = llmhost("plan", *arguments, "--json")
    assert ended.returncode == exits, ended.stderr
    document = json.loads(ended.stdout)
    assert isinstance(document, list)
    return document


def says(exits: int, *arguments: str, cwd: Path = ROOT) -> str:
    """What is said on standard error by a run that ends so; never a traceback."""
    ended = llmhost(*arguments, cwd=cwd)
    assert ended.returncode == exits, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def recorded(directory: Path, text: str) -> tuple[str, str]:
    file = directory / "facts.json"
    file.write_text(text)
    return "--hardware", str(file)


# --- plan: the contract -----------------------------------------------------------------------------------------


def test_a_plan_holds_what_others_rely_on() -> None:
    (plan,) = plans(HOME, *RECORDED)
    assert plan.keys() >= {"host", "decisions", "driver", "engine", "webui", "problems"}
    assert plan["host"] == "gpu1"
    assert plan["problems"] == []
    assert plan["engine"].keys() >= {"version", "flags", "kv_cache_tokens"}
    assert plan["engine"]["version"] == "0.32.0"
    assert plan["engine"]["flags"]["port"] == 8000
    assert plan["engine"]["kv_cache_tokens"] >= plan["engine"]["flags"]["max-model-len"]
    assert plan["webui"]["port"] == 7860
    assert all(decision.keys() == {"concern", "setting", "value", "reason"} for decision in plan["decisions"])
    assert all(decision["reason"] for decision in plan["decisions"])


def test_a_plan_for_people_gives_each_decision_with_its_reason() -> None:
    ended = llmhost("plan", HOME, *RECORDED)
    assert ended.returncode == 0
    assert "gpu1" in ended.stdout
    assert "accelerator = cpu" in ended.stdout
    assert "sysfs shows no NVIDIA GPU" in ended.stdout


def test_a_refused_host_has_problems_and_exit_1(tmp_path: Path) -> None:
    (plan,) = plans(HOME, *recorded(tmp_path, facts(os_release=OS_RELEASES["Fedora"])), exits=1)
    (problem,) = plan["problems"]
    assert problem == {
        "setting": "operating system",
        "source": "the host",
        "message": "Fedora Linux 43 is not supported",
        "remedy": "Use one of: Ubuntu 22.04, Ubuntu 24.04, Ubuntu 26.04, Debian 12, Debian 13",
    }


def test_a_refusal_for_people_says_what_to_do_from_any_directory(tmp_path: Path) -> None:
    fedora = recorded(tmp_path, facts(os_release=OS_RELEASES["Fedora"]))
    ended = llmhost("plan", str(ROOT / HOME), *fedora, cwd=tmp_path)
    assert ended.returncode == 1
    assert "Refused: operating system" in ended.stdout
    assert "Use one of: Ubuntu 22.04" in ended.stdout


# --- plan: options ----------------------------------------------------------------------------------------------


def test_data_overrides_a_setting_as_in_pyinfra() -> None:
    (plan,) = plans(HOME, *RECORDED, "--data", "engine_port=8123", "--data", "engine_publish=true")
    assert plan["engine"]["flags"]["port"] == 8123
    assert plan["engine"]["host"] == "0.0.0.0"
    assert any("--data" in decision["reason"] for decision in plan["decisions"] if decision["setting"] == "engine_port")


def test_every_wrong_setting_is_refused_with_its_source() -> None:
    wrong = ("engine_prot=8123", "engine_port=80", "webui_port=http", "engine_api_key=a-secret-too-short")
    options = [part for item in wrong for part in ("--data", item)]
    (plan,) = plans(HOME, *RECORDED, *options, exits=1)
    said = {problem["setting"]: problem for problem in plan["problems"]}
    assert {problem["source"] for problem in said.values()} == {"--data"}
    assert {name: problem["message"] for name, problem in said.items()} == {
        "engine_prot": "there is no such setting",
        "engine_port": "input should be greater than or equal to 1024, got 80",
        "webui_port": "input should be a valid integer, got 'http'",
        "engine_api_key": "expected at least 22 characters (128 bits)",
    }
    assert said["engine_prot"]["remedy"] == "Did you mean engine_port?"
    assert "TCP port" in said["webui_port"]["remedy"]
    assert "a-secret-too-short" not in json.dumps(plan)


def test_every_host_of_an_inventory_is_planned_with_its_own_data() -> None:
    contexts = {plan["host"]: plan["engine"]["flags"]["max-model-len"] for plan in plans(EDGE, *RECORDED)}
    assert contexts == {"edge-01": 8192, "edge-02": 8192, "edge-03": 4096, "edge-04": 8192}


def test_limit_takes_names_globs_and_groups() -> None:
    limits = ("--limit", "canary", "--limit", "edge-02", "--limit", "edge-*[45]")
    assert [plan["host"] for plan in plans(EDGE, *RECORDED, *limits)] == ["edge-01", "edge-02", "edge-04"]


def test_one_refused_host_does_not_hide_the_others(tmp_path: Path) -> None:
    inventory = tmp_path / "two.py"
    inventory.write_text('hosts = [("good", {}), ("bad", {"model": "no-such-model"})]\n')
    made = {plan["host"]: plan for plan in plans(str(inventory), *RECORDED, exits=1)}
    assert made["good"]["problems"] == []
    (problem,) = made["bad"]["problems"]
    assert problem["source"] == f"{inventory}, host bad"


# --- what cannot be looked at -----------------------------------------------------------------------------------


def test_a_missing_inventory_is_exit_2() -> None:
    assert "there is no inventory file inventories/nope.py" in says(2, "plan", "inventories/nope.py", *RECORDED)


def test_a_limit_that_matches_nothing_is_exit_2() -> None:
    said = says(2, "plan", EDGE, *RECORDED, "--limit", "edge-9*")
    assert "no host of inventories/edge.py matches edge-9*" in said


def test_a_missing_hardware_file_is_exit_2() -> None:
    assert "--hardware nowhere.json: No such file" in says(2, "plan", HOME, "--hardware", "nowhere.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "printed nothing"),
        ("[]", "expected the JSON that `llmhost facts HOST` prints"),
        ('{"facts_version": "3"}', "the facts lack something"),
    ],
)
def test_hardware_that_cannot_be_read_is_exit_2(tmp_path: Path, text: str, words: str) -> None:
    (plan,) = plans(HOME, *recorded(tmp_path, text), exits=2)
    (problem,) = plan["problems"]
    assert problem["setting"] == "host"
    assert words in problem["message"]


def test_binary_hardware_is_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in says(2, "plan", HOME, "--hardware", str(file))


def test_an_unreachable_host_is_exit_2(tmp_path: Path) -> None:
    """A port of this machine on which nothing listens."""
    inventory = tmp_path / "gone.py"
    data = {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_connect_retries": 0}
    inventory.write_text(f"hosts = [('gone', {data})]\n")
    (plan,) = plans(str(inventory), exits=2)
    (problem,) = plan["problems"]
    assert problem["setting"] == "host"
    assert problem["source"] == str(inventory)
    assert "ssh_hostname" in problem["remedy"]
    assert "gone" in says(2, "facts", str(inventory))


def test_an_unknown_option_is_exit_2() -> None:
    assert "--hardwear" in says(2, "plan", HOME, "--hardwear", str(BARE))


# --- facts, settings --------------------------------------------------------------------------------------------


def test_facts_of_this_machine_can_be_planned_elsewhere(tmp_path: Path) -> None:
    """Here refused or not, whatever machine this is: what counts is that it can be read."""
    ended = llmhost("facts", "inventories/local.py")
    assert ended.returncode == 0, ended.stderr
    assert parse(ended.stdout).hostname == os.uname().nodename
    (plan,) = json.loads(llmhost("plan", HOME, *recorded(tmp_path, ended.stdout), "--json").stdout)
    assert "host" not in [problem["setting"] for problem in plan["problems"]]


def test_facts_of_several_hosts_want_a_choice(tmp_path: Path) -> None:
    inventory = tmp_path / "two.py"
    inventory.write_text('hosts = [("@local", {}), ("gone", {"ssh_hostname": "127.0.0.1", "ssh_port": 1})]\n')
    assert "holds 2 hosts; choose one: --limit" in says(2, "facts", str(inventory))


def test_the_settings_page_is_what_the_command_prints() -> None:
    ended = llmhost("settings", "--markdown")
    assert ended.returncode == 0
    assert ended.stdout == (ROOT / "docs/settings.md").read_text()


def test_settings_are_listed_with_their_meaning() -> None:
    ended = llmhost("settings")
    assert ended.returncode == 0
    assert "engine_port = 8000\n    TCP port of the engine's API." in ended.stdout


@pytest.mark.parametrize("text", ["hosts = [", "raise RuntimeError('the reason')"])
def test_an_inventory_that_cannot_be_read_is_exit_2_with_its_reason(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    ended = llmhost("plan", str(file))
    assert ended.returncode == 2
    assert "broken.py" in ended.stderr
    assert "SyntaxError" in ended.stderr or "RuntimeError: the reason" in ended.stderr
    assert "Traceback" not in ended.stderr
