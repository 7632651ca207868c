"""Look at the host, plan, and refuse before anything is touched."""

from __future__ import annotations

import json

from pyinfra import host, logger

from infra.facts import HostFacts, Unreachable, hardware
from infra.guard import inventory_argument
from infra.inventory import load_settings
from infra.task import refuse
from llmhost.hardware import FactsError
from llmhost.plan.host import downloads, plan
from llmhost.plan.model import HostPlan, Problem
from llmhost.settings import Loaded, SettingsError, supplied_secrets

_OTHER_MIRROR = "Open the way (proxy, firewall, name server), or set it to a mirror that the host reaches"

_PASSWORD = Problem(
    "ssh_password",
    "the inventory or the command line",
    "acceptance connects with OpenSSH, which takes no password from here",
    "Use a key: ssh-copy-id, then ssh_key or the agent",
)


def preflight() -> HostPlan:
    """The host's plan; a refused host takes no further part in the run."""
    if host.data.get("ssh_password"):
        refuse([_PASSWORD])
        return HostPlan(host.name, (), (_PASSWORD,))
    try:
        loaded = load_settings(host, inventory_argument())
        # As whoever logs in, whatever --sudo says: only then is it seen who that is.
        seen = hardware(host.get_fact(HostFacts, _sudo=False))
    except SettingsError as error:
        refuse(error.problems)
        return HostPlan(host.name, (), error.problems)
    except FactsError as error:
        unreadable = Problem("host", host.name, str(error), "Run `llmhost facts HOST` to see what it answers")
        refuse([unreadable])
        return HostPlan(host.name, (), (unreadable,))
    decided = plan(loaded, seen, host.name)
    problems = decided.problems or _unreachable(downloads(decided, seen), loaded)
    if problems:
        refuse(problems)
        return decided
    # The one place that knows how to become root; every operation of this host follows.
    host.data._sudo = seen.user != "root"
    host.data.llmhost_secrets = supplied_secrets(loaded.settings)
    logger.info(f"{host.print_prefix}Planned: {len(decided.decisions)} decisions (llmhost plan gives each reason)")
    return decided


def _unreachable(wanted: dict[str, str], loaded: Loaded) -> tuple[Problem, ...]:
    if not wanted:
        return ()
    failed = host.get_fact(Unreachable, argument=json.dumps(sorted(set(wanted.values())))) or {}
    return tuple(
        Problem(setting, loaded.source(setting), f"{url} cannot be reached from the host: {failed[url]}", _OTHER_MIRROR)
        for setting, url in wanted.items()
        if url in failed
    )
