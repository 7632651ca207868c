"""The lab's network: a bridge with a subnet of its own, which reaches this machine, and the Internet only if asked.

Without the Internet a host has only what the mirror gives, so that a missing pin fails here and not at a customer.
Packets that would leave are refused, not dropped: a program that tries fails in milliseconds.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
from pathlib import Path

from lab import LabError, shell, state
from lab.state import Lab

SUBNETS = [f"10.77.{number}.0/24" for number in range(1, 255)]
FIRST_HOST = 11  # .1 is the controller


def ensure(lab: Lab, *, internet: bool) -> None:
    """Makes the bridge, its address and its firewall rules where they are missing."""
    if is_up(lab.prefix):
        if lab.internet != internet:
            raise LabError(
                f"the lab {lab.prefix!r} already runs {'with' if lab.internet else 'without'} the Internet. "
                f"Run: python -m lab down --prefix {lab.prefix}"
            )
        return
    with state.lock("network"):
        _choose(lab, internet=internet)
        state.save(lab)
        for chain, *rule in _rules(lab):
            table = "nat" if chain == "POSTROUTING" else "filter"
            shell.run("iptables", "-w", "-t", table, "-I", chain, *rule, *_mark(lab.prefix))
        for interface in lab.forwarding_enabled:
            _forwarding(interface).write_text("1")
        _make_bridge(lab)


def is_up(prefix: str) -> bool:
    """Whether the lab's network is complete: its bridge is switched on last."""
    links = json.loads(shell.run("ip", "-json", "link"))
    return any(link["ifname"] == _bridge(prefix) and "UP" in link["flags"] for link in links)


def free_address(lab: Lab) -> str:
    """The lowest address of the subnet that no host of the lab has."""
    taken = {host.ip for host in lab.hosts}
    for address in list(ipaddress.ip_network(lab.subnet).hosts())[FIRST_HOST - 1 :]:
        if str(address) not in taken:
            return str(address)
    raise LabError(f"the subnet {lab.subnet} of the lab {lab.prefix!r} is full.")


def name_servers() -> list[str]:
    """Name servers that a host can reach: those behind systemd-resolved's stub on this machine, not the stub."""
    for file in (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf")):
        if file.exists():
            words = [line.split() for line in file.read_text().splitlines()]
            servers = [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]
            return [server for server in servers if not server.startswith(("127.", "::1"))]
    return []


def remove_interface(name: str) -> None:
    """Removes an interface that may be gone already: the kernel takes a dead host's away in its own time."""
    shell.succeeds("ip", "link", "delete", name)


def remove(prefix: str, lab: Lab | None) -> None:
    """Removes the lab's rules, its hosts' interfaces and its bridge, known from the state or not."""
    for table in ("filter", "nat"):
        for line in shell.run("iptables", "-w", "-t", table, "-S").splitlines():
            words = shlex.split(line)
            if words[0] == "-A" and _mark(prefix)[-1] in words:
                shell.succeeds("iptables", "-w", "-t", table, "-D", *words[1:])
    for name in interfaces(prefix):
        remove_interface(name)
    if lab is not None:
        _restore_forwarding(lab)


def interfaces(prefix: str) -> list[str]:
    """The lab's interfaces on this machine: its hosts' and its bridge."""
    names = [link["ifname"] for link in json.loads(shell.run("ip", "-json", "link"))]
    return [name for name in names if name.startswith(f"vb-{prefix}-") or name == _bridge(prefix)]


def _bridge(prefix: str) -> str:
    return f"br-{prefix}"


def _choose(lab: Lab, *, internet: bool) -> None:
    lab.subnet = _free_subnet()
    lab.address = str(next(ipaddress.ip_network(lab.subnet).hosts()))
    lab.bridge = _bridge(lab.prefix)
    lab.internet = internet
    uplinks = [route["dev"] for route in json.loads(shell.run("ip", "-4", "-json", "route", "show", "default"))]
    wanted = uplinks if internet else []
    lab.forwarding_enabled = [name for name in wanted if _forwarding(name).read_text().strip() == "0"]


def _free_subnet() -> str:
    in_use = _networks_in_use()
    for subnet in SUBNETS:
        if not any(ipaddress.ip_network(subnet).overlaps(network) for network in in_use):
            return subnet
    raise LabError("no subnet of 10.77.0.0/16 is free on this machine: stop a lab, see `python -m lab status`.")


def _networks_in_use() -> list[ipaddress.IPv4Network]:
    routes = json.loads(shell.run("ip", "-4", "-json", "route"))
    return [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]


def _make_bridge(lab: Lab) -> None:
    shell.run("ip", "link", "add", lab.bridge, "type", "bridge")
    shell.run("ip", "address", "add", f"{lab.address}/24", "dev", lab.bridge)
    _forwarding(lab.bridge).write_text("1")  # of this interface only: so that packets reach the rule that refuses them
    # A host that boots is asked for ten times a second, not once: its first answer otherwise comes up to 1 s late.
    Path(f"/proc/sys/net/ipv4/neigh/{lab.bridge}/retrans_time_ms").write_text("100")
    shell.run("ip", "link", "set", lab.bridge, "up")


def _rules(lab: Lab) -> list[list[str]]:
    """Chain and rule; the last one comes first in its chain. Docker, or a firewall, drops what no rule accepts."""
    to_controller = ["INPUT", "-i", lab.bridge, "-j", "ACCEPT"]
    among_hosts = ["FORWARD", "-i", lab.bridge, "-o", lab.bridge, "-j", "ACCEPT"]
    if not lab.internet:
        refuse = ["FORWARD", "-i", lab.bridge, "-j", "REJECT"]
        refuse_tcp = [*refuse[:3], "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]  # ICMP is limited to 1/s
        return [to_controller, refuse, refuse_tcp, among_hosts]
    return [
        to_controller,
        ["FORWARD", "-i", lab.bridge, "-j", "ACCEPT"],
        ["FORWARD", "-o", lab.bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"],
        among_hosts,
        ["POSTROUTING", "-s", lab.subnet, "!", "-d", lab.subnet, "-j", "MASQUERADE"],
    ]


def _mark(prefix: str) -> list[str]:
    return ["-m", "comment", "--comment", f"llmhost-lab-{prefix}"]


def _forwarding(interface: str) -> Path:
    return Path(f"/proc/sys/net/ipv4/conf/{interface}/forwarding")


def _restore_forwarding(lab: Lab) -> None:
    """Turns off what this lab turned on, unless another lab with the Internet still uses it; that one then owns it."""
    others = [other for prefix in state.prefixes() if prefix != lab.prefix and (other := state.load(prefix))]
    heir = next((other for other in others if other.internet), None)
    for interface in lab.forwarding_enabled:
        if heir is None:
            _forwarding(interface).write_text("0")
    if heir is not None and lab.forwarding_enabled:
        heir.forwarding_enabled = sorted({*heir.forwarding_enabled, *lab.forwarding_enabled})
        state.save(heir)
