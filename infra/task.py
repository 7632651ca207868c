"""What a task is: a pyinfra deploy that leaves refused hosts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, cast

from pyinfra import host, logger, state
from pyinfra.api.deploy import deploy

from llmhost.plan.model import Problem

P = ParamSpec("P")


def task(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Mark a function as a task: its operations are grouped under `name`; a refused host gets none of them."""

    def decorate(function: Callable[P, None]) -> Callable[P, None]:
        apply = cast(Callable[P, None], deploy(name)(function))

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            if host not in state.failed_hosts:
                apply(*args, **kwargs)

        return run

    return decorate


def refuse(problems: Iterable[Problem]) -> None:
    """Take this host out of the run, saying why, before anything on it is touched. The run ends with exit 1.

    Raising here would end the run for every other host too: pyinfra raises the first exception of any host's deploy.
    """
    for problem in problems:
        logger.error(f"{host.print_prefix}Refused: {problem.setting} ({problem.source}): {problem.message}")
        logger.error(f"{host.print_prefix}    {problem.remedy}")
    host.data.llmhost_refused = "refused, nothing on it was touched"
    refused = state.inventory.get_host(host.name)
    state.failed_hosts.add(refused)
    state.active_hosts.discard(refused)
