"""The disposable lab hosts that run now (`python -m lab up`, docs/lab.md). LLMHOST_LAB names a lab other than "lab"."""

from infra.transport import nodelay_transport
from lab import state

_lab = state.running()

hosts = [
    (
        host.name,
        {
            "ssh_hostname": host.ip,
            "ssh_user": "root",
            "ssh_key": str(_lab.ssh_key),
            "ssh_known_hosts_file": str(_lab.known_hosts),
            "ssh_strict_host_key_checking": "yes",
            "ssh_paramiko_connect_kwargs": {"transport_factory": nodelay_transport},
            "accelerator": "cpu",
            **_lab.settings_of(host),
        },
    )
    for host in _lab.hosts
]
