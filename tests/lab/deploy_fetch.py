"""Of deploy.py what fetches, and no service: packages, uv by pip, a small locked environment by uv, the model by it."""

from dataclasses import replace

from infra.hostfiles import HostFile, tree
from infra.models import fetched
from infra.releases import LOCKS, release, uv
from infra.task import task
from llmhost.catalogue import ROOT, uv_version
from llmhost.plan.model import HostPlan
from tasks.base import base_system
from tasks.preflight import preflight

# The hub's client with all that it imports, as the engine's lock has them.
NAMES = frozenset(
    {"anyio", "click", "filelock", "fsspec", "h11", "hf-xet", "httpcore2", "httpx2", "huggingface-hub", "idna"}
    | {"packaging", "pyyaml", "tqdm", "truststore", "typing-extensions"}
)


def small_lock(text: str) -> str:
    """Of a lock, the entries of NAMES."""
    entries = text.replace("\\\n", "\0").splitlines()
    return "\n".join(e.replace("\0", "\\\n") for e in entries if e.partition("==")[0] in NAMES) + "\n"


@task("Fetch")
def fetch(plan: HostPlan) -> None:
    """uv, an environment, a model."""
    assert plan.base and plan.engine
    planned = plan.engine.release
    small = replace(planned, lock="locks/small.txt", identity="small", path="/opt/llmhost/releases/small", alias="")
    lock = small_lock((ROOT / planned.lock).read_text())
    locks = [HostFile(f"{LOCKS}/uv.txt", (ROOT / "locks/uv.txt").read_text()), HostFile(f"{LOCKS}/small.txt", lock)]
    tree(name="locks", entries=locks)
    uv(name="uv", version=uv_version(), lock=f"{LOCKS}/uv.txt", base=plan.base)
    release(name="small environment", release=small, base=plan.base)
    fetched(name="model", model=plan.engine.model, base=plan.base, python=f"{small.path}/venv/bin/python")


plan = preflight()
base_system(plan)
fetch(plan)
