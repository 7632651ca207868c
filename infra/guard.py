"""Refuse runs that pyinfra would end with exit 0 and nothing done (field notes, pyinfra.md, 10)."""

from __future__ import annotations

import click


def refuse_empty_inventory() -> None:
    """When this pyinfra command ends, fail with exit 2 if no host took part.

    A misspelt inventory file is taken for a host name that does not resolve, and a --limit that matches nothing leaves
    no host: pyinfra warns, and exits 0.
    """
    context = click.get_current_context(silent=True)
    if context is not None and "inventory" in context.params and not context.meta.get("llmhost.guarded"):
        context.meta["llmhost.guarded"] = True
        context.call_on_close(lambda: _check(context))


def inventory_argument() -> str:
    """The inventory as it was given on pyinfra's command line."""
    context = click.get_current_context(silent=True)
    return str(context.params["inventory"]) if context and "inventory" in context.params else "the inventory"


def _check(context: click.Context) -> None:
    from pyinfra.context import ctx_state, state

    if not ctx_state.isset() or not state.initialised or state.activated_hosts or state.failed_hosts:
        return
    limit = " ".join(context.params.get("limit") or ())
    where = f"{context.params['inventory']}{f' --limit {limit}' if limit else ''}"
    click.echo(f"--> No host matched {where}: nothing was done. Is the file there, and the host in it?", err=True)
    raise SystemExit(2)
