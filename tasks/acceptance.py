"""The proof: the plan is put on the host, and the host is checked against it."""

from __future__ import annotations

import json

from infra.acceptance import proven
from infra.hostfiles import HostFile, tree
from infra.task import task
from llmhost.plan.model import HostPlan, lasting


@task("Acceptance")
def acceptance(plan: HostPlan) -> None:
    """Every check of tests/acceptance; a failed one fails the host."""
    document = json.dumps(lasting(plan.as_json()), indent=1)
    tree(name="plan.json", entries=[HostFile("/etc/llmhost/plan.json", f"{document}\n")])
    proven(name="checks", plan=plan)
