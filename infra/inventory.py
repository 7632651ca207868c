"""From pyinfra's inventory to settings, and from settings and facts to plans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmhost import local_files
from llmhost.catalogue import ROOT
from llmhost.settings import Layer, Loaded, SettingsError, load
from llmhost.verify import Connection

if TYPE_CHECKING:
    from pyinfra.api.host import Host


def load_settings(host: Host, inventory: str) -> Loaded:
    """The checked settings of a host, and the files of this machine that they name; raises SettingsError."""
    loaded = load(_layers(host, _spelled(inventory)))
    if problems := local_files.problems(loaded):
        raise SettingsError(problems)
    return loaded


def _spelled(inventory: str) -> str:
    """The inventory's path from the repository's root, however it was given: it is part of a decision's reason."""
    path = Path(inventory).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else inventory


def _layers(host: Host, inventory: str) -> Iterator[Layer]:
    """pyinfra's own order: command line, host, groups, all."""
    data = host.inventory
    yield Layer("--data", data.get_override_data())
    yield Layer(f"{inventory}, host {host.name}", data.get_host_data(host.name))
    merged = data.get_groups_data(host.groups)
    for group in host.groups:
        own = {name: value for name, value in data.get_group_data(group).items() if merged.get(name) is value}
        yield from _files(group, own, inventory)
    yield from _files("all", data.get_data(), inventory)


def _files(group: str, values: Mapping[str, Any], inventory: str) -> Iterator[Layer]:
    """Split a group's data by where it was written: its file in group_data, or the inventory."""
    path = next((d / f"{group}.py" for d in _group_data(inventory) if (d / f"{group}.py").is_file()), None)
    text = path.read_text() if path else ""
    in_file = {name: value for name, value in values.items() if re.search(rf"^{re.escape(name)}\b", text, re.MULTILINE)}
    yield Layer(f"group_data/{group}.py", in_file)
    yield Layer(f"{inventory}, group {group}", {name: v for name, v in values.items() if name not in in_file})


def _group_data(inventory: str) -> tuple[Path, ...]:
    return Path("group_data"), Path(inventory).parent / "group_data", ROOT / "group_data"


def connection(host: Host) -> Connection:
    """How acceptance reaches the host: as pyinfra does."""
    local = host.name.startswith("@local") or host.connector_cls.__name__ == "LocalConnector"
    get = host.data.get
    return Connection(
        backend="local" if local else "ssh",
        hostname=str(get("ssh_hostname") or host.name),
        port=int(get("ssh_port") or 0),
        user=str(get("ssh_user") or ""),
        key=str(get("ssh_key") or ""),
        known_hosts_file=str(get("ssh_known_hosts_file") or ""),
        strict=str(get("ssh_strict_host_key_checking") or "accept-new"),  # pyinfra's own default
        config_file=str(get("ssh_config_file") or ""),
        sudo=bool(get("_sudo")),
    )
