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

# --- who reaches it (loopback only, unless published)
# engine_port = 8000
# engine_publish = False
# webui_port = 7860
# webui_publish = False
# webui_admin_email = "admin@localhost"
