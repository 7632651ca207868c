"""Read by pyinfra before anything else: which pyinfra, and what counts as a failed run."""

from pyinfra import config

from infra.guard import watch_run

config.REQUIRE_PYINFRA_VERSION = "==3.10.0"
# Uploads and pyinfra's own temporary files; ours travel on standard input (infra/hostfiles.py).
config.TEMP_DIR = "/tmp"
watch_run()
