"""Prove deployed hosts: run tests/acceptance against them and tell the operator what came of it."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmhost import certificate
from llmhost.evidence import Plan

REPOSITORY = Path(__file__).resolve().parent.parent
ACCEPTANCE = REPOSITORY / "tests" / "acceptance"


@dataclass(frozen=True)
class Connection:
    """How to reach a host; empty means OpenSSH's own default."""

    backend: str = "ssh"  # "ssh" | "local"
    hostname: str = ""  # address or name that ssh resolves
    port: int = 0  # 0: ssh's default
    user: str = ""
    key: str = ""  # private key file
    known_hosts_file: str = ""
    strict: str = ""  # StrictHostKeyChecking: "yes" | "accept-new" | "no" | "off"
    config_file: str = ""  # another ~/.ssh/config
    sudo: bool = False  # become root by sudo, which must not ask for a password
    probe: str = "/usr/local/lib/llmhost/probe"  # where the host keeps it


@dataclass(frozen=True)
class Target:
    """One host to prove: what was planned for it, and how to reach it."""

    host: str  # its name in the inventory
    inventory: str  # the inventory file as the operator named it
    plan: Plan  # its HostPlan as JSON
    connection: Connection

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Target:
        """Raises TypeError or KeyError on a document that is none."""
        return cls(**{**document, "connection": Connection(**document["connection"])})


def write_targets(targets: Sequence[Target], file: Path) -> None:
    file.write_text(jsonlib.dumps([target.as_json() for target in targets]))


def read_targets(file: Path) -> list[Target]:
    return [Target.from_json(document) for document in jsonlib.loads(file.read_text())]


def verify(targets: Sequence[Target], reports_dir: Path, json: bool = False) -> int:
    """Prove the targets, in parallel, write their certificates and print them (`json`) or a summary.

    Returns 0 when every check of every host passed, 1 when one failed, 2 when something could not run.
    """
    if not targets:
        print("verify: no host to prove; see the inventory and --limit", file=sys.stderr)
        return 2
    began = datetime.now(UTC)
    session = run_acceptance(targets, reports_dir)
    certificates = [written for target in targets if (written := written_since(began, target, reports_dir))]
    if len(certificates) < len(targets):
        print(session.stdout + session.stderr, file=sys.stderr)
        print(f"verify: pytest ended with {session.returncode} before every host was proven", file=sys.stderr)
    if json:
        print(jsonlib.dumps(certificates, indent=2))
    else:
        for document in certificates:
            print(certificate.summary(document))
    if len(certificates) < len(targets):
        return 2
    return certificate.exit_code([document["result"] for document in certificates])


def run_acceptance(targets: Sequence[Target], reports_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests in a process of their own: deploy.py's is full of greenlets, and pytest keeps state.

    Nothing of pytest that is not needed is loaded: the figure to reach is a second, not three.
    """
    with tempfile.TemporaryDirectory(prefix="llmhost-verify-") as directory:
        file = Path(directory) / "targets.json"
        write_targets(targets, file)
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", str(ACCEPTANCE), "--quiet", "--tb=no", "--color=no"),
                *("-p", "no:cacheprovider", "-p", "no:doctest", "-p", "no:junitxml", "-p", "no:unittest"),
                *(f"--rootdir={ACCEPTANCE}", f"--confcutdir={ACCEPTANCE}", "-c", os.devnull),
                *(f"--targets={file}", f"--reports={reports_dir.resolve()}"),
            ],
            check=False,
            cwd=REPOSITORY,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


def written_since(began: datetime, target: Target, reports_dir: Path) -> certificate.Certificate | None:
    """The certificate this run wrote; an older one proves nothing."""
    path = certificate.path_of(reports_dir, target.inventory, target.host)
    if not path.is_file():
        return None
    document: certificate.Certificate = jsonlib.loads(path.read_text())
    return document if document["started"] >= certificate.utc(began) else None
