"""Open WebUI in front of the engine."""

from __future__ import annotations

from pyinfra.operations import files

from infra.hostfiles import HostFile, tree
from infra.systemd import running
from infra.task import task
from llmhost.plan.model import HostPlan, WebuiPlan
from llmhost.plan.webui import REASONS
from llmhost.render import render


@task("Open WebUI")
def open_webui(plan: HostPlan) -> None:
    """open-webui.service, ready when its database is."""
    assert plan.webui
    planned = plan.webui
    tree(
        name="configuration of open-webui",
        entries=[
            HostFile("/etc/llmhost/open-webui.env", _environment(planned), "0600"),
            HostFile(
                "/etc/systemd/system/open-webui.service",
                render("/etc/systemd/system/open-webui.service", webui=planned),
            ),
        ],
    )
    running(name="open-webui.service and llmhost.target", services=[planned.service], targets=["llmhost.target"])
    files.link(name="current release of open-webui", path=planned.release.current, target=planned.release.path)


def _environment(planned: WebuiPlan) -> str:
    return render("/etc/llmhost/open-webui.env", webui=planned, webui_reasons=REASONS)
