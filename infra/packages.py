"""Distribution packages: installed whatever an earlier run, or someone else's, left in the way."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pyinfra import host, logger
from pyinfra.api import FactBase, QuoteString, StringCommand, operation


class InstalledPackages(FactBase[list[str]]):
    """Those of the given packages that are wholly installed: one that lost its power half-way is not."""

    def command(self, packages: Sequence[str]) -> StringCommand:
        query = ["dpkg-query", "--show", "--showformat", QuoteString("${Package} ${db:Status-Status}\\n")]
        return StringCommand(*query, *map(QuoteString, packages), "2>/dev/null", "||", "true")

    def process(self, output: list[str]) -> list[str]:
        return [line.split()[0] for line in output if line.endswith(" installed")]


# pyinfra's apt.packages fails on a host that lost its power in the middle of dpkg ("dpkg was interrupted"), and while
# another apt (a killed run's, a first boot's unattended upgrade) fetches lists: DPkg::Lock::Timeout has no say there.
_INSTALL = r"""
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
# A cloud image may still be configuring its archives and installing at its first boot.
command -v cloud-init >/dev/null && timeout 300 cloud-init status --wait >/dev/null 2>&1
deadline=$(($(date +%s) + 300))
until said=$(apt-get -qq update 2>&1); do
    case $said in *"Could not get lock"*) [ "$(date +%s)" -lt "$deadline" ] && sleep 1 && continue ;; esac
    echo "$said" >&2 # an archive that fails matters only where a package comes from it: apt-get install will say
    break
done
install() {
    apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install --yes --no-install-recommends "$@"
}
install "$@" || { dpkg --configure -a && install "$@"; }
"""


@operation()
def installed(packages: Sequence[str]) -> Generator[StringCommand]:
    """Install what is lacking of these packages, in one go, without recommended ones."""
    present = host.get_fact(InstalledPackages, packages=list(packages)) or []
    lacking = [package for package in packages if package not in present]
    if not lacking:
        host.noop(f"{len(packages)} packages are installed")
        return
    logger.info(f"{host.print_prefix}install {', '.join(lacking)}")
    yield StringCommand("sh", "-c", QuoteString(_INSTALL), "install", *map(QuoteString, lacking))
