"""deploy.py without engine, model and chat page: for tests that are about the driver and containers alone."""

from tasks.base import base_system
from tasks.containers import containers
from tasks.driver import nvidia_driver
from tasks.preflight import preflight

plan = preflight()
base_system(plan)
nvidia_driver(plan)
containers(plan)
