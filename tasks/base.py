"""What every later step stands on: trust, addresses, packages, the user, directories, llmhost's programs, secrets."""

from __future__ import annotations

from pyinfra import host
from pyinfra.operations import server

from infra.hostfiles import HostDirectory, HostFile, tree
from infra.packages import installed
from infra.secretfiles import present
from infra.task import task
from infra.trust import trust_and_addresses
from llmhost.catalogue import ROOT
from llmhost.local_files import certificates
from llmhost.plan.model import HostPlan

PROGRAMS = ("fetch-model", "gpu-image", "gpu-probe", "inputs", "probe", "secrets", "wait-ready")


@task("Base system")
def base_system(plan: HostPlan) -> None:
    """Trust and addresses, packages, user, directories, programs and secrets."""
    assert plan.base
    ca = plan.base.ca_certificate
    trust_and_addresses(name="trust and addresses", base=plan.base, certificates=certificates(ca) if ca else ())
    installed(name="distribution packages", packages=plan.base.packages)
    server.group(name="group llmhost", group="llmhost", system=True)
    server.user(
        name="user llmhost",
        user="llmhost",
        group="llmhost",
        system=True,
        shell="/usr/sbin/nologin",
        home="/var/lib/llmhost",
        create_home=False,
        ensure_home=False,
    )
    tree(name="directories and programs", entries=[*_directories(), *_programs()])
    present(name="secrets", supplied=host.data.get("llmhost_secrets", {}))


def _directories() -> list[HostDirectory]:
    return [
        HostDirectory("/etc/llmhost"),
        HostDirectory("/opt/llmhost"),
        HostDirectory("/opt/llmhost/locks"),
        HostDirectory("/opt/llmhost/releases"),
        HostDirectory("/usr/local/lib/llmhost"),
        HostDirectory("/usr/local/lib/llmhost/python"),
        HostDirectory("/var/lib/llmhost"),
        HostDirectory("/var/lib/llmhost/cache", "0750", "llmhost", "llmhost"),
        HostDirectory("/var/lib/llmhost/models"),
        HostDirectory("/var/lib/llmhost/webui", "0700", "llmhost", "llmhost"),
    ]


def _programs() -> list[HostFile]:
    programs = [HostFile(f"/usr/local/lib/llmhost/{name}", _shipped(name), "0755") for name in PROGRAMS]
    return [*programs, HostFile("/usr/local/lib/llmhost/python/require_key.py", _shipped("require_key.py"))]


def _shipped(name: str) -> str:
    return (ROOT / "runtime" / name).read_text()
