"""The proof: the plan is put on the host, and the host is checked against it."""

from __future__ import annotations

import json

from infra.acceptance import proven
from infra.hostfiles import HostFile, tree
from infra.task import task
from llmhost.plan.model import HostPlan


@task("Acceptance")
def acceptance(plan: HostPlan) -> None:
    """Every check of tests/acceptance; a failed one fails the host."""
    tree(name="plan.json", entries=[HostFile("/etc/llmhost/plan.json", json.dumps(plan.as_json(), indent=1) + "\n")])
    proven(name="checks", plan=plan)
