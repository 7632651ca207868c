"""Defaults for every host. docs/settings.md lists all settings; uncomment or add what you want to change.

A group named as an inventory group or file (home, edge, lab) may have its own file beside this one, which wins.
"""

from infra.guard import watch_run
from infra.transport import nodelay_transport

watch_run()  # a run that reached no host fails, and each host gets a line at the end

# --- how hosts are reached
ssh_paramiko_connect_kwargs = {"transport_factory": nodelay_transport}
ssh_connect_retries = 2

# --- what they serve
# accelerator = "auto"                  # "auto", "cpu" or "nvidia"
# model = "smollm2-135m-instruct"       # catalogue name, hub repository or absolute path
# engine_context_tokens = 8192          # tokens, prompt plus reply
# engine_concurrency = 4                # full contexts held at once

# --- hosts with an NVIDIA GPU (docs/driver.md)
# driver_branch = "580"                 # "580", "595" or "615"
# driver_source = "auto"                # or "installed": the driver is yours to keep
# reboot_allowed = "auto"               # "never": stop and say that a reboot is due
# cuda_toolkit = "none"                 # "venv" or "system" for those who compile kernels

# --- where things come from (docs/mirrors.md): mirrors, proxies, a CA of your own
# mirror_python_index = "https://mirror.example/simple/"
# proxy_https = "http://proxy.example:3128"
# ca_certificate = "/etc/ssl/our-ca.pem"   # a file on this machine

# --- who reaches it (loopback only, unless published)
# engine_port = 8000
# engine_publish = False
# webui_port = 7860
# webui_publish = False
# webui_admin_email = "admin@localhost"
