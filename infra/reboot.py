"""Reboot a host and go on in the same run.

pyinfra's server.reboot takes a smaller uptime for the proof; in a container that is the controller's, and a clock that
jumps moves it. The kernel's boot id changes with each boot and with nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path

from paramiko import SSHException
from pyinfra import logger
from pyinfra.api import FunctionCommand, QuoteString, StringCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.connectors.util import clear_askpass_cache

BOOT_ID = "/proc/sys/kernel/random/boot_id"
LIMIT_SECONDS = 1800  # servers with terabytes of memory train and test it for a quarter of an hour and more
_TELL_SECONDS = 30


def is_this_machine(host: Host, boot_id: str) -> bool:
    """Whether the host is the machine that pyinfra runs on, or shares its kernel: it must not be rebooted from here."""
    if host.connector_cls.__name__ == "LocalConnector":
        return True
    own = Path(BOOT_ID)
    return own.is_file() and own.read_text().strip() == boot_id


# It is on the disk before the reboot begins: the run may die while it waits.
_RECORD = 'umask 077 && printf "%s\\n" "$2" >"$1.part" && sync "$1.part" && mv "$1.part" "$1" && sync "${1%/*}"'


def rebooted(record: str, reason: str, before: str) -> Generator[StringCommand | FunctionCommand]:
    """Write down why, reboot the host, and wait until it answers from another boot.

    + record: a file on the host
    + before: its boot id now
    """
    told = json.dumps({"reason": reason, "boot_id": before})
    yield StringCommand("sh", "-c", QuoteString(_RECORD), "record", QuoteString(record), QuoteString(told))
    # Detached, so that the answer comes before the connection goes (pyinfra #1708).
    yield StringCommand("( sleep 1; systemctl reboot ) </dev/null >/dev/null 2>&1 &")
    yield FunctionCommand(_wait, (before,), {})


def _wait(state: State, host: Host, before: str) -> bool:
    clear_askpass_cache(host)  # lay on the host that is gone
    began = time.monotonic()
    told = began
    while (now := time.monotonic()) < began + LIMIT_SECONDS:
        host.connected = False  # whatever there was is of the old boot; disconnecting properly would ask it
        host.connector.disconnect()
        if _boot_id(host) not in ("", before):
            logger.info(f"{host.print_prefix}rebooted, answers again after {now - began:.0f} s")
            return True
        if now > told + _TELL_SECONDS:
            told = now
            logger.info(f"{host.print_prefix}waiting for the reboot since {now - began:.0f} s")
        time.sleep(1)
    logger.error(
        f"{host.print_prefix}did not come back from its reboot within {LIMIT_SECONDS} s. "
        "Look at its console; then deploy again, which goes on from here"
    )
    return False


def _boot_id(host: Host) -> str:
    """The host's boot id, "" while it does not answer."""
    try:
        host.connect(show_errors=False)
        if not host.connected:
            return ""
        answered, output = host.run_shell_command(f"cat {BOOT_ID}", _timeout=15)
    except (OSError, EOFError, SSHException):
        return ""
    return output.stdout.strip() if answered else ""
