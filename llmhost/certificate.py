"""A host's certificate: what acceptance saw there, as one JSON file per host (docs/acceptance.md)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmhost.checks import plan_hash
from llmhost.evidence import FAILED, PASSED, SKIPPED, Plan, Result

COULD_NOT_RUN = "could-not-run"

Certificate = dict[str, Any]


def certificate(
    host: str,
    inventory: str,
    plan: Plan,
    results: Sequence[Result],
    figures: dict[str, float],
    started: datetime,
    finished: datetime,
    simulated: Sequence[str] = (),
) -> Certificate:
    """The certificate of one host. `started` and `finished` carry a time zone; the file has them in UTC.

    `simulated` names what of the host is a stand-in for hardware or a vendor's software: nothing on a real one.
    """
    return {
        "host": host,
        "inventory": inventory,
        "release": plan["engine"]["release"]["identity"] if plan.get("engine") else "",
        "plan_hash": plan_hash(plan),
        "started": utc(started),
        "finished": utc(finished),
        "simulated": list(simulated),
        "result": overall(results),
        "checks": [dataclasses.asdict(result) for result in results],
        "figures": dict(sorted(figures.items())),
    }


def overall(results: Sequence[Result]) -> str:
    """`passed` only if every check was made and passed: one that could not be made is no pass."""
    states = {result.state for result in results}
    if FAILED in states:
        return FAILED
    return PASSED if states == {PASSED} else COULD_NOT_RUN


def exit_code(results: Sequence[str]) -> int:
    """Of several hosts' results: 0 all passed, 1 a check failed, 2 something could not run (or there was no host)."""
    if FAILED in results:
        return 1
    return 0 if results and set(results) == {PASSED} else 2


def path_of(reports: Path, inventory: str, host: str) -> Path:
    """reports/<inventory's name>/<host>.json"""
    return reports / Path(inventory).stem / f"{re.sub(r'[^A-Za-z0-9._@-]', '_', host)}.json"


def write(document: Certificate, reports: Path) -> Path:
    """Put the certificate in its place, whole or not at all."""
    path = path_of(reports, document["inventory"], document["host"])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(document, indent=2) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def summary(document: Certificate) -> str:
    """What an operator reads: a line for the host, and three for each check that did not pass.

    The line of a host with stand-ins begins with SIMULATED: nothing it says may be taken for a proof of hardware.
    """
    count = dict.fromkeys((PASSED, FAILED, SKIPPED), 0)
    for check in document["checks"]:
        count[check["state"]] += 1
    counts = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    figures = document["figures"]
    measured = [
        f"{label} {figures[name]:.{digits}f} {unit}"
        for name, label, digits, unit in (
            ("ttft_seconds", "TTFT", 2, "s"),
            ("tokens_per_second", "decode", 0, "tokens/s"),
            ("webui_ttft_seconds", "TTFT in Open WebUI", 2, "s"),
        )
        if name in figures
    ]
    simulated = document["simulated"]
    line = f"{document['host']}: {document['result']} ({'; '.join([counts, *measured])})"
    lines = [f"SIMULATED {line}", *(f"  not real  {one}" for one in simulated)] if simulated else [line]
    for cause, ids in causes(document["checks"]):
        state, expected, seen, remedy = cause
        lines += [f"  {state} {listed(ids)}", f"    expected  {expected}", f"    seen      {seen}"]
        lines += [f"    remedy    {remedy}"] if remedy else []
    return "\n".join(lines)


def causes(checks: Sequence[Certificate]) -> list[tuple[tuple[str, str, str, str], list[str]]]:
    """The checks that did not pass, those skipped for one and the same reason together."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for check in checks:
        if check["state"] == FAILED:
            expected = text(check["expected"])
        elif check["state"] == SKIPPED:
            expected = "to be able to look"
        else:
            continue
        grouped.setdefault((check["state"], expected, text(check["seen"]), check["remedy"]), []).append(check["id"])
    return list(grouped.items())


def listed(ids: Sequence[str]) -> str:
    """Up to four names in full; of more, how many and of which groups."""
    if len(ids) <= 4:
        return ", ".join(ids)
    return f"{len(ids)} checks of {', '.join(dict.fromkeys(one.partition('.')[0] for one in ids))}"


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
