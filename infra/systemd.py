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

from infra.facts import JsonFact, failed_look
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


# The unit files are read by systemd's own parser before a service is touched. What failed is said in the service's own
# words: wait-ready's finding of this start, else the last lines of the journal.
_START = r"""
systemd-analyze verify --man=no {units} || exit 1
systemctl reset-failed {units} 2>/dev/null
since=$(date +%s)
if systemctl {verb} {units}; then exit 0; fi
for unit in {units}; do
    systemctl is-active --quiet "$unit" && continue
    said() {{ journalctl --unit="$unit" --since="@$since" --output=cat --no-pager "$@"; }}
    found=$(said | grep '^wait-ready: ' | head -n 1)
    echo "$unit did not start. ${{found:-$(said --lines=15)}}" >&2
    echo "The whole story: journalctl --unit=$unit" >&2
done
exit 1
"""


@operation()
def running(services: Sequence[Service], targets: Sequence[str] = ()) -> Generator[StringCommand]:
    """Make these services run from their present inputs, and be enabled.

    + services: each restarted only if it does not run, or runs from other inputs
    + targets: further units to enable and start, that group the services
    """
    units = {service.unit: service.inputs for service in services} | dict.fromkeys(targets, ())
    seen = host.get_fact(UnitStates, argument=json.dumps(units))
    if failed_look(seen):
        return
    states = {unit: (seen or {}).get(unit, {}) for unit in units}
    if any(state.get("reload") for state in states.values()):
        _announce("read unit files again")
        yield StringCommand("systemctl", "daemon-reload")
    to_enable = [unit for unit, state in states.items() if state.get("enabled") != "enabled"]
    if to_enable:
        _announce(f"enable {', '.join(to_enable)}")
        yield StringCommand("systemctl", "enable", "--quiet", *map(QuoteString, to_enable))
    for verb, due in (("restart", _outdated), ("start", _down)):
        names = [unit for unit, state in states.items() if due(state)]
        if names:
            for unit in names:
                _announce(f"{verb} {unit}: {_why(states[unit])}")
            yield StringCommand("sh", "-c", QuoteString(_START.format(verb=verb, units=shlex.join(names))))
    if not to_enable and not any(map(_is_due, states.values())):
        host.noop(f"{', '.join(units)}: as planned")


def _outdated(state: dict[str, Any]) -> bool:
    """It runs, or is about to, from other inputs: a unit's own files that matter to what runs are among them.

    Not because a file of it was not read yet: a Docker that was adopted as it runs has a new drop-in too.
    """
    return state.get("active") in ("active", "activating", "reloading") and bool(state["stale"])


def _down(state: dict[str, Any]) -> bool:
    return state.get("active") != "active" and not _outdated(state)


def _is_due(state: dict[str, Any]) -> bool:
    return bool(state.get("reload")) or _outdated(state) or _down(state)


def _why(state: dict[str, Any]) -> str:
    if _outdated(state):
        return "its configuration changed since it started"
    return f"it is {state.get('active') or 'not installed'} ({state.get('sub') or 'new'})"


def _announce(text: str) -> None:
    logger.info(f"{host.print_prefix}{text}")
