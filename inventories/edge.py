"""An example fleet: one canary, then the others; all in one run, side by side. Health-gated rings are yet to come."""

canary = [
    ("edge-01", {"ssh_hostname": "192.0.2.21"}),
]

fleet = [
    ("edge-02", {"ssh_hostname": "192.0.2.22"}),
    ("edge-03", {"ssh_hostname": "192.0.2.23", "engine_context_tokens": 4096}),
    ("edge-04", {"ssh_hostname": "192.0.2.24"}),
]
