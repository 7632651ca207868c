"""The host's secrets: generated there, or supplied by the operator over standard input."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping

from pyinfra import host, logger
from pyinfra.api import FactBase, StringCommand, operation
from pyinfra.api.exceptions import FactProcessError

PROGRAM = "/usr/local/lib/llmhost/secrets"


class SecretChanges(FactBase[list[str]]):
    """Names of the secrets that `secrets apply` would change; None before the program is on the host."""

    def command(self) -> str:
        return f"if [ -x {PROGRAM} ]; then {PROGRAM} check; fi"

    def process(self, output: list[str]) -> list[str]:
        try:
            return list(json.loads("\n".join(output))["changes"])
        except (ValueError, KeyError, TypeError) as error:
            raise FactProcessError(f"expected the names of secrets from {PROGRAM}: {error!r}") from None


class _Hidden(list[str]):
    """Standard input that does not show itself: pyinfra prints a fact's arguments with -v and --debug."""

    def __repr__(self) -> str:
        return "[hidden]"

    __str__ = __repr__


@operation()
def present(supplied: Mapping[str, str]) -> Generator[StringCommand]:
    """Every secret in its root-only file. Values travel on standard input only and are never shown.

    + supplied: names and values that win over what the host has
    """
    stdin = _Hidden([json.dumps(dict(supplied))])
    changes = host.get_fact(SecretChanges, _stdin=stdin)
    if changes == []:
        host.noop("secrets are in place")
        return
    logger.info(f"{host.print_prefix}set {', '.join(changes or ['all secrets'])}")
    yield StringCommand(PROGRAM, "apply", ">/dev/null", _stdin=stdin)
