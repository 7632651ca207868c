"""The model's files, fetched by the hub's own client and verified."""

from __future__ import annotations

from infra.models import fetched
from infra.task import task
from llmhost.plan.model import HostPlan


@task("Model")
def model(plan: HostPlan) -> None:
    """Fetch and verify; a local model is the operator's own."""
    assert plan.base and plan.engine
    planned = plan.engine.model
    if planned.repository:
        python = f"{plan.engine.release.path}/venv/bin/python"
        fetched(name=f"{planned.name} at {planned.revision[:12]}", model=planned, base=plan.base, python=python)
