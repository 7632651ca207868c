"""Distribution packages: installed whatever an earlier run, or someone else's, left in the way."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from fnmatch import fnmatchcase

from pyinfra import host, logger, state
from pyinfra.api import FactBase, QuoteString, StringCommand, operation

from infra.apt import FETCH_LISTS, fetch_own_lists
from infra.facts import failed_look
from llmhost.plan.model import AptSource


class InstalledPackages(FactBase[dict[str, str]]):
    """{name: version} of those of the given packages (or dpkg's patterns) that are wholly installed.

    One that lost its power half-way is not.
    """

    def command(self, packages: Sequence[str]) -> StringCommand:
        query = ["dpkg-query", "--show", "--showformat", QuoteString("${Package} ${db:Status-Status} ${Version}\\n")]
        return StringCommand(*query, *map(QuoteString, packages), "2>/dev/null", "||", "true")

    def process(self, output: list[str]) -> dict[str, str]:
        words = [line.split() for line in output]
        return {name: "".join(version) for name, status, *version in words if status == "installed"}


class FirstBoot(FactBase[bool]):
    """Whether cloud-init still configures archives and installs, and was not waited for since this boot."""

    def command(self) -> str:
        return f"[ -e {_WAITED} ] || cloud-init status 2>/dev/null | grep -w running || true"

    def process(self, output: list[str]) -> bool:
        return output == ["status: running"]


# It goes at the next boot. A first boot that hangs is waited for once, not before each step.
_WAITED = "/run/llmhost-first-boot"
_FIRST_BOOT = f"timeout 300 cloud-init status --wait >/dev/null 2>&1; : >{_WAITED}"

# pyinfra's apt.packages fails on a host that lost its power in the middle of dpkg ("dpkg was interrupted"), and while
# another apt (a killed run's, a first boot's unattended upgrade) fetches lists or installs.
_PREPARE = r"""
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
# Ubuntu's needrestart would restart services in the middle of the run; ours are restarted by their own steps.
export NEEDRESTART_SUSPEND=1
"""
_LISTS = r"""
# An archive that fails matters only where a package comes from it: apt-get install will say.
fetch_lists || echo "$said" >&2
"""
# A configuration file that the operator changed stays, and nobody is asked: there is no terminal to answer at.
_INSTALL = r"""
install() {{
    apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        {options} install --yes --no-install-recommends "$@"
}}
mend() {{
    dpkg --force-confdef --force-confold --configure -a
    # What lost its power while it was unpacked: neither dpkg --configure -a nor apt-get install takes it up.
    half=$(dpkg-query --show --showformat '${{Package}} ${{db:Status-Status}}\n' | sed -n 's/ half-installed$//p')
    [ -z "$half" ] || install --reinstall $half "$@"
}}
install "$@" || {{ mend "$@"; install "$@"; }} || {{ {failed}; exit 1; }}
"""
# The plan names these packages, their versions and what gives way: a hold or a newer version does not overrule it.
_OWNED = "--allow-change-held-packages --allow-downgrades"
_PINNING = "nvidia-driver-pinning-"


@operation()
def installed(
    packages: Sequence[str],
    sources: Sequence[AptSource] = (),
    rivals: Sequence[str] = (),
    gives_way: Callable[[str], bool] = lambda name: True,
    outdated: Callable[[Mapping[str, str]], Sequence[str]] = lambda installed: (),
    owned: bool = False,
    remedy: str = "",
) -> Generator[StringCommand]:
    """Install what is lacking of these packages, in one go, without recommended ones.

    + packages: "name", or "name=version" where another version is as good as none
    + sources: repositories they may come from beside the distribution's: these must answer, rightly signed
    + rivals: dpkg's patterns of packages that may stand in the way
    + gives_way: which of those that are installed go in the same transaction
    + outdated: which of those that are installed have a version that will not do
    + owned: packages of which llmhost alone decides: held ones change too, and where a version or a branch gives way to
      another all move together
    + remedy: what the operator can do if it fails
    """
    found = host.get_fact(InstalledPackages, packages=[*map(_name, packages), *rivals])
    present = found or {}
    wanted = set(map(_name, packages))
    lacking = [package for package in packages if not _is_there(package, present)]
    going = sorted(name for name in present if _any_matches(name, rivals) and name not in wanted and gives_way(name))
    old = [name for name in outdated(present) if name not in going]
    if not lacking and not going and not old:
        host.noop(f"{len(packages)} packages are installed")
        return
    _announce(lacking, going, old, present)
    yield from _first_boot_ended()
    script = [_PREPARE, FETCH_LISTS, *fetch_own_lists(sources), _LISTS]
    # NVIDIA's packages that pin a version do so once they are installed, not in the transaction that installs them.
    pinning = [package for package in lacking if package.startswith(_PINNING)]
    together = owned and bool(going or pinning or _moves(lacking, old, present, wanted))
    if pinning:
        # Purged, because preferences are a package's configuration, which a removed one leaves behind.
        yield _command([*script, _install(owned, remedy, "--purge")], [*pinning, *_removed(going, pinning=True)])
        script, going = [_PREPARE], [name for name in going if not name.startswith(_PINNING)]
    # What is there and will do stays: given to apt it would move to its newest, a kernel's meta package too.
    changed = packages if together else [name for name in packages if name in lacking or _name(name) in old]
    yield _command([*script, _install(owned, remedy)], [*changed, *_removed(going)])


# The simulation needs present lists, so that they are fetched even if nothing comes of it.
_NEWER = r"""
names=$(dpkg-query --show --showformat '${db:Status-Abbrev}${Package}\n' | sed -n 's/^ii *//p' | grep -E "$@")
[ -n "$names" ] || exit 0
said=$(apt-get -s --only-upgrade --no-install-recommends install $names 2>&1) || { echo "$said" >&2; exit 1; }
echo "$said" | sed -n 's/^Inst //p'
"""


class NewerPackages(FactBase[dict[str, tuple[str, str]]]):
    """{name: (old, new)} of what apt would do if those of the installed packages that match were to be the newest.

    Versions; the old one is "" of a package that comes along, such as the kernel that a meta package names.

    Packages on hold are left out. `script` comes first: it fetches the lists.
    """

    def command(self, patterns: Sequence[str], script: str) -> StringCommand:
        expressions = [QuoteString(f"--regexp={pattern}") for pattern in patterns]
        return StringCommand("sh", "-c", QuoteString(script + _NEWER), "newer", *expressions)

    def process(self, output: list[str]) -> dict[str, tuple[str, str]]:
        """Lines such as "docker-ce [5:29.7.2] (5:29.8.0 Docker:stable [amd64])"."""
        found = (re.match(r"(\S+) (?:\[(\S+)\] )?\((\S+) ", line) for line in output)
        return {match[1]: (match[2] or "", match[3]) for match in found if match}


@operation()
def upgraded(patterns: Sequence[str], sources: Sequence[AptSource] = (), remedy: str = "") -> Generator[StringCommand]:
    """The newest versions of the installed packages that match, in one transaction; what apt's pins allow.

    Whether there are any is known only once the lists are fetched, which is nothing to do while pyinfra prepares.

    + patterns: extended regular expressions: what unattended upgrades leave alone
    + sources: repositories they may come from beside the distribution's: these must answer, rightly signed
    """
    if not state.is_executing:
        return
    yield from _first_boot_ended()
    script = "\n".join([_PREPARE, FETCH_LISTS, *fetch_own_lists(sources), _LISTS])
    newer: dict[str, tuple[str, str]] | None = host.get_fact(NewerPackages, patterns=patterns, script=script)
    if failed_look(newer):
        return
    if not newer:
        host.noop("there is nothing newer")
        return
    for name, (old, new) in newer.items():
        logger.info(f"{host.print_prefix}{f'upgrade {name} {old} to' if old else f'install {name}'} {new}")
    # What comes along is not named: apt removes it some day, as it removes what nobody asked for.
    named = [name for name, (old, _) in newer.items() if old]
    yield _command([_PREPARE, _install(owned=False, remedy=remedy, more="--only-upgrade")], named)


def _first_boot_ended() -> Generator[StringCommand]:
    if host.get_fact(FirstBoot):
        logger.info(f"{host.print_prefix}wait for cloud-init, which still sets the host up: up to 300 s")
        yield StringCommand("sh", "-c", QuoteString(_FIRST_BOOT))


def _moves(lacking: Sequence[str], old: Sequence[str], present: Mapping[str, str], wanted: set[str]) -> bool:
    """Whether another version comes: one that is named, or one of packages that these bring along."""
    return any(_name(package) in present for package in lacking) or not wanted.issuperset(old)


def _name(package: str) -> str:
    return package.partition("=")[0]


def _is_there(package: str, present: dict[str, str]) -> bool:
    name, _, version = package.partition("=")
    return name in present and version in ("", present[name])


def _any_matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _removed(names: Sequence[str], pinning: bool = False) -> list[str]:
    """apt-get's words for packages that go."""
    return [f"{name}-" for name in names if not pinning or name.startswith(_PINNING)]


def _install(owned: bool, remedy: str, more: str = "") -> str:
    failed = f"echo {shlex.quote(remedy)} >&2" if remedy else ":"
    return _INSTALL.format(options=f"{_OWNED if owned else ''} {more}".strip(), failed=failed)


def _command(script: Sequence[str], arguments: Sequence[str]) -> StringCommand:
    return StringCommand("sh", "-c", QuoteString("\n".join(script)), "install", *map(QuoteString, arguments))


def _announce(lacking: Sequence[str], going: Sequence[str], old: Sequence[str], present: Mapping[str, str]) -> None:
    for package in lacking:
        had = present.get(_name(package))
        logger.info(f"{host.print_prefix}install {package}{f' in place of {had}' if had else ''}")
    for name in old:
        logger.info(f"{host.print_prefix}replace {name} {present[name]}")
    if going:
        logger.info(f"{host.print_prefix}remove {', '.join(going)}, which give way")
