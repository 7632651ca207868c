"""deploy.py with newer versions of what unattended upgrades leave alone: pyinfra inventories/home.py upgrade.py

Driver, kernels, Docker and container toolkit move within the plan's pins; the rest of the run is deploy.py's.
"""

from tasks.acceptance import acceptance
from tasks.base import base_system
from tasks.containers import containers
from tasks.driver import nvidia_driver
from tasks.engine import engine
from tasks.model import model
from tasks.preflight import preflight
from tasks.python import python_environment
from tasks.webui import open_webui

plan = preflight()
base_system(plan)
nvidia_driver(plan, upgrade=True)
containers(plan, upgrade=True)
python_environment(plan)
model(plan)
engine(plan)
open_webui(plan)
acceptance(plan)
