"""These units in these states: one look at all, then only what is due.

A restart is due when what runs differs from what is configured (the unit's inputs, recorded at its start by
runtime/inputs), so an interrupted run converges on the next; it is not due because this run changed a file.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Sequence
from typing import Any

from pyinfra import host, logger
from pyinfra.api import QuoteString, StringCommand, operation

from infra.facts import JsonFact
from llmhost.plan.model import Service


class UnitStates(JsonFact):
    """{unit: {active, sub, enabled, reload, stale}} for {unit: [input files]}."""

    program = r"""
import json, subprocess, sys
units, seen = json.loads(sys.argv[1]), {}
for unit, inputs in units.items():
    show = ["systemctl", "show", unit, "--property=ActiveState,SubState,UnitFileState,NeedDaemonReload"]
    shown = subprocess.run(show, capture_output=True, text=True).stdout
    state = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    try: stale = inputs and subprocess.run(["/usr/local/lib/llmhost/inputs", "stale", unit, *inputs]).returncode == 0
    except OSError: stale = True
    seen[unit] = {"active": state.get("ActiveState"), "sub": state.get("SubState"), "stale": bool(stale),
        "enabled": state.get("UnitFileState"), "reload": state.get("NeedDaemonReload") == "yes"}
print(json.dumps(seen))
"""


# What failed, in the service's own words: wait-ready's finding, else the last lines of the journal.
_START = r"""
if systemctl {verb} {units}; then exit 0; fi
for unit in {units}; do
    systemctl is-active --quiet "$unit" && continue
    found=$(journalctl --unit="$unit" --output=cat --lines=200 --no-pager | grep '^wait-ready: ' | tail -n 1)
    echo "$unit did not start. ${{found:-$(journalctl --unit="$unit" --output=cat --lines=15 --no-pager)}}" >&2
    echo "The whole story: journalctl --unit=$unit" >&2
done
exit 1
"""


@operation()
def running(services: Sequence[Service], enabled: Sequence[str] = ()) -> Generator[StringCommand]:
    """Make these services run from their present inputs, and be enabled.

    + services: each restarted only if it does not run, or runs from other inputs
    + enabled: further units to enable, such as a target
    """
    units = {service.unit: service.inputs for service in services} | dict.fromkeys(enabled, ())
    seen = host.get_fact(UnitStates, argument=json.dumps(units)) or {}
    if any(_of(seen, unit).get("reload") for unit in units):
        _announce("read unit files again")
        yield StringCommand("systemctl", "daemon-reload")
    to_enable = [unit for unit in units if _of(seen, unit).get("enabled") != "enabled"]
    if to_enable:
        _announce(f"enable {', '.join(to_enable)}")
        yield StringCommand("systemctl", "enable", "--quiet", *map(QuoteString, to_enable))
    to_start = [service.unit for service in services if _due(_of(seen, service.unit))]
    if to_start:
        for unit in to_start:
            _announce(f"start {unit}: {_why(_of(seen, unit))}")
        names = " ".join(map(shlex.quote, to_start))
        # A start that a killed run left going, from these very inputs, is joined and not begun again.
        verb = "restart" if any(_of(seen, unit).get("stale") for unit in to_start) else "start"
        yield StringCommand(
            "systemctl",
            "reset-failed",
            names,
            "2>/dev/null;",
            "sh",
            "-c",
            QuoteString(_START.format(verb=verb, units=names)),
        )
    if not (to_enable or to_start):
        host.noop(f"{', '.join(units)}: as planned")


def _of(seen: dict[str, dict[str, Any]], unit: str) -> dict[str, Any]:
    return seen.get(unit, {})


def _due(state: dict[str, Any]) -> bool:
    return state.get("active") != "active" or bool(state.get("stale"))


def _why(state: dict[str, Any]) -> str:
    if state.get("active") == "active":
        return "its configuration changed since it started"
    return f"it is {state.get('active') or 'not installed'} ({state.get('sub') or 'new'})"


def _announce(text: str) -> None:
    logger.info(f"{host.print_prefix}{text}")
