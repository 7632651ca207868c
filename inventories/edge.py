"""An example fleet in rings: the canary first, then the others (docs/fleet.md)."""

canary = [
    ("edge-01", {"ssh_hostname": "192.0.2.21"}),
]

fleet = [
    ("edge-02", {"ssh_hostname": "192.0.2.22"}),
    ("edge-03", {"ssh_hostname": "192.0.2.23", "engine_context_tokens": 4096}),
    ("edge-04", {"ssh_hostname": "192.0.2.24"}),
]
