"""What pyinfra's command lacks at its end: a failure when no host took part, and one line per host.

pyinfra takes a misspelt inventory file for a host name that does not resolve, and a --limit that matches nothing for
no host: it warns, and exits 0 (field notes, pyinfra.md, 10).
"""

from __future__ import annotations

import click

_inventory = "the inventory"


def watch_run() -> None:
    """Watch the pyinfra command that is running, if one is; called from config.py and group_data/all.py.

    Two places, because neither is always read: config.py only from the repository's root, group data only where the
    inventory was found.
    """
    global _inventory
    context = click.get_current_context(silent=True)
    if context is None or "inventory" not in context.params or context.meta.get("llmhost.watched"):
        return
    context.meta["llmhost.watched"] = True
    _inventory = str(context.params["inventory"])
    context.call_on_close(lambda: _end(context))


def inventory_argument() -> str:
    """The inventory as it was given on pyinfra's command line (its context is not seen from a host's greenlet)."""
    return _inventory


def _end(context: click.Context) -> None:
    from pyinfra.context import ctx_state, state

    if not ctx_state.isset() or not state.initialised:
        return
    if not state.activated_hosts and not state.failed_hosts:
        limit = "".join(f" --limit {pattern}" for pattern in context.params.get("limit") or ())
        click.echo(
            f"--> No host matched {_inventory}{limit}: nothing was done. Is the file there, and the host in it?",
            err=True,
        )
        raise SystemExit(2)
    if not state.is_executing and not state.failed_hosts:
        return
    click.echo("--> Hosts:", err=True)
    for host in sorted(state.activated_hosts | state.failed_hosts, key=lambda host: host.name):
        ended = "failed" if host in state.failed_hosts else "done"
        click.echo(f"    {host.name}: {host.data.get('llmhost_refused') or ended}", err=True)
