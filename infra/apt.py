"""apt's repositories beside the distribution's: the key known before it is trusted, and nobody else naming them.

Two lists that name one repository with different keys ("Conflicting values set for option Signed-By") stop every apt
on a host, and a vendor's own instructions leave such lists behind (field notes, nvidia.md, 4 and 7).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path

from pyinfra import host, logger
from pyinfra.api import FunctionCommand, QuoteString, StringCommand, operation

from infra.facts import JsonFact, failed_look
from infra.halt import halt
from infra.hostfiles import HostFile
from llmhost import openpgp
from llmhost.addresses import environment
from llmhost.catalogue import ROOT
from llmhost.plan.model import AptSource, BasePlan, HostPlan, Problem
from llmhost.render import render

SOURCES = "/etc/apt/sources.list.d"
KEYRINGS = "/etc/apt/keyrings"
PREFERENCES = "/etc/apt/preferences.d"

_PINS = f"{PREFERENCES}/llmhost"
_UNATTENDED = "/etc/apt/apt.conf.d/52llmhost-unattended-upgrades"
_SOURCE, _KEY = f"{SOURCES}/llmhost-{{}}.sources", f"{KEYRINGS}/llmhost-{{}}.asc"

# Names of repositories that a plan may have.
_NAMES = ("nvidia-cuda", "docker", "nvidia-container-toolkit")
# Where else the repository that a setting names is found: its maker's own address, and repositories in a directory.
_SAME_REPOSITORY = {
    "mirror_cuda": r"developer\.download\.nvidia\.(com|cn)/compute/cuda/|^file:/+var/(cuda|nvidia-driver-local)-repo-",
    "mirror_container_toolkit": r"nvidia\.github\.io/(libnvidia-container|nvidia-docker|nvidia-container-runtime)",
    "mirror_docker": r"download\.docker\.com/linux",
}
# Files of preferences that give such a repository a voice of their own.
_SAME_PREFERENCES = {"mirror_cuda": r"cuda-repository-pin-\d+"}

_OPENPGP = inspect.getsource(openpgp)


# --- files ------------------------------------------------------------------------------------------------------


def source_file(source: AptSource) -> str:
    """Where a repository is named on the host."""
    return _SOURCE.format(source.name)


def key_file(source: AptSource) -> str:
    """Where its key lies on the host."""
    return _KEY.format(source.name)


def repositories(sources: Sequence[AptSource]) -> list[HostFile]:
    """The files of these repositories, and of those keys that lie on the control machine."""
    template = f"{SOURCES}/llmhost-repository.sources"
    keys = [HostFile(key_file(source), openpgp.armored(_key(source))) for source in sources if source.key]
    return [*keys, *(HostFile(source_file(source), render(template, source=source)) for source in sources)]


def policy(plan: HostPlan) -> list[HostFile]:
    """What may come from where, and what unattended upgrades must leave alone; of the whole plan, in one file each."""
    parts = [part for part in (plan.driver, plan.containers) if part]
    # apt takes the first entry that names a package: the toolkit's own before the driver's nvidia-*.
    pins = [pin for part in reversed(parts) for pin in part.pins]
    frozen = list(dict.fromkeys(pattern for part in parts for pattern in part.frozen))
    return [
        HostFile(_PINS, render(_PINS, pins=pins)),
        HostFile(_UNATTENDED, render(_UNATTENDED, frozen=frozen)),
    ]


def leftovers(plan: HostPlan) -> list[str]:
    """Files of repositories and policy that an earlier plan may have left, and that this one has no use for."""
    planned = [source.name for source in planned_sources(plan)]
    files = [path.format(name) for name in _NAMES if name not in planned for path in (_SOURCE, _KEY)]
    return files if plan.driver or plan.containers else [_PINS, _UNATTENDED, *files]


def planned_sources(plan: HostPlan) -> list[AptSource]:
    """Every repository of the plan."""
    return [source for part in (plan.driver, plan.containers) if part for source in part.repositories]


def wrong_keys(sources: Iterable[AptSource]) -> list[Problem]:
    """Keys on the control machine that are missing or not what they should be: found before any host is touched."""
    return [problem for source in sources if source.key and (problem := _key_problem(source))]


def _key_problem(source: AptSource) -> Problem | None:
    setting = f"{source.setting}_key"
    try:
        wrong = openpgp.fault(_key(source), source.fingerprint)
    except OSError as error:
        wrong = f"cannot be read on this machine: {error.strerror}"
    return Problem(setting, source.key, f"{source.key}: {wrong}", _other_key(setting)) if wrong else None


def _key(source: AptSource) -> bytes:
    path = Path(source.key).expanduser()
    return (path if path.is_absolute() else ROOT / path).read_bytes()


def _other_key(setting: str) -> str:
    return (
        f"Set {setting} to the file of the key that signs the repository, or compare both fingerprints with its maker's"
    )


# --- trust ------------------------------------------------------------------------------------------------------


class AptState(JsonFact):
    """{"keys": {path: [fingerprint]}, "lists": {path: [uri]}, "own": [path], "preferences": [name]} of a host.

    Lists are those that are not llmhost's, and own those that are; entries that are disabled or commented out do not
    count.
    """

    program = (
        _OPENPGP
        + r"""
import glob, json, os, sys
def key(path):
    try:
        with open(path, "rb") as stream: return fingerprints(stream.read())
    except (OSError, KeyFault): return []
def uris(path):
    with open(path, errors="replace") as stream: text = "\n".join(l for l in stream.read().splitlines() if l[:1] != "#")
    if not path.endswith(".sources"):
        return re.findall(r"(?m)^\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(\S+)", text)
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        if not re.search(r"(?im)^enabled:\s*(no|false|without|off|disable|0)\b", stanza):
            found += " ".join(re.findall(r"(?im)^uris:((?:.*)(?:\n[ \t]+.*)*)", stanza)).split()
    return found
parts = [path for ending in ("list", "sources") for path in glob.glob("/etc/apt/sources.list.d/*." + ending)]
lists = ["/etc/apt/sources.list", *parts]
own = [path for path in parts if os.path.basename(path).startswith("llmhost-")]
foreign = [path for path in lists if os.path.isfile(path) and path not in own]
print(json.dumps({"own": sorted(own), "keys": {path: key(path) for path in json.loads(sys.argv[1])},
    "lists": {path: uris(path) for path in foreign},
    "preferences": sorted(os.listdir("/etc/apt/preferences.d")) if os.path.isdir("/etc/apt/preferences.d") else []}))
"""
    )


# Runs on the host: every key is fetched and compared before anything is written.
_APPLY = (
    _OPENPGP
    + r"""
import json, os, sys, urllib.request
def fetched(setting, url, fingerprint):
    given = "set %s_key to the file of the right key" % setting
    try:
        with urllib.request.urlopen(url, timeout=60) as answer: data = answer.read(1 << 20)
    except Exception as error:
        why = getattr(error, "reason", error)
        sys.exit("%s: %s cannot be fetched from the host: %s. Open the way, or %s" % (setting, url, why, given))
    wrong = fault(data, fingerprint)
    if wrong:
        compare = "Nothing was installed. Compare both fingerprints with the maker's, or " + given
        sys.exit("%s: %s: %s. %s" % (setting, url, wrong, compare))
    return armored(data)
def free(path):
    names = [path + ".disabled", *("%s.%d.disabled" % (path, number) for number in range(1, 100))]
    return next(name for name in names if not os.path.lexists(name))
asked = json.load(sys.stdin)
keys = {key["path"]: fetched(key["setting"], key["url"], key["fingerprint"]) for key in asked["fetch"]}
for path in asked["aside"]: os.rename(path, free(path))
for path in asked["drop"]: os.unlink(path)
for path, text in keys.items():
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".llmhost-part"
    with open(part, "w") as stream: stream.write(text)
    os.chmod(part, 0o644)
    os.rename(part, path)
"""
)


@operation()
def trusted(
    sources: Sequence[AptSource], planned: Sequence[AptSource], base: BasePlan
) -> Generator[StringCommand | FunctionCommand]:
    """Keys that the host fetches are there and are the right ones; other lists of the same repositories are set aside.

    Set aside is renamed to NAME.disabled, which apt passes over: nothing is lost.

    + planned: every repository of the plan: those that an earlier plan had beside them are dropped
    """
    looked = host.get_fact(AptState, argument=json.dumps([key_file(source) for source in sources]))
    if failed_look(looked):
        return
    seen = looked or {"keys": {}, "lists": {}, "own": [], "preferences": []}
    if mixed := _mixed(sources, seen["lists"]):
        yield halt(mixed)
        return
    fetch = [source for source in sources if source.key_url and not _has_key(source, seen["keys"])]
    aside = [*_rivals(sources, seen["lists"]), *_rival_preferences(sources, seen["preferences"])]
    drop = [path for path in _own_files() if path in seen["own"] and path not in map(source_file, planned)]
    for path in drop:
        _announce(f"drop {path}, which is no longer planned")
    for source in fetch:
        _announce(f"fetch {source.key_url}")
    for path in aside:
        _announce(f"set aside {path} as {path}.disabled: it names a repository that llmhost names")
    if not (fetch or aside or drop):
        host.noop("keys and lists are as planned")
        return
    payload = json.dumps({"fetch": [_asked(source) for source in fetch], "aside": aside, "drop": drop})
    yield StringCommand("python3", "-c", QuoteString(_APPLY), _stdin=[payload], _env=environment(base))


def _own_files() -> list[str]:
    return [_SOURCE.format(name) for name in _NAMES]


def _asked(source: AptSource) -> dict[str, str]:
    return {
        "setting": source.setting,
        "url": source.key_url,
        "fingerprint": source.fingerprint,
        "path": key_file(source),
    }


def _has_key(source: AptSource, keys: Mapping[str, list[str]]) -> bool:
    found = keys.get(key_file(source), [])
    return len(found) == 1 and found[0] == (source.fingerprint or found[0])


def _same(source: AptSource, uri: str) -> bool:
    if uri.rstrip("/") == source.uri.rstrip("/"):
        return True
    return bool(re.search(_SAME_REPOSITORY.get(source.setting, r"(?!)"), uri))


def _rivals(sources: Sequence[AptSource], lists: Mapping[str, list[str]]) -> list[str]:
    return sorted(path for path, uris in lists.items() if uris and _named(sources, uris))


def _named(sources: Sequence[AptSource], uris: list[str]) -> list[str]:
    return [uri for uri in uris if any(_same(source, uri) for source in sources)]


def _rival_preferences(sources: Sequence[AptSource], names: Iterable[str]) -> list[str]:
    patterns = [_SAME_PREFERENCES[source.setting] for source in sources if source.setting in _SAME_PREFERENCES]
    return [f"{PREFERENCES}/{name}" for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _mixed(sources: Sequence[AptSource], lists: Mapping[str, list[str]]) -> str:
    """A list that names one of ours beside others cannot be set aside whole."""
    for path, uris in sorted(lists.items()):
        named = _named(sources, uris)
        if named and (len(named) < len(uris) or path == "/etc/apt/sources.list"):
            return (
                f"{path} names {named[0]} beside other repositories. llmhost names it too, and apt stops where their "
                f"keys differ. Remove that entry from {path}, then deploy again"
            )
    return ""


def _announce(text: str) -> None:
    logger.info(f"{host.print_prefix}{text}")


# --- lists ------------------------------------------------------------------------------------------------------

# Shell: `fetch_lists OPTION...`, whoever else is fetching lists just now: DPkg::Lock::Timeout has no say there.
FETCH_LISTS = r"""
deadline=$(($(date +%s) + 300))
fetch_lists() {
    until said=$(apt-get -qq "$@" update 2>&1); do
        case $said in *"Could not get lock"*) [ "$(date +%s)" -lt "$deadline" ] && sleep 1 && continue ;; esac
        return 1
    done
}
"""


def fetch_own_lists(sources: Sequence[AptSource]) -> list[str]:
    """Lines of shell that fetch the lists of these repositories, each by itself, and end with a sentence if one fails.

    By itself, because then it is known whose fault it is; and with errors as errors, because `apt-get update` ends with
    0 on a wrong signature and on a mirror that does not answer (field notes, nvidia.md, last section).
    """
    return [line for source in sources for line in _fetch_own_list(source)]


def _fetch_own_list(source: AptSource) -> list[str]:
    only = [
        f"Dir::Etc::sourcelist={source_file(source)}",
        "Dir::Etc::sourceparts=-",
        "APT::Get::List-Cleanup=0",
        "APT::Update::Error-Mode=any",
    ]
    options = " ".join(f"-o {option}" for option in only)
    failed = (
        f"{source.setting}: {source.uri} cannot be used. Nothing was installed from it. "
        f"Is the address right and reached from the host, and is {source.setting}_key the key that signs it?"
    )
    explain = StringCommand("echo", QuoteString(failed), ">&2")
    return [f'fetch_lists {options} || {{ echo "$said" >&2; {explain.get_raw_value()}; exit 1; }}']
