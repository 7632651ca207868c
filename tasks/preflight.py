"""Look at the host, plan, and refuse before anything is touched."""

from __future__ import annotations

import json

from pyinfra import host, logger

from infra.facts import HostFacts, Unreachable, hardware
from infra.guard import inventory_argument
from infra.inventory import load_settings
from infra.task import refuse
from llmhost.addresses import proxy_environment
from llmhost.hardware import FactsError
from llmhost.local_files import certificates
from llmhost.plan.host import downloads, plan
from llmhost.plan.model import BasePlan, HostPlan, Problem
from llmhost.settings import Loaded, SettingsError, supplied_secrets

_OTHER_MIRROR = (
    "Open the way (firewall, name server), set proxy_http and proxy_https, or set it to a mirror that the host reaches"
)
_OTHER_PROXY = "See proxy_http, proxy_https and proxy_bypass, or set it to a mirror that the host reaches"
_NO_CA = "Set ca_certificate to the PEM certificate of the CA that signed it (docs/mirrors.md)"
_OTHER_CA = "ca_certificate is not the CA that signed it, or the server does not send its whole chain (docs/mirrors.md)"

_PASSWORD = Problem(
    "ssh_password",
    "the inventory or the command line",
    "acceptance connects with OpenSSH, which takes no password from here",
    "Use a key: ssh-copy-id, then ssh_key or the agent",
)


def preflight() -> HostPlan:
    """The host's plan; a refused host takes no further part in the run."""
    if host.data.get("ssh_password"):
        refuse([_PASSWORD])
        return HostPlan(host.name, (), (_PASSWORD,))
    try:
        loaded = load_settings(host, inventory_argument())
        # As whoever logs in, whatever --sudo says: only then is it seen who that is.
        seen = hardware(host.get_fact(HostFacts, _sudo=False))
    except SettingsError as error:
        refuse(error.problems)
        return HostPlan(host.name, (), error.problems)
    except FactsError as error:
        unreadable = Problem("host", host.name, str(error), "Run `llmhost facts HOST` to see what it answers")
        refuse([unreadable])
        return HostPlan(host.name, (), (unreadable,))
    decided = plan(loaded, seen, host.name)
    problems = decided.problems
    if decided.base and not problems:
        problems = _unreachable(downloads(decided, seen), decided.base, loaded)
    if problems:
        refuse(problems)
        return decided
    # The one place that knows how to become root; every operation of this host follows.
    host.data._sudo = seen.user != "root"
    host.data.llmhost_secrets = supplied_secrets(loaded.settings)
    logger.info(f"{host.print_prefix}Planned: {len(decided.decisions)} decisions (llmhost plan gives each reason)")
    return decided


def _unreachable(wanted: dict[str, str], base: BasePlan, loaded: Loaded) -> tuple[Problem, ...]:
    if not wanted:
        return ()
    trusted = "".join(certificates(base.ca_certificate)) if base.ca_certificate else ""
    asked = {
        "urls": sorted(set(wanted.values())),
        "environment": proxy_environment(base.proxies),
        "trusted": trusted,
    }
    failed: dict[str, str] = host.get_fact(Unreachable, argument=json.dumps(asked)) or {}
    return tuple(_no_way(setting, url, failed[url], base, loaded) for setting, url in wanted.items() if url in failed)


def _no_way(setting: str, url: str, why: str, base: BasePlan, loaded: Loaded) -> Problem:
    source = loaded.source(setting)
    if "CERTIFICATE_VERIFY_FAILED" in why:
        message = f"the host does not trust the certificate of {url}: {why}"
        return Problem(setting, source, message, _OTHER_CA if base.ca_certificate else _NO_CA)
    if base.proxies:
        return Problem(setting, source, f"{url} cannot be reached from the host through its proxy: {why}", _OTHER_PROXY)
    return Problem(setting, source, f"{url} cannot be reached from the host: {why}", _OTHER_MIRROR)
