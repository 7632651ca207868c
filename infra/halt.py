"""Take a host out of the run in the middle of an operation, saying why."""

from __future__ import annotations

from pyinfra import logger
from pyinfra.api import FunctionCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State


def halt(why: str) -> FunctionCommand:
    """A command that fails with this sentence: the host's run ends here, the others' go on."""
    return FunctionCommand(_fail, (why,), {})


def _fail(state: State, host: Host, why: str) -> bool:
    logger.error(f"{host.print_prefix}{why}")
    return False
