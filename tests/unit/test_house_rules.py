"""House law that a linter cannot see (CONTRIBUTING.md). Each rule comes with what it forbids, and must catch that."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmhost.catalogue import ROOT

# --- Python -----------------------------------------------------------------------------------------------------

LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
ALL = ("deploy.py", "upgrade.py", "tasks/*.py", "infra/*.py", "llmhost/**/*.py", "lab/**/*.py")
# Who may read or write pyinfra's data: the door (settings), what pyinfra itself must be told, and the secrets' way.
READS_HOST_DATA = {
    "infra/inventory.py",
    "infra/guard.py",
    "infra/task.py",
    "infra/fleet.py",
    "tasks/preflight.py",
    "tasks/base.py",
}
IMPURE = {"pyinfra", "infra", "tasks", "os", "sys", "subprocess", "socket", "httpx", "urllib.request", "time", "random"}


def own_operations() -> set[str]:
    """Names of infra's operations: functions decorated with pyinfra's @operation."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "infra").glob("*.py")]
    return {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and is_one(node)
    }


def is_one(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("operation(") for decorator in function.decorator_list)


OWN_OPERATIONS = own_operations()


def operations(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of operations: infra's by their name, pyinfra's as an attribute of a module of pyinfra.operations."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {a.asname or a.name for node in imports if node.module == "pyinfra.operations" for a in node.names}
    own = {
        a.asname or a.name
        for node in imports
        if (node.module or "").startswith(("infra.", "pyinfra.operations."))
        for a in node.names
        if a.name in OWN_OPERATIONS or (node.module or "").startswith("pyinfra.operations.")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in own:
                yield node
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in modules:
                yield node


def within(tree: ast.AST, kinds: tuple[type[ast.AST], ...]) -> set[ast.AST]:
    """Every node inside a node of these kinds."""
    return {
        inner for node in ast.walk(tree) if isinstance(node, kinds) for inner in ast.walk(node) if inner is not node
    }


def unnamed(tree: ast.AST) -> list[ast.AST]:
    return [call for call in operations(tree) if "name" not in [keyword.arg for keyword in call.keywords]]


def at_module_level(tree: ast.AST) -> list[ast.AST]:
    inside = within(tree, FUNCTIONS)
    return [call for call in operations(tree) if call not in inside]


def in_plain_loops(tree: ast.AST) -> list[ast.AST]:
    plain = [loop for loop in ast.walk(tree) if isinstance(loop, LOOPS) and "host.loop(" not in iterated(loop)]
    inside = {inner for loop in plain for inner in ast.walk(loop)}
    return [call for call in operations(tree) if call in inside]


def iterated(loop: ast.AST) -> str:
    return ast.unparse(loop.iter) if isinstance(loop, ast.For) else ""


def changed_given_a_list(tree: ast.AST) -> list[ast.AST]:
    gathered = (ast.List, ast.Tuple, ast.Set, ast.ListComp, ast.GeneratorExp)
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in ("any_changed", "all_changed")
        and any(isinstance(argument, gathered) for argument in node.args)
    ]


def decided_before_the_run(tree: ast.AST) -> list[ast.AST]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("changed", "will_change")]


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def is_from(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def other_tasks(tree: ast.AST) -> list[ast.AST]:
    return [node for node, name in imported(tree) if is_from(name, {"tasks"})]


def impure(tree: ast.AST) -> list[ast.AST]:
    return [node for node, name in imported(tree) if is_from(name, IMPURE)]


def pyinfra_at_module_level(tree: ast.AST) -> list[ast.AST]:
    inside = within(tree, FUNCTIONS)
    return [
        node
        for node, name in imported(tree)
        if is_from(name, {"pyinfra", "pyinfra_cli", "infra"}) and node not in inside
    ]


def pyinfra_anywhere(tree: ast.AST) -> list[ast.AST]:
    return [node for node, name in imported(tree) if is_from(name, {"pyinfra", "pyinfra_cli", "infra"})]


def host_data(tree: ast.AST) -> list[ast.AST]:
    data = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "data"]
    return [node for node in data if ast.unparse(node.value).rpartition(".")[2] == "host"]


@dataclass(frozen=True)
class Rule:
    """What is forbidden where, and an example of it."""

    forbidden: str
    find: Callable[[ast.AST], list[ast.AST]]
    where: tuple[str, ...]
    example: str
    excepted: frozenset[str] = frozenset()


TREE = "from infra.hostfiles import tree\nfrom pyinfra.operations import files\nfrom pyinfra import host\n"
RULES = (
    Rule("an operation without name=: its arguments are printed", unnamed, ("tasks/*.py",), TREE + "tree(entries=[])"),
    Rule("pyinfra's operation without name=", unnamed, ("tasks/*.py",), TREE + "files.link(path='/a')"),
    Rule(
        "an operation at module level: it runs for one host only",
        at_module_level,
        ("tasks/*.py", "deploy.py", "upgrade.py"),
        TREE + "tree(name='x')",
    ),
    Rule(
        "a plain loop that emits operations: hosts get mixed up, host.loop keeps them apart",
        in_plain_loops,
        ("tasks/*.py", "deploy.py", "upgrade.py"),
        TREE + "def f():\n for path in paths:\n  files.link(name=path, path=path)",
    ),
    Rule(
        "a comprehension of operations",
        in_plain_loops,
        ("tasks/*.py",),
        TREE + "def f(): return [tree(name=n) for n in names]",
    ),
    Rule(
        "any_changed([...]): it fails on the real run, it wants any_changed(a, b)",
        changed_given_a_list,
        ALL,
        "any_changed([a, b])",
    ),
    Rule("all_changed([...])", changed_given_a_list, ALL, "util.all_changed(op for op in operations)"),
    Rule(".changed: decided before the run; use did_change", decided_before_the_run, ALL, "if op.changed: restart()"),
    Rule(
        ".will_change: decided before the run; use did_change",
        decided_before_the_run,
        ALL,
        "f(restarted=op.will_change)",
    ),
    Rule("a task that imports a task", other_tasks, ("tasks/*.py",), "from tasks.base import PROGRAMS"),
    Rule("a task that imports tasks", other_tasks, ("tasks/*.py",), "import tasks.base"),
    Rule(
        "host.data outside the door: settings come checked, from the plan",
        host_data,
        ALL,
        "host.data.get('x')",
        frozenset(READS_HOST_DATA),
    ),
    Rule("another host's data", host_data, ALL, "self.host.data.engine_port", frozenset(READS_HOST_DATA)),
    Rule(
        "llmhost that needs pyinfra to be imported",
        pyinfra_at_module_level,
        ("llmhost/**/*.py",),
        "from infra import fleet",
    ),
    Rule(
        "llmhost that knows pyinfra, but for its command",
        pyinfra_anywhere,
        ("llmhost/**/*.py",),
        "def f():\n from pyinfra.api import State",
        frozenset({"llmhost/cli.py"}),
    ),
    Rule("a planner that reaches out", impure, ("llmhost/plan/*.py",), "import urllib.request"),
    Rule("a planner that asks the machine", impure, ("llmhost/plan/*.py",), "from os import environ"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.forbidden)
def test_python_keeps_the_house_rules(rule: Rule) -> None:
    files = sorted({path for pattern in rule.where for path in ROOT.glob(pattern)})
    assert files
    assert [
        f"{place(path)}:{line}"
        for path in files
        if place(path) not in rule.excepted
        for line in lines(rule, path.read_text())
    ] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.forbidden)
def test_each_rule_catches_what_it_forbids(rule: Rule) -> None:
    assert lines(rule, rule.example)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.excepted], ids=lambda rule: rule.forbidden)
def test_each_exception_is_needed(rule: Rule) -> None:
    assert [path for path in sorted(rule.excepted) if not lines(rule, (ROOT / path).read_text())] == []


def test_what_the_rules_allow_is_not_caught() -> None:
    allowed = TREE + (
        "def f():\n"
        " entries = [entry(p) for p in paths]\n"
        " changed = tree(name='x', entries=entries)\n"
        " for path in host.loop(paths):\n  files.link(name=path, path=path, _if=any_changed(changed, *others))\n"
    )
    assert [r.forbidden for r in RULES if "tasks/*.py" in r.where and lines(r, allowed)] == []


def lines(rule: Rule, source: str) -> list[int]:
    return [int(getattr(node, "lineno", 0)) for node in rule.find(ast.parse(source))]


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- templates and programs -------------------------------------------------------------------------------------

TEMPLATES = sorted((ROOT / "templates").rglob("*.j2"))
PROGRAMS = sorted(path for path in (ROOT / "runtime").iterdir() if path.is_file())


def header_faults(path: str, text: str) -> bool:
    """Whether what lands on a host does not say where it comes from, in its first line or below a #! line."""
    return f"# llmhost: {path} " not in "".join(f"{line} \n" for line in text.splitlines()[:2] if line.startswith("#"))


def arithmetic(text: str) -> list[str]:
    """Jinja tags that compute; strings are no matter, nor the - of whitespace control."""
    tags = re.findall(r"{[{%]-?(.*?)-?[}%]}", text, re.DOTALL)
    return [tag for tag in tags if re.search(r"[-+*/%]|//", re.sub(r"""'[^']*'|"(?:\\.|[^"\\])*\"""", "", tag))]


@pytest.mark.parametrize("path", [*TEMPLATES, *PROGRAMS], ids=place)
def test_what_lands_on_a_host_names_its_source(path: Path) -> None:
    assert not header_faults(place(path), path.read_text())


def test_a_missing_or_wrong_header_is_caught() -> None:
    assert header_faults("runtime/a", "#!/bin/sh\nset -u\n# llmhost: runtime/a - too late\n")
    assert header_faults("runtime/a", "# llmhost: runtime/ab - another's\n")
    assert header_faults("runtime/a", "")
    assert not header_faults("runtime/a", "#!/bin/sh\n# llmhost: runtime/a\n")


@pytest.mark.parametrize("path", TEMPLATES, ids=place)
def test_templates_do_not_compute(path: Path) -> None:
    assert arithmetic(path.read_text()) == []


@pytest.mark.parametrize(
    "text", ["{{ a + 1 }}", "{{ a-1 }}", "{% set b = a * 2 %}", "{{ a // b }}", "{{ a % b }}", "{%- if a / 2 -%}"]
)
def test_arithmetic_is_caught(text: str) -> None:
    assert arithmetic(text)


@pytest.mark.parametrize(
    "text", ["{{- a -}}", "{%- if a -%}", "{{ 'a-b' }}", "a - b", "{% for x in y %}{{ x | tojson }}"]
)
def test_no_arithmetic_is_not_caught(text: str) -> None:
    assert not arithmetic(text)


# --- every tracked file -----------------------------------------------------------------------------------------

# Written in pieces: this file is tracked too.
REGISTRIES: tuple[str, ...] = (
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "deb.debian" + ".org",
    "security.debian" + ".org",
)
REGISTRIES += ("archive.ubuntu" + ".com", "npmjs" + ".org", "npmjs" + ".com")
OF_THIS_MACHINE = ("/wo" + "rk/", "/opt/" + "wheels", "/root/" + ".pyenv")
LEFT_UNDONE = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
FORBIDDEN = {
    "a registry, which clients know by themselves or a setting names": "|".join(map(re.escape, REGISTRIES)),
    "a path of one machine": "|".join(rf"(?<![\w.}}]){re.escape(path)}" for path in OF_THIS_MACHINE),
    "work left undone, which belongs into an issue": rf"\b(?:{'|'.join(LEFT_UNDONE)})\b",
}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git cannot list the files: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_no_tracked_file_holds(forbidden: str) -> None:
    pattern = re.compile(FORBIDDEN[forbidden])
    files = tracked()
    assert len(files) > 50
    assert [
        f"{place(path)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ] == []


@pytest.mark.parametrize("text", [*REGISTRIES, *OF_THIS_MACHINE, *LEFT_UNDONE])
def test_each_forbidden_text_is_caught(text: str) -> None:
    assert any(re.search(pattern, f"# see {text} for more") for pattern in FORBIDDEN.values())
