"""The llmhost command: what pyinfra lacks. Changing a host always goes through pyinfra."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Inventory = Annotated[str, typer.Argument(help="Inventory file, such as inventories/home.py, or a host name.")]
Limit = Annotated[list[str] | None, typer.Option(help="Only these hosts: a name, glob or group. Repeatable.")]
Data = Annotated[list[str] | None, typer.Option(help="Override a setting, name=value, as in pyinfra. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/contracts.md).")]


@app.command()
def plan(
    inventory: Inventory,
    hardware: Annotated[Path | None, typer.Option(help="Facts recorded by `llmhost facts`: no host is asked.")] = None,
    json: Json = False,
    limit: Limit = None,
    data: Data = None,
) -> None:
    """Print every decision for each host with its reason; change nothing.

    Exit 0 with a plan for every host, 1 when one is refused, 2 when one could not be looked at.
    """
    from infra import fleet
    from llmhost.show import print_plan

    recorded = _read(hardware) if hardware else None
    try:
        chosen = fleet.hosts(inventory, limit or (), data or ())
    except fleet.EmptyInventory as error:
        _stop(str(error))
    plans = fleet.plan_hosts(inventory, chosen, recorded)
    if json:
        print(jsonlib.dumps([p.as_json() for p in plans], indent=2))
    else:
        for p in plans:
            print_plan(p)
    raise typer.Exit(2 if any(map(fleet.unreachable, plans)) else 1 if any(p.refused for p in plans) else 0)


@app.command()
def facts(inventory: Inventory, limit: Limit = None, data: Data = None) -> None:
    """Print what a host is, as JSON, for `llmhost plan --hardware` on any machine."""
    from infra import fleet

    try:
        seen = list(fleet.look(fleet.hosts(inventory, limit or (), data or ())))
    except fleet.EmptyInventory as error:
        _stop(str(error))
    if len(seen) > 1:
        _stop(f"{inventory} holds {len(seen)} hosts; choose one: --limit {seen[0].host.name}")
    if seen[0].error:
        _stop(f"{seen[0].host.name}: {seen[0].error}")
    print(seen[0].facts)


@app.command()
def verify(
    inventory: Inventory,
    json: Json = False,
    limit: Limit = None,
    data: Data = None,
    reports: Annotated[Path, typer.Option(help="Where certificates are written.")] = Path("reports"),
) -> None:
    """Prove the hosts against their plan; exit 0 all passed, 1 a check failed, 2 could not run."""
    from infra import fleet
    from llmhost import verify as acceptance

    try:
        targets = fleet.targets(inventory, limit or (), data or ())
    except fleet.EmptyInventory as error:
        _stop(str(error))
    raise typer.Exit(acceptance.verify(targets, reports, json))


@app.command()
def settings(markdown: Annotated[bool, typer.Option("--markdown", help="As docs/settings.md.")] = False) -> None:
    """List all settings with type, default and meaning."""
    from llmhost.settings import Settings
    from llmhost.settings import markdown as as_markdown

    if markdown:
        print(as_markdown(), end="")
        return
    for name, field in Settings.model_fields.items():
        print(f"{name} = {field.default!r}\n    {field.description}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        _stop(f"--hardware {path}: {getattr(error, 'strerror', None) or 'it is no text'}")


def _stop(message: str) -> NoReturn:
    typer.echo(f"llmhost: {message}", err=True)
    raise typer.Exit(2)
