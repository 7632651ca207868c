"""How one check is read: a row, what runtime/probe saw on the host, and what that comes to.

A row names the place in the evidence and what its plan expects to be found. No row passes on missing evidence:
a service that answered wrongly or not at all is `failed`; what could not be looked at is `skipped`, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Plan = dict[str, Any]  # a HostPlan as JSON
Evidence = dict[str, Any]  # what runtime/probe printed

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

DEPLOY = "deploy this host again: pyinfra INVENTORY deploy.py"


@dataclass(frozen=True)
class Check:
    """One row. `look` is a path into the evidence; `view` condenses what lies there for the eye and for `agrees`."""

    id: str  # "engine.completion": its group, a dot, what is proven
    look: str  # "engine/completion/text"
    expected: Any  # a value, or a function that takes it from the plan
    remedy: str
    agrees: Callable[[Any, Any], bool] = operator.eq  # (expected, seen)
    view: Callable[[Any, Plan], Any] = lambda seen, plan: seen

    @property
    def group(self) -> str:
        return self.id.split(".")[0]


@dataclass(frozen=True)
class Result:
    """What one check came to on one host. `seconds` is how long the look itself took; `remedy` is empty when passed."""

    id: str
    group: str
    state: str  # PASSED | FAILED | SKIPPED
    expected: Any
    seen: Any
    seconds: float
    remedy: str


def evaluate(check: Check, plan: Plan, evidence: Evidence) -> Result:
    """Read one row. Never raises: evidence of an unexpected shape fails the check."""
    expected = expectation(check, plan)
    seconds = 0.0
    try:
        found, seconds = find(evidence, check.look)
        seen = check.view(found, plan)
        state = PASSED if check.agrees(expected, seen) else FAILED
    except ServiceFailed as failure:
        state, seen, seconds = FAILED, str(failure), failure.seconds
    except CouldNotLook as reason:
        state, seen = SKIPPED, str(reason)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        state, seen = FAILED, f"evidence of an unexpected shape at {check.look} ({type(error).__name__}: {error})"
    return Result(check.id, check.group, state, expected, seen, seconds, "" if state == PASSED else check.remedy)


def expectation(check: Check, plan: Plan) -> Any:
    return check.expected(plan) if callable(check.expected) else check.expected


# --- finding evidence -----------------------------------------------------------------------------------------


class ServiceFailed(Exception):
    """The host did not do what was asked of it: a sentence saying what it did instead."""

    def __init__(self, sentence: str, seconds: float) -> None:
        super().__init__(sentence)
        self.seconds = seconds


class CouldNotLook(Exception):
    """There is no evidence either way: a sentence saying why."""


def find(evidence: Evidence, look: str) -> tuple[Any, float]:
    """What lies at the path, and the seconds that look took."""
    node: Any = evidence
    seconds = 0.0
    for name in look.split("/"):
        if not isinstance(node, dict):
            raise CouldNotLook(f"the probe saw nothing at {look}")
        refuse(node, look, seconds)
        if name not in node:
            raise missing(node, look, evidence, seconds)
        node = node[name]
        if isinstance(node, dict) and isinstance(node.get("seconds"), (int, float)):
            seconds = node["seconds"]
    if isinstance(node, dict):
        refuse(node, look, seconds)
    return node, seconds


def refuse(node: dict[str, Any], look: str, seconds: float) -> None:
    """Stop at a part of the evidence that says why it is not one."""
    if reason := node.get("could_not_look"):
        raise CouldNotLook(f"the probe could not look at {look.partition('/')[0]}: {reason}")
    if node.get("status") == 429:
        raise CouldNotLook("refused as too frequent (429): Open WebUI allows 15 sign-ins in 3 minutes, wait that long")
    if error := node.get("error"):
        status = f"{node['status']}: " if "status" in node else ""
        raise ServiceFailed(f"{status}{error}", seconds)


def missing(node: dict[str, Any], look: str, evidence: Evidence, seconds: float) -> Exception:
    if "status" in node:
        return ServiceFailed(f"answered {node['status']}", seconds)
    if unfinished := evidence.get("probe", {}).get("unfinished"):
        return ServiceFailed(f"{look} was {unfinished}", seconds)
    return CouldNotLook(f"the probe saw nothing at {look}")


def includes(expected: list[str], seen: list[str]) -> bool:
    """Nothing of what is expected is missing; expecting nothing proves nothing."""
    return bool(expected) and set(expected) <= set(seen)
