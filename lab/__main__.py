"""The command line of the lab: `python -m lab --help`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from types import FrameType

from lab import LabError, images, life, preflight, ssh, state
from lab.gpu.machines import MACHINES


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 done, 1 refused or failed with the reason on stderr, 130 interrupted and tidied up."""
    arguments = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return int(arguments.run(arguments) or 0)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; what this command had made is removed.", file=sys.stderr)
        return 130


def _up(arguments: argparse.Namespace) -> None:
    wanted = life.requests(arguments.os, arguments.count, arguments.gpu)
    options = life.Options(arguments.internet, arguments.use_mirror, arguments.mirror)
    lab = life.up(wanted, arguments.prefix, options, say=_say)
    if arguments.json:
        print(json.dumps(state.describe(lab), indent=2))


def _down(arguments: argparse.Namespace) -> None:
    life.down(arguments.prefix, say=_say)


def _status(arguments: argparse.Namespace) -> None:
    labs = [state.describe(lab) for prefix in state.prefixes() if (lab := state.load(prefix)) is not None]
    if arguments.json:
        print(json.dumps(labs, indent=2))
        return
    if not labs:
        print("no lab is up. Run: python -m lab up")
    for seen in labs:
        reach = "the Internet" if seen["internet"] else "no Internet"
        mirror = "running" if seen["mirror_running"] else "not running"
        print(f"lab {seen['prefix']}: {seen['subnet']}, {reach}, mirror {mirror}")
        for host in seen["hosts"]:
            power = "running" if host["running"] else "stopped"
            gpu = f"  simulated {host['gpu']}" if host["gpu"] else ""
            print(f"  {host['name']:<12} {host['ip']:<12} {host['os']:<14} {power}{gpu}")


def _ssh(arguments: argparse.Namespace) -> None:
    lab, host = state.find_host(arguments.name)
    argv = ssh.command(lab, host, *arguments.command, user=arguments.user)
    os.execvp(argv[0], argv)


def _reboot(arguments: argparse.Namespace) -> None:
    life.restart(arguments.name)
    _say(f"{arguments.name}: is back")


def _build(arguments: argparse.Namespace) -> None:
    systems = arguments.os or ["debian-12"]
    preflight.require(systems, arguments.mirror)
    for system in systems:
        print(images.ensure(system, arguments.mirror, rebuild=arguments.rebuild, say=_say))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab", description="Disposable systemd hosts with SSH (docs/lab.md)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    systems = ", ".join(images.OPERATING_SYSTEMS)

    up = commands.add_parser("up", help="boot hosts and wait until they answer SSH")
    up.add_argument("--os", action="append", default=[], metavar="[NAME=]OS", help=f"repeatable; {systems} (debian-12)")
    up.add_argument("--gpu", default="", metavar="MACHINE", help=f"simulate its GPUs: {', '.join(MACHINES)}")
    up.add_argument("--count", type=int, default=1, help="hosts per unnamed OS (1)")
    up.add_argument(
        "--internet", action=argparse.BooleanOptionalAction, default=False, help="let hosts out by NAT (no)"
    )
    up.add_argument("--no-mirror", dest="use_mirror", action="store_false", help="start no local mirror")
    up.add_argument("--json", action="store_true", help="print the lab's state when it is up")
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="remove a lab and whatever a crashed one left")
    down.set_defaults(run=_down)

    status = commands.add_parser("status", help="list labs and hosts")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=_status)

    shell = commands.add_parser("ssh", help="log in to a host, or run a command there")
    shell.add_argument("--user", default="root", help="root, or admin, who has sudo (root)")
    shell.add_argument("name")
    shell.add_argument("command", nargs=argparse.REMAINDER)
    shell.set_defaults(run=_ssh)

    reboot = commands.add_parser("reboot", help="reboot a host from within and wait for it")
    reboot.add_argument("name")
    reboot.set_defaults(run=_reboot)

    build = commands.add_parser("build", help="build images without booting anything")
    build.add_argument("--os", action="append", default=[], metavar="OS", help=f"repeatable; {systems} (debian-12)")
    build.add_argument("--rebuild", action="store_true", help="also where the cache has it: for newer packages")
    build.set_defaults(run=_build)

    for command in (up, down):
        command.add_argument("--prefix", default=state.default_prefix(), help="which lab ($LLMHOST_LAB, else lab)")
    for command in (up, build):
        command.add_argument("--mirror", metavar="URL", help="archive to build images from (mmdebstrap's default)")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
