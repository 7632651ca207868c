"""Python environments: uv, then one immutable release for the engine and one for Open WebUI."""

from __future__ import annotations

from infra.hostfiles import HostFile, tree
from infra.releases import LOCKS, release, uv
from infra.task import task
from llmhost.catalogue import ROOT, uv_version
from llmhost.plan.model import HostPlan


@task("Python environment")
def python_environment(plan: HostPlan) -> None:
    """uv and the locked releases."""
    assert plan.base and plan.engine and plan.webui
    locks = ("locks/uv.txt", plan.engine.release.lock, plan.webui.release.lock)
    tree(name="locks", entries=[_lock(path) for path in locks])
    uv(name=f"uv {uv_version()}", version=uv_version(), lock=f"{LOCKS}/uv.txt", base=plan.base)
    release(name=plan.engine.release.identity, release=plan.engine.release, base=plan.base)
    release(name=plan.webui.release.identity, release=plan.webui.release, base=plan.base)


def _lock(path: str) -> HostFile:
    return HostFile(f"{LOCKS}/{path.rpartition('/')[2]}", (ROOT / path).read_text())
