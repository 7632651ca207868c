"""What goes wrong with real machines, done to a lab host by its name. `lab.hosts.start` brings one back."""

from __future__ import annotations

import signal

from lab import LabError, cgroups, hosts, shell, state


def cut_network(name: str) -> None:
    """Pulls the host's network cable."""
    _, host = state.find_host(name)
    shell.run("ip", "link", "set", host.interface, "down")


def restore_network(name: str) -> None:
    """Plugs the cable in again."""
    _, host = state.find_host(name)
    shell.run("ip", "link", "set", host.interface, "up")


def lose_power(name: str) -> None:
    """Pulls the plug: every process is gone at once. What was written stays, flushed or not: no test of torn writes.

    The host's PID 1 is killed, not systemd-nspawn: without its supervisor a host would live on as an orphan.
    """
    _, host = state.find_host(name)
    if not cgroups.signal_init(host.leaf, signal.SIGKILL):
        raise LabError(f"{name} is not running.")
    if not cgroups.await_empty(host.leaf, timeout_seconds=10):
        raise LabError(f"processes of {name} survive its power loss: {cgroups.processes(host.leaf)}")
    hosts.release(name)


def power_on(name: str) -> None:
    """Starts a host that lost its power or was stopped, and waits until it answers."""
    lab, host = state.find_host(name)
    hosts.start(lab, host)
    hosts.wait_ready(lab, host)


def freeze(name: str) -> None:
    """Stops the host where it is: connections hang, nothing is refused."""
    _, host = state.find_host(name)
    cgroups.freeze(host.leaf, frozen=True)


def thaw(name: str) -> None:
    """Lets a frozen host go on."""
    _, host = state.find_host(name)
    cgroups.freeze(host.leaf, frozen=False)


def limit_bandwidth(name: str, megabits_per_second: float) -> None:
    """Slows what the host receives down to a rate; `restore_bandwidth` lifts it."""
    _, host = state.find_host(name)
    shape = f"tbf rate {megabits_per_second}mbit burst 64kb latency 100ms".split()
    shell.run("tc", "qdisc", "replace", "dev", host.interface, "root", *shape)


def restore_bandwidth(name: str) -> None:
    """Lifts the limit."""
    _, host = state.find_host(name)
    shell.succeeds("tc", "qdisc", "delete", "dev", host.interface, "root")
