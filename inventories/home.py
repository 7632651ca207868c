"""One lab box at home. Put its address here; everything else has a default (docs/settings.md)."""

hosts = [
    ("gpu1", {"ssh_hostname": "192.0.2.10", "ssh_user": "root"}),
]
