"""The one schema of everything an operator can set.

Settings are flat names in pyinfra's data (inventory, group_data, --data), because pyinfra merges data per key.
`load` takes the layers in pyinfra's order of precedence, remembers which layer each value came from, and either
returns a complete, typed `Settings` or raises `SettingsError` with every problem found, not only the first.
`docs/settings.md` is generated from this file (`llmhost settings --markdown`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from llmhost.catalogue import drivers
from llmhost.plan.model import Problem

# Names in pyinfra's data that belong to pyinfra itself: connector data and global arguments.
PYINFRA_PREFIXES = ("_", "ssh_", "podman_", "chroot_", "vagrant_", "terraform_", "local_", "fake_")
PYINFRA_NAMES = frozenset({"docker_identifier", "docker_platform", "docker_architecture"})  # docker_source is ours


# URLs are written into configuration that root's apt, Docker and systemd read: what could end a line, a string or a
# statement there is no part of one. urlsplit would drop line ends, and take the rest.
_URL = re.compile(
    r"https?://(?:[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?|\[(?P<ipv6>[^\]]+)\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/(?:[A-Za-z0-9._~+=,:-]|%[0-9A-Fa-f]{2})*)*)"
)


def _url(value: str) -> str:
    if "@" in value:
        # It would be shown in plans, and stand in arguments on the host.
        raise PydanticCustomError("credentials", "expected a URL without user and password (the value is not shown)")
    found = _URL.fullmatch(value)
    if value and not (found and 1 <= int(found["port"] or 1) <= 65535 and _is_ipv6(found["ipv6"] or "::")):
        raise ValueError(
            "expected a URL such as https://mirror.example/simple/, or nothing: http or https, a host name, a port of "
            "1 to 65535 if any, and a path of letters, digits and ._~+=,:%/-"
        )
    return value


def _is_ipv6(address: str) -> bool:
    try:
        return "%" not in str(IPv6Address(address))  # no zone: it means another link on each machine
    except ValueError:
        return False


def _needed_url(value: str, info: ValidationInfo) -> str:
    if not value:
        default = Settings.model_fields[str(info.field_name)].default
        raise ValueError(f"cannot be empty; its default is {default}")
    return _url(value)


def _registry(value: str) -> str:
    # dockerd would not start: "invalid mirror: path, query, or fragment at end of the URI".
    found = _URL.fullmatch(_url(value))
    if found and found["path"] not in ("", "/"):
        raise ValueError(
            "expected a registry without a path, such as https://mirror.example:5000: Docker takes no other"
        )
    return value


def _email(value: str) -> str:
    # The form Open WebUI itself accepts (its validate_email_format); anything else fails only at first sign-in.
    if value != "admin@localhost" and not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s]+", value):
        raise ValueError("expected an e-mail address such as admin@example.com")
    return value


def _password(value: SecretStr | None) -> SecretStr | None:
    if value is None:
        return None
    size = len(value.get_secret_value().encode())
    if not 8 <= size <= 72:  # bcrypt reads 72 bytes and Open WebUI refuses more (field notes, Open WebUI, 5)
        raise ValueError(f"expected 8 to 72 bytes, got {size}")
    return _one_line(value)


def _key(value: SecretStr | None) -> SecretStr | None:
    if value is not None and len(value.get_secret_value()) < 22:
        raise ValueError("expected at least 22 characters (128 bits)")
    return _one_line(value)


def _one_line(value: SecretStr | None) -> SecretStr | None:
    if value is not None and not re.fullmatch(r"[A-Za-z0-9._+/=:@%^,-]+", value.get_secret_value()):
        raise ValueError("expected only letters, digits and ._+/=:@%^,- (it is written to an environment file)")
    return value


def _model(value: str) -> str:
    # It becomes an argument, a directory and a line of a unit file on the host.
    if not re.fullmatch(r"/[A-Za-z0-9._/-]*[A-Za-z0-9._-]|([A-Za-z0-9._-]+/)?[A-Za-z0-9._-]+", value) or ".." in value:
        raise ValueError("expected a catalogue name, owner/name, or an absolute path, of letters, digits and ._-")
    return value


def _revision(value: str) -> str:
    if value and not re.fullmatch(r"[0-9a-f]{40}", value):
        raise ValueError("expected the 40 hexadecimal digits of a commit (a branch or tag can move)")
    return value


def _key_file(value: str) -> str:
    if not value:
        raise ValueError('a repository without a key is not used: expected "vendor" or the path of a public key')
    return value if value == "vendor" else _control_path(value)


def _control_path(value: str) -> str:
    # Relative paths would mean another file in each working directory.
    if value and not Path(value).expanduser().is_absolute():
        raise ValueError("expected the absolute path of a file on this machine")
    return value


def _host_list(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.,:/*_-]*", value):
        raise ValueError("expected host names, domains or addresses separated by commas")
    return value


def _branch(value: Any) -> str:
    living, ended = drivers().branches, drivers().ended
    # `--data driver_branch=580` arrives as a number: pyinfra parses what it can.
    branch = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    if branch in ended:
        raise ValueError(f"branch {branch} is end of life; its successor is {ended[branch]}")
    if branch not in living:
        raise ValueError(f"there is no branch {branch}; expected one of {', '.join(living)}")
    return branch


def _cuda_version(value: Any) -> str:
    version = str(value)  # `--data cuda_toolkit_version=13.0` arrives as a number, too
    if not re.fullmatch(r"1[23]\.[0-9]", version):
        raise ValueError("expected a CUDA version such as 13.0, in quotes")
    return version


def _toolkit_version(value: Any) -> str:
    # `--data container_toolkit_version=1.20` arrives as the number 1.2: no version can be told from it.
    parts = re.fullmatch(r"([0-9]+)\.([0-9]+)\.([0-9]+)", value) if isinstance(value, str) else None
    if not parts:
        raise ValueError("expected a version in quotes, such as 1.20.0")
    if tuple(map(int, parts.groups())) < (1, 19, 1):
        # CVE-2025-23266, 2025-23267 (1.17.8), CVE-2026-24260 (1.19.1): field notes, nvidia.md, section 4.
        raise ValueError(
            f"{value} has known vulnerabilities (CVE-2025-23266, CVE-2026-24260); expected 1.19.1 or newer"
        )
    return parts[0]


Url = Annotated[str, AfterValidator(_url)]
NeededUrl = Annotated[str, AfterValidator(_needed_url)]
Key = Annotated[str, AfterValidator(_key_file)]
_KEY = "Public key that signs {}: `vendor`, or a file on this machine."
Port = Annotated[int, Field(ge=1024, le=65535)]


class Settings(BaseModel):
    """All settings of one host, complete and checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    accelerator: Literal["auto", "cpu", "nvidia"] = Field(
        "auto",
        description="What the engine computes on; `auto` takes an NVIDIA GPU where sysfs shows one, else the CPU.",
    )

    model: Annotated[str, AfterValidator(_model)] = Field(
        "smollm2-135m-instruct",
        description="Catalogue name, hub repository (`owner/name`) or absolute path of a local model directory.",
    )
    model_revision: Annotated[str, AfterValidator(_revision)] = Field(
        "", description="Commit of the model's repository, 40 hex digits; empty takes the catalogue's."
    )
    model_hub_token: Annotated[SecretStr | None, AfterValidator(_one_line)] = Field(
        None, description="Access token for gated models on the hub."
    )

    tuning_profile: Literal["latency", "balanced", "throughput"] = Field(
        "balanced", description="What the planner favours when it chooses how many requests run at once."
    )

    engine_version: str = Field("0.32.0", description="vLLM version; must have a lock in `locks/`.")
    engine_runtime: Literal["venv"] = Field("venv", description="How the engine is installed.")
    engine_port: Port = Field(8000, description="TCP port of the engine's API.")
    engine_publish: bool = Field(False, description="Listen on all addresses instead of loopback.")
    engine_context_tokens: Annotated[int, Field(ge=256)] | None = Field(
        None, description="Longest prompt plus reply, in tokens; unset takes the most that the model and memory allow."
    )
    engine_concurrency: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Requests to serve at once with a full context each; unset lets the planner choose."
    )
    engine_gpu_memory_utilization: Annotated[float, Field(ge=0.1, le=0.98)] | None = Field(
        None,
        description="Share of GPU memory the engine may take, 0.1 to 0.98 (NVIDIA hosts); unset: planner's choice.",
    )
    engine_max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="vLLM's `--max-num-seqs`, set by hand; unset lets the planner choose."
    )
    engine_kv_cache_gib: Annotated[float, Field(gt=0, le=4096)] | None = Field(
        None,
        description="Memory for the KV cache, in GiB; unset lets the planner choose (on NVIDIA hosts: vLLM itself).",
    )
    engine_api_key: Annotated[SecretStr | None, AfterValidator(_key)] = Field(
        None, description="Key of the engine's API; unset generates one on the host."
    )

    webui_runtime: Literal["venv"] = Field("venv", description="How Open WebUI is installed.")
    webui_port: Port = Field(7860, description="TCP port of Open WebUI.")
    webui_publish: bool = Field(False, description="Listen on all addresses instead of loopback.")
    webui_admin_email: Annotated[str, AfterValidator(_email)] = Field(
        "admin@localhost", description="Sign-in name of the first administrator, created at the first start."
    )
    webui_admin_name: str = Field(
        "Administrator",
        min_length=1,
        max_length=64,
        pattern=r"^[^\r\n]*$",
        description="Display name of the first administrator.",
    )
    webui_admin_password: Annotated[SecretStr | None, AfterValidator(_password)] = Field(
        None, description="Password of the first administrator, 8 to 72 bytes; unset generates one on the host."
    )

    mirror_hub: NeededUrl = Field("https://huggingface.co", description="Model hub the host downloads from.")
    mirror_python_index: Url = Field("", description="Python package index of the host; empty is uv's own default.")
    mirror_torch_index: NeededUrl = Field(
        "https://download.pytorch.org/whl/cpu", description="Index that holds PyTorch's CPU wheels."
    )
    mirror_python_builds: NeededUrl = Field(
        "https://github.com/astral-sh/python-build-standalone/releases/download",
        description="Where uv fetches Python builds on hosts whose own Python is another version.",
    )
    mirror_python_builds_index: Url = Field(
        "", description="uv's list of Python builds (UV_PYTHON_DOWNLOADS_JSON_URL); empty is the list built into uv."
    )

    mirror_apt_archive: Url = Field(
        "",
        description="Archive of the host's distribution; empty leaves the host's own sources.",
    )
    mirror_apt_security: Url = Field(
        "",
        description="Its security updates, where they lie elsewhere; empty takes them from mirror_apt_archive.",
    )
    mirror_cuda: NeededUrl = Field(
        "https://developer.download.nvidia.com/compute/cuda/repos",
        description="NVIDIA's CUDA repository, above its directories for each distribution.",
    )
    mirror_cuda_key: Key = Field("vendor", description=_KEY.format("the CUDA repository"))
    mirror_container_toolkit: NeededUrl = Field(
        "https://nvidia.github.io/libnvidia-container/stable/deb",
        description="Repository of NVIDIA's container toolkit, above its directories for each architecture.",
    )
    mirror_container_toolkit_key: Key = Field("vendor", description=_KEY.format("the container toolkit's repository"))
    mirror_docker: NeededUrl = Field(
        "https://download.docker.com/linux",
        description="Docker's repository, above its directories for each distribution.",
    )
    mirror_docker_key: Key = Field("vendor", description=_KEY.format("Docker's repository"))
    mirror_registry: Annotated[str, AfterValidator(_registry)] = Field(
        "", description="Mirror of Docker Hub, without a path, that the host's Docker asks first; empty: none."
    )

    proxy_http: Url = Field("", description="Proxy for http:// that apt, uv, the hub's client and Docker use.")
    proxy_https: Url = Field("", description="The same for https://.")
    proxy_bypass: Annotated[str, AfterValidator(_host_list)] = Field(
        "localhost,127.0.0.1,::1", description="Hosts and domains asked without the proxy, separated by commas."
    )
    ca_certificate: Annotated[str, AfterValidator(_control_path)] = Field(
        "", description="File on this machine: certificate (PEM) of a CA that hosts shall trust too; empty: none."
    )

    driver_source: Literal["auto", "none", "installed", "ubuntu-archive", "cuda-repository"] = Field(
        "auto",
        description="Where the NVIDIA driver comes from; `auto` keeps a driver that will do, else takes Ubuntu's "
        "archive (on Debian NVIDIA's repository), and none where the engine runs on the CPU.",
    )
    driver_branch: Annotated[str, BeforeValidator(_branch)] = Field(
        "580", description="NVIDIA driver branch: 580 (to June 2028), 595 (to March 2027) or 615."
    )
    driver_modules: Literal["auto", "open", "closed"] = Field(
        "auto", description="Flavour of the driver's kernel modules; `auto` decides by the GPU's generation."
    )
    reboot_allowed: Literal["auto", "never"] = Field(
        "auto", description="Whether a host may be rebooted once when its driver needs it (NVIDIA hosts)."
    )
    cuda_toolkit: Literal["none", "venv", "system"] = Field(
        "none",
        description="CUDA compiler, for those who compile kernels: `venv` uses the one that the engine's wheels bring, "
        "`system` installs NVIDIA's packages. The engine needs none.",
    )
    cuda_toolkit_version: Annotated[str, BeforeValidator(_cuda_version)] = Field(
        "13.0", description="CUDA version of the toolkit; not above the driver's."
    )
    docker_source: Literal["auto", "none", "installed", "docker-ce", "distribution"] = Field(
        "auto",
        description="Where Docker comes from; `auto` keeps one that will do, else takes docker-ce on NVIDIA hosts, and "
        "none where the host gets no NVIDIA driver.",
    )
    container_toolkit_version: Annotated[str, BeforeValidator(_toolkit_version)] = Field(
        "1.20.0", description="Version of NVIDIA's container toolkit, at least 1.19.1."
    )


@dataclass(frozen=True)
class Layer:
    """Some settings and where they were written, for messages."""

    source: str
    data: Mapping[str, Any]


class SettingsError(Exception):
    """Settings that cannot be used. `problems` has one entry per fault."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{p.setting} ({p.source}): {p.message}. {p.remedy}" for p in problems))


@dataclass(frozen=True)
class Loaded:
    """Settings and the source of each, "default" for those nobody set."""

    settings: Settings
    sources: Mapping[str, str]

    def source(self, setting: str) -> str:
        return self.sources.get(setting, "default")


def load(layers: Iterable[Layer]) -> Loaded:
    """Merge layers, strongest first, into checked settings.

    Raises SettingsError naming each unknown, misspelt or invalid setting with its source and a remedy.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.data.items():
            if not _of_pyinfra(name) and name not in values:
                values[name], sources[name] = value, layer.source
    try:
        return Loaded(Settings.model_validate(values), sources)
    except ValidationError as error:
        raise SettingsError(tuple(_problem(e, sources) for e in error.errors())) from None


def _of_pyinfra(name: str) -> bool:
    return name in PYINFRA_NAMES or name.startswith(PYINFRA_PREFIXES)


def secret_names() -> tuple[str, ...]:
    """Names of the settings whose values must never be shown."""
    return tuple(name for name, f in Settings.model_fields.items() if "SecretStr" in str(f.annotation))


def _problem(error: Any, sources: Mapping[str, str]) -> Problem:
    name = str(error["loc"][0])
    source = sources.get(name, "default")
    if error["type"] == "extra_forbidden":
        return Problem(name, source, "there is no such setting", _nearest(name))
    hidden = name in secret_names() or error["type"] == "credentials"
    shown = "" if hidden else f", got {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and source == "--data":
        message += " (pyinfra reads digits as a number: set it in the inventory, in quotes)"
    meaning = Settings.model_fields[name].description
    return Problem(name, source, f"{message[:1].lower()}{message[1:]}{shown}", f"Meaning: {meaning}")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else "docs/settings.md lists all settings."


def supplied_secrets(settings: Settings) -> dict[str, str]:
    """The secrets an operator supplied, by their name in the host's environment files (runtime/secrets)."""
    supplied = {
        "VLLM_API_KEY": settings.engine_api_key,
        "WEBUI_ADMIN_PASSWORD": settings.webui_admin_password,
        "HF_TOKEN": settings.model_hub_token,
    }
    return {name: value.get_secret_value() for name, value in supplied.items() if value is not None}


def markdown() -> str:
    """The content of docs/settings.md."""
    schema = Settings.model_json_schema()["properties"]
    rows = [f"| `{name}` | {_type(schema[name])} | {_default(name)} | {f.description} |" for name, f in _fields()]
    return "\n".join([*_MARKDOWN_HEAD, *rows, ""])


_MARKDOWN_HEAD = (
    "<!-- generated from llmhost/settings.py by: llmhost settings --markdown > docs/settings.md -->",
    "# Settings",
    "",
    "Set them in `group_data/all.py`, `group_data/<group>.py`, a host's data in the inventory, or `--data name=value`;",
    "the last of these wins. A secret is best read by the inventory from the environment (`os.environ`): not",
    "committed, not in arguments, and not in group data, which pyinfra's `--debug` prints.",
    "",
    "| setting | type and range | default | meaning |",
    "|---|---|---|---|",
)


def _fields() -> list[tuple[str, Any]]:
    return list(Settings.model_fields.items())


def _type(schema: Mapping[str, Any]) -> str:
    for choice in schema.get("anyOf", [schema]):
        if choice.get("type") == "null":
            continue
        if "enum" in choice:
            return " or ".join(f"`{value}`" for value in choice["enum"])
        if "const" in choice:
            return f"`{choice['const']}`"
        low = choice.get("minimum", choice.get("exclusiveMinimum"))
        high = choice.get("maximum")
        span = "" if low is None else f", {low} to {high}" if high is not None else f", at least {low}"
        secret = " (secret)" if choice.get("format") == "password" else ""
        return f"{choice['type']}{span}{secret}"
    return ""


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    return "unset" if default is None else "empty" if default == "" else f"`{default}`"
