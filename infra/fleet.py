"""Look at the hosts of an inventory, side by side, without changing them: for `llmhost plan`, `facts` and `verify`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

# First: pyinfra_cli makes sockets and processes cooperative, which must come before they are imported elsewhere.
from pyinfra_cli.inventory import make_inventory  # isort: skip
from pyinfra import logger
from pyinfra.api import Config, State
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.facts import get_facts
from pyinfra.api.host import Host
from pyinfra.context import ctx_state
from pyinfra_cli.exceptions import UnexpectedExternalError
from pyinfra_cli.util import parse_cli_arg

from infra.facts import HostFacts, hardware
from infra.inventory import connection, load_settings
from llmhost.hardware import FactsError
from llmhost.plan.host import plan
from llmhost.plan.model import HostPlan, Problem
from llmhost.settings import SettingsError
from llmhost.verify import Target


class EmptyInventory(Exception):
    """No host to look at; the message names the inventory and the limit."""


@dataclass(frozen=True)
class Seen:
    """A host and the facts it gave, or why it gave none."""

    host: Host
    facts: str
    error: str


def hosts(inventory: str, limit: Iterable[str] = (), data: Iterable[str] = ()) -> list[Host]:
    """The hosts of an inventory file (or a host name), narrowed by names, globs or groups; not yet connected."""
    if inventory.endswith(".py") and not Path(inventory).is_file():
        raise EmptyInventory(f"there is no inventory file {inventory}")
    overrides = {name: parse_cli_arg(value) for name, _, value in (item.partition("=") for item in data)}
    state = State()
    ctx_state.set(state)  # inventories and group data are read in the context of a run
    try:
        made = make_inventory(inventory, override_data=overrides, cwd=str(Path.cwd()))
    except UnexpectedExternalError as error:  # the inventory, or a file of group_data, raised it
        raise EmptyInventory(f"{error.filename}: {type(error.exception).__name__}: {error.exception}") from None
    except SyntaxError as error:
        raise EmptyInventory(f"{error.filename}: SyntaxError: {error}") from None
    state.init(made, Config())
    patterns = list(limit)
    chosen = [h for h in made if not patterns or any(fnmatch(h.name, p) or p in h.groups for p in patterns)]
    if not chosen:
        raise EmptyInventory(f"no host of {inventory} matches {' '.join(patterns) or 'it'}")
    return chosen


def look(chosen: list[Host]) -> Iterator[Seen]:
    """Connect to all hosts at once and run the fact script on each, one round trip."""
    state = chosen[0].state
    state.limit_hosts = chosen
    errors: dict[str, str] = {}
    with _Listening(errors):
        try:
            connect_all(state)
        except PyinfraError:
            pass  # every host failed: each has its own error
        answers = (
            get_facts(state, HostFacts, kwargs={"_sudo": False}, apply_failed_hosts=False) if state.active_hosts else {}
        )
    for host in chosen:
        facts = answers.get(host) or ""
        yield Seen(host, facts, "" if facts else errors.get(host.name, "gave no facts"))
    disconnect_all(state)


def plan_hosts(inventory: str, chosen: list[Host], recorded: str | None) -> list[HostPlan]:
    """A plan for each host, from recorded facts where given, else from the hosts themselves.

    A host that cannot be looked at gets a plan that only says so (`unreachable`).
    """
    if recorded is not None:
        return [_plan(inventory, host, recorded) for host in chosen]
    return [_planned(inventory, seen) for seen in look(chosen)]


def targets(inventory: str, limit: Iterable[str] = (), data: Iterable[str] = ()) -> list[Target]:
    """What acceptance needs of each host: its plan as of now, and how to reach it."""
    chosen = hosts(inventory, limit, data)
    return [
        Target(p.host, inventory, p.as_json(), connection(host))
        for host, p in zip(chosen, plan_hosts(inventory, chosen, None), strict=True)
    ]


def unreachable(p: HostPlan) -> bool:
    """Whether a plan only says that its host could not be looked at."""
    return any(problem.setting == "host" for problem in p.problems)


def _planned(inventory: str, seen: Seen) -> HostPlan:
    if seen.error:
        remedy = f"Try: ssh {connection(seen.host).hostname}. Settings: ssh_hostname, ssh_user, ssh_key, ssh_port"
        return HostPlan(seen.host.name, (), (Problem("host", inventory, seen.error, remedy),))
    return _plan(inventory, seen.host, seen.facts)


def _plan(inventory: str, host: Host, facts: str) -> HostPlan:
    try:
        loaded = load_settings(host, inventory)
        found = hardware(facts)
    except SettingsError as error:
        return HostPlan(host.name, (), error.problems)
    except FactsError as error:
        return HostPlan(
            host.name, (), (Problem("host", inventory, str(error), "Record them with: llmhost facts HOST"),)
        )
    host.data._sudo = found.user != "root"
    return plan(loaded, found, host.name)


class _Listening(logging.Handler):
    """Collect what pyinfra says of each host, instead of printing it."""

    def __init__(self, errors: dict[str, str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def __enter__(self) -> None:
        self._before = logger.handlers[:], logger.propagate
        logger.handlers, logger.propagate = [self], False

    def __exit__(self, *_: object) -> None:
        logger.handlers, logger.propagate = self._before

    def emit(self, record: logging.LogRecord) -> None:
        name, _, text = record.getMessage().strip().lstrip("[").partition("]")
        self._errors.setdefault(name.strip(), text.strip())
