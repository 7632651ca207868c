"""The engine: write its configuration, start it until it has answered, then call its release the current one."""

from __future__ import annotations

from pyinfra.operations import files

from infra.hostfiles import HostFile, tree
from infra.systemd import running
from infra.task import task
from llmhost.plan.model import HostPlan
from llmhost.render import render


@task("Engine")
def engine(plan: HostPlan) -> None:
    """vllm.service, ready only when it has answered a completion."""
    assert plan.engine
    planned = plan.engine
    tree(
        name="configuration of vllm",
        entries=[
            HostFile("/etc/llmhost/vllm.yaml", render("/etc/llmhost/vllm.yaml", engine=planned)),
            HostFile("/etc/llmhost/vllm.env", render("/etc/llmhost/vllm.env", engine=planned), "0600"),
            HostFile("/etc/systemd/system/vllm.service", render("/etc/systemd/system/vllm.service", engine=planned)),
            HostFile("/etc/systemd/system/llmhost.target", render("/etc/systemd/system/llmhost.target")),
        ],
    )
    running(name="vllm.service", services=[planned.service])
    files.link(name="current release of vllm", path=planned.release.current, target=planned.release.path)
