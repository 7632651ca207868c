"""Where a host gets things from: the way there (proxies, trust), and the distribution's archive. Pure.

Every address is a setting; docs/mirrors.md lists them, from `table` (python -m llmhost.addresses prints it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llmhost.plan.model import BasePlan
from llmhost.settings import Settings

# --- the way there: proxies and trust ---------------------------------------------------------------------------

STORE = "/etc/ssl/certs/ca-certificates.crt"  # what update-ca-certificates writes
PROXY_NAMES = ("http_proxy", "https_proxy", "no_proxy")


def environment(base: BasePlan) -> dict[str, str]:
    """Environment of every program that fetches on the host: uv, pip, the hub's client. Empty where nothing is set."""
    found = proxy_environment(base.proxies)
    if base.ca_certificate:
        # uv, and Python programs that bring certifi, trust their own list unless told (uv help pip install).
        found |= {"SSL_CERT_FILE": STORE, "REQUESTS_CA_BUNDLE": STORE}
    if found:
        # The hub's xet client is a library of its own, for which neither proxies nor trust are proven here.
        found["HF_HUB_DISABLE_XET"] = "1"
    return found


def proxy_environment(proxies: Mapping[str, str]) -> dict[str, str]:
    """The planned proxies and no others: a login shell's own would win in capitals, or where only one is planned."""
    if not proxies:
        return {}
    planned = {name: proxies.get(name, "") for name in PROXY_NAMES} | {"all_proxy": ""}
    return planned | {name.upper(): value for name, value in planned.items()}


def direct_hosts(proxies: Mapping[str, str]) -> list[str]:
    """Of the bypassed, those that apt's configuration can name: hosts, neither domains nor networks nor IPv6."""
    return [name for name in proxies.get("no_proxy", "").split(",") if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name)]


# --- the distribution's archive ---------------------------------------------------------------------------------

SOURCES = "/etc/apt/sources.list.d/llmhost-archive.sources"
COMPONENTS = "/etc/apt/sources.list.d/llmhost-components.sources"  # what the host's own lists leave out
# Where Debian, Ubuntu and their cloud images write it; lists of other names are somebody's own and are left alone.
OWN_LISTS = (
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/debian.sources",
    "/etc/apt/sources.list.d/ubuntu.sources",
)
DISABLED = ".disabled"  # apt passes over this ending without a word (Dir::Ignore-Files-Silently)


@dataclass(frozen=True)
class Distribution:
    """What an archive has, in its own order, and what llmhost needs of it."""

    components: tuple[str, ...]
    needed: tuple[str, ...]
    keyrings: tuple[str, ...]  # that sign it, the first that a host has is taken


DISTRIBUTIONS = {
    # Drivers and their signed modules: restricted, for newer branches multiverse; python3-venv, docker.io: universe.
    "ubuntu": Distribution(
        ("main", "restricted", "universe", "multiverse"),
        ("main", "restricted", "universe", "multiverse"),
        ("/usr/share/keyrings/ubuntu-archive-keyring.gpg", "/usr/share/keyrings/ubuntu-archive-keyring.pgp"),
    ),
    "debian": Distribution(
        ("main", "contrib", "non-free", "non-free-firmware"),
        ("main",),
        ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"),
    ),
}


@dataclass(frozen=True)
class Repository:
    """An entry of a list, in either of apt's two formats."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str  # "" where it does not say


@dataclass(frozen=True)
class Archive:
    """The content of llmhost-archive.sources."""

    uri: str
    security_uri: str
    suites: tuple[str, ...]
    security_suite: str
    components: tuple[str, ...]
    keyring: str
    disabled: tuple[str, ...]  # the host's own lists, which it stands in for


def lacking(components: Iterable[str], lists: Mapping[str, str]) -> list[Repository]:
    """The entries that give the distribution's archive these components, where the host's own lists do not.

    Each has the address, suites and key of the host's own entry: apt takes no two keys of one repository.

    + lists: path and content of the host's own lists
    """
    had = [entry for path, text in sorted(lists.items()) for entry in repositories(path, text)]
    own = [entry for entry in had if "main" in entry.components]
    missing = [(entry, _left_out(components, entry, had)) for entry in own]
    # A key that lies in the list itself is not copied: apt then says which package it lacks.
    return [replace(entry, components=names) for entry, names in missing if names and entry.signed_by[:1] in ("", "/")]


def _left_out(components: Iterable[str], main: Repository, had: Iterable[Repository]) -> tuple[str, ...]:
    """Those of the components that no entry names for all of what this one names."""
    same = [entry for entry in had if {*main.uris} <= {*entry.uris} and {*main.suites} <= {*entry.suites}]
    return tuple(name for name in components if not any(name in entry.components for entry in same))


class NoArchive(ValueError):
    """Why the archive cannot be written for this host, in words for the operator."""


def archive(base: BasePlan, system: str, codename: str, lists: Mapping[str, str], keyrings: Iterable[str]) -> Archive:
    """The distribution's archive at the planned address, with the components and suites that the host had.

    + system, codename: ID and VERSION_CODENAME of os-release
    + lists: path and content of the host's own lists, those already disabled under their former path
    + keyrings: those of DISTRIBUTIONS that the host has
    """
    distribution = DISTRIBUTIONS.get(system)
    if not distribution or not codename:
        raise NoArchive(f"no archive is known for {system or 'a system without a name'} {codename}".rstrip())
    had = [entry for path, text in sorted(lists.items()) for entry in repositories(path, text)]
    kept = {name for entry in had for name in entry.components}
    needed = (*distribution.needed, *base.apt_components)
    suites = [codename, f"{codename}-updates"]
    if any(suite.endswith("-backports") for entry in had for suite in entry.suites):
        suites.append(f"{codename}-backports")
    signed = [entry.signed_by for entry in had if entry.signed_by in distribution.keyrings]
    present = [*signed, *(path for path in distribution.keyrings if path in set(keyrings))]
    if not present:
        raise NoArchive(
            f"the host has none of {', '.join(distribution.keyrings)}, which prove its distribution's packages"
        )
    return Archive(
        uri=base.apt_archive,
        security_uri=base.apt_security or base.apt_archive,
        suites=tuple(suites),
        security_suite=f"{codename}-security",
        components=tuple(name for name in distribution.components if name in {*kept, *needed}),
        keyring=present[0],
        disabled=tuple(sorted(lists)),
    )


def strangers(path: str, text: str, system: str) -> list[str]:
    """Repositories in one of the host's own lists that are not the distribution's, and fall silent with it."""
    known = set(DISTRIBUTIONS[system].components)
    return [
        " ".join((*entry.uris, *entry.suites))
        for entry in repositories(path, text)
        if not entry.components or not known.issuperset(entry.components)
    ]


def repositories(path: str, text: str) -> list[Repository]:
    """The enabled package repositories of a list, whichever format its name says."""
    return _stanzas(text) if path.endswith(".sources") else _lines(text)


def _lines(text: str) -> list[Repository]:
    found = []
    for line in text.splitlines():
        entry = re.match(r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<rest>[^#]+)", line)
        words = entry["rest"].split() if entry else []
        if entry and len(words) >= 2:
            signed_by = re.search(r"(?i)\bsigned-by=(\S+)", entry["options"] or "")
            found.append(Repository((words[0],), (words[1],), tuple(words[2:]), signed_by[1] if signed_by else ""))
    return found


def _stanzas(text: str) -> list[Repository]:
    found = []
    uncommented = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", uncommented):
        joined = re.sub(r"\n[ \t]+", " ", stanza.strip("\n"))
        fields = {
            name.strip().lower(): value.split() for name, _, value in (f.partition(":") for f in joined.splitlines())
        }
        if "deb" in fields.get("types", []) and fields.get("enabled", ["yes"])[0].lower() not in ("no", "false"):
            uris, suites, components = (tuple(fields.get(name, ())) for name in ("uris", "suites", "components"))
            found.append(Repository(uris, suites, components, " ".join(fields.get("signed-by", ()))))
    return found


# --- the table of docs/mirrors.md -------------------------------------------------------------------------------


def is_address(name: str) -> bool:
    """Whether a setting says where something comes from, or by which way."""
    return name.startswith(("mirror_", "proxy_")) or name == "ca_certificate"


def table() -> list[str]:
    """Every address that a run needs, and its setting: lines of Markdown."""
    rows = [
        f"| `{name}` | {f'`{field.default}`' if field.default else 'empty'} | {field.description} |"
        for name, field in Settings.model_fields.items()
        if is_address(name)
    ]
    return ["| setting | default | what is fetched from there |", "|---|---|---|", *rows]


if __name__ == "__main__":
    print("\n".join(table()))
