"""Distribution packages: installed whatever an earlier run, or someone else's, left in the way."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from fnmatch import fnmatchcase

from pyinfra import host, logger
from pyinfra.api import FactBase, QuoteString, StringCommand, operation

from infra.apt import FETCH_LISTS, fetch_own_lists
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


# pyinfra's apt.packages fails on a host that lost its power in the middle of dpkg ("dpkg was interrupted"), and while
# another apt (a killed run's, a first boot's unattended upgrade) fetches lists or installs.
_PREPARE = r"""
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
# Ubuntu's needrestart would restart services in the middle of the run; ours are restarted by their own steps.
export NEEDRESTART_SUSPEND=1
# A cloud image may still be configuring its archives and installing at its first boot.
command -v cloud-init >/dev/null && timeout 300 cloud-init status --wait >/dev/null 2>&1
"""
_LISTS = r"""
# An archive that fails matters only where a package comes from it: apt-get install will say.
fetch_lists || echo "$said" >&2
"""
_INSTALL = r"""
install() {{
    apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 {options} install --yes --no-install-recommends "$@"
}}
install "$@" || {{ dpkg --configure -a && install "$@"; }} || {{ {failed}; exit 1; }}
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
    + owned: packages of which llmhost alone decides: held ones change too, and all move to the planned version together
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
    script = [_PREPARE, FETCH_LISTS, *fetch_own_lists(sources), _LISTS]
    # NVIDIA's packages that pin a version do so once they are installed, not in the transaction that installs them.
    pinning = [package for package in lacking if package.startswith(_PINNING)]
    if pinning:
        # Purged, because preferences are a package's configuration, which a removed one leaves behind.
        yield _command([*script, _install(owned, remedy, "--purge")], [*pinning, *_removed(going, pinning=True)])
        script, going = [_PREPARE], [name for name in going if not name.startswith(_PINNING)]
    changed = list(packages) if owned else lacking
    yield _command([*script, _install(owned, remedy)], [*changed, *_removed(going)])


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
