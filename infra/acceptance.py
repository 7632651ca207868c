"""Run the acceptance checks of one host as the last operation of its deploy."""

from __future__ import annotations

from collections.abc import Generator
from datetime import UTC, datetime

from pyinfra import host, logger, state
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from infra.guard import inventory_argument
from infra.inventory import connection
from llmhost.catalogue import ROOT
from llmhost.certificate import summary
from llmhost.plan.model import HostPlan
from llmhost.verify import Target, run_acceptance, written_since

REPORTS = ROOT / "reports"


@operation()
def proven(plan: HostPlan) -> Generator[FunctionCommand]:
    """The host passes acceptance against this plan; checking changes nothing, so it reports no change.

    A process of its own per host: pytest keeps global state, and hosts are checked side by side.
    """
    if state.is_executing and not _passes(plan):
        yield FunctionCommand(_failed, (), {})


def _passes(plan: HostPlan) -> bool:
    target = Target(host.name, inventory_argument(), plan.as_json(), connection(host))
    began = datetime.now(UTC)
    session = run_acceptance([target], REPORTS)
    certificate = written_since(began, target, REPORTS)
    lines = summary(certificate) if certificate else session.stdout + session.stderr
    for line in lines.splitlines():
        logger.info(f"{host.print_prefix}{line}")
    return certificate is not None and certificate["result"] == "passed"


def _failed(state: State, host: Host) -> bool:
    return False
