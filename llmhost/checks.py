"""What must be true on a deployed host: one row per check (llmhost/evidence.py), chosen by the host's plan."""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Iterator
from typing import Any

from llmhost.checks_gpu import container_rows, driver_rows
from llmhost.evidence import (
    DEPLOY,
    SKIPPED,
    Check,
    CouldNotLook,
    Evidence,
    Plan,
    Result,
    ServiceFailed,
    expectation,
    find,
    includes,
)
from llmhost.plan.model import hash_of, lasting

CLOCK_SECONDS = 60  # sign-in tokens and TLS certificates bear a minute
RESTARTS_ALLOWED = 2  # a killed engine that came back is healthy; one that keeps dying is not
SETTLED_SECONDS = 600  # active for this long: whatever made it restart before is over


def checks(plan: Plan) -> tuple[Check, ...]:
    """The rows that apply to a host with this plan."""
    parts = [part for part in ("engine", "webui") if plan.get(part)]
    rows = [*HOST, *driver_rows(plan), *container_rows(plan)]
    rows += [row for part in parts for row in part_rows(plan, part)]
    if "engine" in parts:
        rows += ENGINE
    if "webui" in parts:
        rows += WEBUI
    return tuple(rows)


def unreachable(plan: Plan, reason: str, remedy: str) -> tuple[Result, ...]:
    """The results of a host nobody could look at: every row skipped, with the reason."""
    return tuple(
        Result(check.id, check.group, SKIPPED, expectation(check, plan), reason, 0.0, remedy) for check in checks(plan)
    )


def figures(evidence: Evidence) -> dict[str, float]:
    """What was measured: seconds, tokens, tokens per second. What was not measured is left out."""
    found = {}
    for name, place in FIGURES.items():
        try:
            value, _ = find(evidence, place)
        except (ServiceFailed, CouldNotLook):
            continue
        if isinstance(value, (int, float)):
            found[name] = value
    return found


def simulated(evidence: Evidence) -> list[str]:
    """The stand-ins a lab host names: nothing on a real host."""
    stand_ins: list[str] = evidence.get("simulated", {}).get("stand_ins", [])
    return stand_ins


FIGURES = {
    "ttft_seconds": "engine/completion/ttft_seconds",
    "tokens_per_second": "engine/completion/tokens_per_second",
    "completion_tokens": "engine/completion/tokens",
    "webui_ttft_seconds": "webui/chat/ttft_seconds",
    "webui_tokens_per_second": "webui/chat/tokens_per_second",
    "probe_seconds": "probe/seconds",
}


# --- how evidence is read ---------------------------------------------------------------------------------


def contains(expected: str, seen: str) -> bool:
    """The right words in the reply; any words where the plan knows no right ones."""
    return bool(seen.strip()) if expected == ANY_TEXT else expected.casefold() in seen.casefold()


ANY_TEXT = "any text"


def same_version(expected: str, seen: str) -> bool:
    """0.32.0 is 0.32.0+cpu: the local part names a build, not a version."""
    return expected.partition("+")[0] == seen.partition("+")[0]


def proof_answer(plan: Plan) -> str:
    return plan["engine"]["model"]["proof_answer"] or ANY_TEXT


def stream(completion: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return {name: completion.get(name) for name in ("content_type", "done", "pieces", "tokens")}


def arrived_in_pieces(expected: Any, seen: dict[str, Any]) -> bool:
    """Events, in more than one piece (a reply of a single token has only one), and properly ended."""
    least = 1 if seen["tokens"] == 1 else 2
    return seen["content_type"] == "text/event-stream" and seen["done"] is True and seen["pieces"] >= least


def settled(expected: Any, seen: dict[str, float]) -> bool:
    return seen["restarts"] <= RESTARTS_ALLOWED or seen["active_seconds"] >= SETTLED_SECONDS


def clock_offset(probe: dict[str, Any], plan: Plan) -> float:
    """Seconds by which the host's clock lies outside the time in which it was looked at, by the clock here."""
    earliest, latest = map(float, probe["looked_between"])
    clock = float(probe["clock_seconds"])
    return round(min(clock - earliest, 0.0) + max(clock - latest, 0.0), 1)


def root_only(expected: dict[str, str], seen: dict[str, str]) -> bool:
    """Every planned file is there, and no file beside them is open to others."""
    return bool(seen) and expected.items() <= seen.items() and set(seen.values()) == {"0600 root:root"}


def only_local(expected: str, urls: list[str]) -> bool:
    return all(is_loopback(urllib.parse.urlsplit(url).hostname or "") for url in urls)


def some_only_local(expected: str, urls: list[str]) -> bool:
    return bool(urls) and only_local(expected, urls)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def endpoint(service: Plan) -> str:
    """As the probe writes a listening socket: "127.0.0.1:8000", "[::1]:8000"."""
    host = service["host"]
    return f"[{host}]:{service['port']}" if ":" in host else f"{host}:{service['port']}"


def published(plan: Plan) -> list[str]:
    """The sockets the plan opens to other machines."""
    services = [plan[part] for part in ("engine", "webui") if plan.get(part)]
    return sorted(endpoint(service) for service in services if not is_loopback(service["host"]))


def beyond_loopback(processes: dict[str, Any], plan: Plan) -> list[str]:
    """The sockets of our services that other machines can reach; a unit without a process proves nothing."""
    found = []
    for part in ("engine", "webui"):
        if plan.get(part):
            unit = plan[part]["service"]["unit"]
            seen = processes[unit]
            found += [one for one in seen["listeners"] if not is_loopback(one.rpartition(":")[0].strip("[]"))]
            found += [] if seen["count"] else [f"{unit} has no process"]
    return sorted(found)


def loaded(processes: dict[str, Any], plan: Plan) -> list[str]:
    """The releases running code came from; one whose files were removed under it is marked."""
    return [f"{one} (deleted)" if one in processes["deleted"] else one for one in processes["releases"]]


def secret_names(plan: Plan) -> list[str]:
    engine = ["vllm.env VLLM_API_KEY"] if plan.get("engine") else []
    webui = [f"open-webui.env {name}" for name in ("OPENAI_API_KEY", "WEBUI_ADMIN_PASSWORD", "WEBUI_SECRET_KEY")]
    return engine + (webui if plan.get("webui") else [])


def secret_files(plan: Plan) -> dict[str, str]:
    return {name.split()[0]: "0600 root:root" for name in secret_names(plan)}


def plan_hash(plan: Plan) -> str:
    """HostPlan.hash, of its JSON."""
    return hash_of(plan)


def hash_and_differences(on_host: Plan, plan: Plan) -> str:
    """The hash of the plan on the host and, where it is another, the settings in which it differs."""
    here, there = dict(leaves(lasting(plan))), dict(leaves(lasting(on_host)))
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return plan_hash(on_host) + (f", differs in {shown}" if names else "")


def leaves(thing: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """("engine.flags.port", 8000) for each value in nested JSON."""
    items = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else None
    if items is None:
        yield name, thing
        return
    for key, value in items:
        if name or key != "hash":
            yield from leaves(value, f"{name}.{key}" if name else str(key))


# --- the rows -------------------------------------------------------------------------------------------------

HOST = (
    Check(
        "plan.hash",
        "plan/document",
        plan_hash,
        view=hash_and_differences,
        remedy=f"the host was deployed from other settings or another version; {DEPLOY}",
    ),
    Check(
        "host.clock",
        "probe",
        f"within {CLOCK_SECONDS} s of the clock here",
        view=clock_offset,
        agrees=lambda expected, seconds: abs(seconds) <= CLOCK_SECONDS,
        remedy="set the host's clock (or this machine's): timedatectl set-ntp true",
    ),
    Check(
        "secrets.present",
        "secrets/names",
        secret_names,
        agrees=includes,
        remedy=f"/etc/llmhost/secrets lacks one; {DEPLOY}",
    ),
    Check(
        "secrets.length",
        "secrets/too_short",
        [],
        remedy="set a longer value (8 characters at least), or remove the file to have one generated; then deploy",
    ),
    Check(
        "secrets.directory",
        "secrets/directory",
        "0700 root:root",
        remedy="chown root:root /etc/llmhost/secrets; chmod 0700 /etc/llmhost/secrets",
    ),
    Check(
        "secrets.files",
        "secrets/files",
        secret_files,
        agrees=root_only,
        remedy="chown root:root /etc/llmhost/secrets/*; chmod 0600 /etc/llmhost/secrets/*",
    ),
    Check(
        "secrets.unexposed",
        "leaks/places",
        [],
        remedy="others may have read this secret: remove it from the place named, delete its line in "
        f"/etc/llmhost/secrets to have a new one generated, and {DEPLOY}",
    ),
    Check(
        "network.private",
        "processes",
        published,
        view=beyond_loopback,
        remedy="a socket is open to other machines, or one that should be is not: see engine_publish, webui_publish; "
        "worker ports stay on loopback by GLOO_SOCKET_IFNAME=lo in /etc/llmhost/vllm.env",
    ),
    # Both services are wanted by the target: disabled, it takes them with it at the next boot.
    Check(
        "services.llmhost.enabled",
        "services/llmhost.target/enabled",
        "enabled",
        remedy=f"nothing would start with the host: {DEPLOY}",
    ),
    Check("services.llmhost.active", "services/llmhost.target/active", "active", remedy=DEPLOY),
)


def part_rows(plan: Plan, part: str) -> tuple[Check, ...]:
    """Unit, release and socket of one service."""
    unit, release = plan[part]["service"]["unit"], plan[part]["release"]
    name = unit.removesuffix(".service")
    log = f"journalctl -u {unit} -b"
    return (
        Check(f"services.{name}.active", f"services/{unit}/active", "active", remedy=f"see {log}"),
        Check(
            f"services.{name}.enabled",
            f"services/{unit}/enabled",
            "enabled",
            remedy=f"it would not start with the host: systemctl enable {unit}",
        ),
        Check(
            f"services.{name}.stable",
            f"services/{unit}/stability",
            f"at most {RESTARTS_ALLOWED} restarts, or active for {SETTLED_SECONDS} s",
            agrees=settled,
            remedy=f"it keeps restarting: see {log}",
        ),
        Check(
            f"services.{name}.current",
            f"services/{unit}/stale",
            "no",
            remedy=f"its unit file changed and systemd has not read it: {DEPLOY}",
        ),
        Check(
            f"releases.{name}.installed",
            f"releases/{part}/version",
            release["version"],
            agrees=same_version,
            remedy=DEPLOY,
        ),
        Check(
            f"releases.{name}.linked",
            f"releases/{part}/current",
            release["path"],
            remedy=f"the planned release has not answered yet; {DEPLOY}",
        ),
        Check(
            f"releases.{name}.running",
            f"processes/{unit}",
            [release["identity"]],
            view=loaded,
            remedy=f"the process runs another release than the planned one: systemctl restart {unit}",
        ),
        Check(
            f"network.{name}",
            f"processes/{unit}/listeners",
            [endpoint(plan[part])],
            agrees=includes,
            remedy=f"it does not listen where planned: see {log}",
        ),
    )


ENGINE_LOG = "see journalctl -u vllm.service -b"
ENGINE_KEY = "anyone who reaches the port may use it: VLLM_API_KEY is missing from the engine's environment; " + DEPLOY

ENGINE = (
    Check("engine.health", "engine/health/status", 200, remedy=ENGINE_LOG),
    Check(
        "engine.version",
        "engine/version/version",
        lambda plan: plan["engine"]["version"],
        agrees=same_version,
        remedy="another version runs than the planned one: systemctl restart vllm.service",
    ),
    Check(
        "engine.models",
        "engine/models/ids",
        lambda plan: [plan["engine"]["model"]["served_name"]],
        agrees=includes,
        remedy=f"the planned model is not served; {DEPLOY}",
    ),
    Check("engine.key_required", "engine/models_without_key/status", 401, remedy=ENGINE_KEY),
    Check("engine.wrong_key_refused", "engine/models_wrong_key/status", 401, remedy=ENGINE_KEY),
    Check("engine.completion_key_required", "engine/completion_without_key/status", 401, remedy=ENGINE_KEY),
    # vLLM guards /v1 only; /invocations is full inference, /metrics tells who does what (runtime/require_key.py).
    Check("engine.invocation_key_required", "engine/invocation_without_key/status", 401, remedy=ENGINE_KEY),
    Check("engine.metrics_key_required", "engine/metrics_without_key/status", 401, remedy=ENGINE_KEY),
    Check(
        "engine.completion",
        "engine/completion",
        proof_answer,
        view=lambda completion, plan: completion["text"],
        agrees=contains,
        remedy=f"the engine does not answer as this model does; {ENGINE_LOG}",
    ),
    Check(
        "engine.streamed",
        "engine/completion",
        "text/event-stream in several pieces, ended by [DONE]",
        view=stream,
        agrees=arrived_in_pieces,
        remedy=ENGINE_LOG,
    ),
)

WEBUI_LOG = "see journalctl -u open-webui.service -b"
WEBUI_CONFIG = f"/etc/llmhost/open-webui.env is not what the process runs with; {DEPLOY}"

WEBUI = (
    Check("webui.health", "webui/health/ok", True, remedy=WEBUI_LOG),
    Check("webui.ready", "webui/ready/ok", True, remedy=WEBUI_LOG),
    Check(
        "webui.version",
        "webui/version/version",
        lambda plan: plan["webui"]["version"],
        agrees=same_version,
        remedy="another version runs than the planned one: systemctl restart open-webui.service",
    ),
    Check("webui.sign_in_required", "webui/config/sign_in_required", True, remedy=WEBUI_CONFIG),
    Check(
        "webui.first_account",
        "webui/config/without_accounts",
        False,
        remedy="no account exists, so whoever comes first becomes administrator: " + DEPLOY,
    ),
    Check("webui.signup_not_offered", "webui/config/signup_open", False, remedy=WEBUI_CONFIG),
    Check("webui.signup_refused", "webui/signup/status", 403, remedy=WEBUI_CONFIG),
    Check("webui.token_required", "webui/models_without_token/status", 401, remedy=WEBUI_CONFIG),
    Check("webui.wrong_password_refused", "webui/signin_wrong/status", 400, remedy=WEBUI_LOG),
    Check(
        "webui.sign_in",
        "webui/signin/role",
        "admin",
        remedy="webui_admin_email does not sign in with WEBUI_ADMIN_PASSWORD of /etc/llmhost/secrets/open-webui.env; "
        "where it was changed in the page, write the new password there",
    ),
    Check(
        "webui.models",
        "webui/models/ids",
        lambda plan: [plan["engine"]["model"]["served_name"]],
        agrees=includes,
        remedy=f"Open WebUI does not offer the engine's model; {WEBUI_CONFIG}",
    ),
    Check(
        "webui.chat_backends_local",
        "webui/backends/urls",
        "addresses of this host only",
        agrees=some_only_local,
        remedy=f"chats go to an outside service; {WEBUI_CONFIG}",
    ),
    Check(
        "webui.embeddings_local",
        "webui/embedding/url",
        "an address of this host, or none",
        agrees=lambda expected, url: url == "" or only_local(expected, [url]),
        remedy=f"documents go to an outside service (RAG_OPENAI_API_BASE_URL); {WEBUI_CONFIG}",
    ),
    Check("webui.ollama_off", "webui/ollama/enabled", False, remedy=WEBUI_CONFIG),
    Check(
        "webui.chat",
        "webui/chat",
        proof_answer,
        view=lambda chat, plan: chat["text"],
        agrees=contains,
        remedy="a chat in the browser would fail like this, even where the engine's own API answers; "
        f"{WEBUI_LOG} and journalctl -u vllm.service -b",
    ),
    Check(
        "webui.streamed",
        "webui/chat",
        "text/event-stream in several pieces, ended by [DONE]",
        view=stream,
        agrees=arrived_in_pieces,
        remedy=WEBUI_LOG,
    ),
)
