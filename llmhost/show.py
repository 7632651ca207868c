"""Plans for people."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.markup import escape

from llmhost.plan.model import HostPlan


def print_plan(plan: HostPlan) -> None:
    """Each decision with its reason, grouped by concern; then the problems, if it is refused."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{escape(plan.host)}[/bold]  plan {plan.hash}")
    for concern, decisions in groupby(plan.decisions, key=lambda d: d.concern):
        console.print(f"  [bold]{concern}[/bold]")
        for d in decisions:
            console.print(f"    {d.setting} = {escape(str(d.value))}")
            console.print(f"        [dim]{escape(d.reason)}[/dim]")
    for p in plan.problems:
        console.print(f"  [red]Refused: {escape(p.setting)}[/red] ({escape(p.source)}): {escape(p.message)}")
        console.print(f"      {escape(p.remedy)}")
