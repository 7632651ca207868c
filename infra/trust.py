"""Trust and addresses: what must be right before the first package is fetched. One look, then one change.

All of it is done in sh: a bare host may have neither Python nor ca-certificates, and gets both from here on.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from pyinfra import host, logger
from pyinfra.api import FactBase, QuoteString, StringCommand, operation

from infra.facts import failed_look
from infra.packages import installed
from llmhost.addresses import (
    COMPONENTS,
    DISABLED,
    DISTRIBUTIONS,
    OWN_LISTS,
    SOURCES,
    STORE,
    Archive,
    NoArchive,
    archive,
    direct_hosts,
    lacking,
    strangers,
)
from llmhost.plan.model import BasePlan
from llmhost.render import render

CONFIGURATION = "/etc/apt/apt.conf.d/95llmhost"
# There only while a host without ca-certificates fetches it from a mirror that the operator's CA vouches for.
BOOTSTRAP = "/etc/apt/apt.conf.d/96llmhost-bootstrap"
BOOTSTRAP_STORE = "/etc/apt/llmhost-bootstrap.pem"
CERTIFICATES = "/usr/local/share/ca-certificates"  # of which update-ca-certificates takes *.crt
UPDATER = "/usr/sbin/update-ca-certificates"
_OWN_FILES = (CONFIGURATION, BOOTSTRAP, BOOTSTRAP_STORE, SOURCES, COMPONENTS)

_LOOK = r"""
[ -r /etc/os-release ] && . /etc/os-release
echo "system ${ID:-} ${VERSION_CODENAME:-}"
for file do [ -f "$file" ] && stat --format='file %n %a:%U:%G' "$file" && sha256sum "$file" | sed 's/^/sum /'; done
for file in LISTS; do [ -f "$file" ] && echo "list $file" && sed -e "s|^|line $file |" -e '$a\' "$file"; done
for file in KEYRINGS; do [ -f "$file" ] && echo "keyring $file"; done
for file in CERTIFICATES/llmhost*.crt; do
    [ -f "$file" ] || continue
    stat --format='file %n %a:%U:%G' "$file"; sha256sum "$file" | sed 's/^/sum /'
    # Lines of it that the store lacks: none, if the store was rebuilt since.
    [ -f STORE ] && [ "$(grep -cvxF -f STORE "$file")" = 0 ] && echo "trusted $file"
done
for link in /etc/ssl/certs/llmhost*.pem; do [ -L "$link" ] && echo "link $(readlink "$link")"; done
[ -x UPDATER ] && echo updater
true
"""


@dataclass
class Seen:
    """What the look found."""

    system: str = ""  # ID of os-release
    codename: str = ""
    files: dict[str, str] = field(default_factory=dict)  # {path: "MODE:USER:GROUP SHA256"} of llmhost's own
    lists: dict[str, list[str]] = field(default_factory=dict)  # {path: lines}: OWN_LISTS, those disabled, and SOURCES
    keyrings: list[str] = field(default_factory=list)
    trusted: set[str] = field(default_factory=set)  # certificates that the host's store holds
    linked: set[str] = field(default_factory=set)  # certificates that the store has links to
    updater: bool = False  # whether ca-certificates is installed


class TrustLook(FactBase[Seen]):
    """llmhost's certificates and apt files, and the host's own lists."""

    def command(self) -> StringCommand:
        keyrings = [path for distribution in DISTRIBUTIONS.values() for path in distribution.keyrings]
        lists = [*OWN_LISTS, *(path + DISABLED for path in OWN_LISTS), SOURCES]
        program = _LOOK.replace("LISTS", " ".join(lists)).replace("KEYRINGS", " ".join(keyrings))
        program = program.replace("CERTIFICATES", CERTIFICATES).replace("STORE", STORE).replace("UPDATER", UPDATER)
        return StringCommand("sh", "-c", QuoteString(program), "look", *_OWN_FILES)

    def process(self, output: list[str]) -> Seen:
        seen = Seen()
        for line in output:
            match line.split(" ", 2):
                case ["system", system, codename]:
                    seen.system, seen.codename = system, codename
                case ["file", path, status]:
                    seen.files[path] = status
                case ["sum", digest, path]:
                    seen.files[path.strip()] += f" {digest}"
                case ["list", path]:
                    seen.lists[path] = []
                case ["line", path, *text]:
                    seen.lists[path].append("".join(text))
                case ["keyring", path]:
                    seen.keyrings.append(path)
                case ["trusted", path]:
                    seen.trusted.add(path)
                case ["link", path]:
                    seen.linked.add(path)
                case ["updater"]:
                    seen.updater = True
        return seen


@dataclass(frozen=True)
class Change:
    """What is to be done on a host."""

    write: dict[str, str]  # {path: content}
    remove: tuple[str, ...]
    rebuild_store: bool
    disable: tuple[str, ...]  # the host's own lists
    restore: tuple[str, ...]

    @property
    def is_none(self) -> bool:
        return not (self.write or self.remove or self.rebuild_store or self.disable or self.restore)


@operation()
def trust_and_addresses(base: BasePlan, certificates: Sequence[str]) -> Generator[StringCommand]:
    """The operator's CA trusted, apt's ways set, and the distribution's archive at its planned address.

    + certificates: each as PEM text
    """
    looked = host.get_fact(TrustLook)
    if failed_look(looked):
        return
    seen = looked or Seen()
    try:
        change = change_of(base, certificates, seen)
    except NoArchive as error:
        yield StringCommand("echo", QuoteString(f"mirror_apt_archive: {error}"), ">&2;", "false")
        return
    if change.is_none:
        host.noop("certificates, proxies and the archive's address are as planned")
        return
    _announce(change, seen)
    yield StringCommand("sh", "-c", QuoteString(_script(base, change)))
    if BOOTSTRAP in change.write:
        yield from installed._inner(packages=["ca-certificates"])  # its installation takes our certificates in
        yield StringCommand("rm", "-f", BOOTSTRAP, BOOTSTRAP_STORE)


def change_of(base: BasePlan, certificates: Sequence[str], seen: Seen) -> Change:
    """What differs between the host and the plan. Raises NoArchive."""
    trusted = {f"{CERTIFICATES}/llmhost{f'-{n}' if n > 1 else ''}.crt": text for n, text in enumerate(certificates, 1)}
    disabled = _disabled(seen)
    wanted = {**trusted, CONFIGURATION: _configuration(base)}
    if certificates and not seen.updater:
        wanted |= {BOOTSTRAP_STORE: "".join(certificates), BOOTSTRAP: f'Acquire::https::CaInfo "{BOOTSTRAP_STORE}";\n'}
    if base.apt_archive:
        wanted[SOURCES] = render(SOURCES, archive=_archive(base, seen, disabled))
    elif entries := lacking(base.apt_components, _own_lists(seen, disabled)):
        wanted[COMPONENTS] = render(COMPONENTS, entries=entries)
    return Change(
        write={path: content for path, content in wanted.items() if seen.files.get(path) != _state(content)},
        remove=tuple(sorted(seen.files.keys() - wanted.keys())),
        rebuild_store=seen.updater and not _store_is_right(trusted, seen),
        disable=tuple(path for path in OWN_LISTS if path in seen.lists) if base.apt_archive else (),
        restore=() if base.apt_archive else disabled,
    )


def _store_is_right(trusted: Mapping[str, str], seen: Seen) -> bool:
    """Whether the host's store has our certificates as they are now, and no earlier one."""
    written = {path for path, content in trusted.items() if seen.files.get(path) == _state(content)}
    on_host = {path for path in seen.files if path.startswith(CERTIFICATES)}
    return written == seen.trusted == seen.linked == on_host == trusted.keys()


def _state(content: str) -> str:
    return f"644:root:root {hashlib.sha256(content.encode()).hexdigest()}"


def _configuration(base: BasePlan) -> str:
    return render(CONFIGURATION, proxies=base.proxies, direct=direct_hosts(base.proxies))


def _disabled(seen: Seen) -> tuple[str, ...]:
    """Those of the host's own lists that our file says it stands in for."""
    named = {line.removeprefix("# disabled: ") for line in seen.lists.get(SOURCES, ())}
    return tuple(path for path in OWN_LISTS if path in named and path + DISABLED in seen.lists)


def _archive(base: BasePlan, seen: Seen, disabled: Sequence[str]) -> Archive:
    return archive(base, seen.system, seen.codename, _own_lists(seen, disabled), seen.keyrings)


def _own_lists(seen: Seen, disabled: Sequence[str]) -> dict[str, str]:
    """Path and content of the host's own lists, those that llmhost disabled under their former path."""
    former = {path: seen.lists[path + DISABLED] for path in disabled}
    present = {path: seen.lists[path] for path in OWN_LISTS if path in seen.lists}
    return {path: "\n".join(lines) for path, lines in {**former, **present}.items()}


def _announce(change: Change, seen: Seen) -> None:
    told = [f"write {path}" for path in change.write] + [f"remove {path}" for path in change.remove]
    for path in change.disable:
        told.append(f"rename {path} to {path}{DISABLED}")
        told += [
            f"    with it falls silent: {repository} (give it a file of its own in /etc/apt/sources.list.d)"
            for repository in strangers(path, "\n".join(seen.lists[path]), seen.system)
        ]
    told += [f"rename {path}{DISABLED} back to {path}" for path in change.restore]
    for line in told:
        logger.info(f"{host.print_prefix}{line}")


# --- the change, as a script: trust first, the host's own lists last, and only once the new archive has answered


def _script(base: BasePlan, change: Change) -> str:
    lines = ["set -eu", "umask 022"]
    lines += [_write(path, content) for path, content in change.write.items() if path != SOURCES]
    lines += [f"rm -f {path}" for path in change.remove if path != SOURCES]
    if change.rebuild_store:
        lines.append(f"{UPDATER} --fresh >/dev/null </dev/null")  # fresh: a renewed certificate keeps its file's name
    if SOURCES in change.write:
        lines += [_proven(base, change.write[SOURCES]), _write(SOURCES, change.write[SOURCES])]
    lines += [f"mv --backup=numbered {path} {path}{DISABLED}" for path in change.disable]
    lines += [f"mv --no-clobber {path}{DISABLED} {path}" for path in change.restore]
    lines += [f"rm -f {path}" for path in change.remove if path == SOURCES]
    return "\n".join(lines)


def _write(path: str, content: str) -> str:
    part = f"{path}.llmhost-part"
    return f"mkdir -p {path.rpartition('/')[0]}; printf %s {shlex.quote(content)} >{part}; mv {part} {path}"


# apt itself fetches and verifies what each suite's signature covers, and no more, in a directory of its own.
_PROOF = r"""
try=$(mktemp -d /run/llmhost-archive.XXXXXX)
trap 'rm -rf "$try"' EXIT
mkdir -p "$try/lists/partial"
printf %s CONTENT >"$try/archive.sources"
said=$(apt-get -q -o Dir::Etc::SourceList="$try/archive.sources" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$try/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root \
    -o Acquire::IndexTargets::deb::Packages::DefaultEnabled=false -o Acquire::Languages=none \
    -o APT::Update::Error-Mode=any update 2>&1 </dev/null) || { echo "$said" >&2; echo REMEDY >&2; exit 1; }
"""


def _proven(base: BasePlan, content: str) -> str:
    security = (
        f"{base.apt_security} (mirror_apt_security)" if base.apt_security else "it (mirror_apt_security is unset)"
    )
    remedy = (
        f"{base.apt_archive} (mirror_apt_archive) could not be read as this distribution's archive, "
        f"or {security} as that of its security updates. The host's own lists are as they were"
    )
    return _PROOF.replace("CONTENT", shlex.quote(content)).replace("REMEDY", shlex.quote(remedy))
