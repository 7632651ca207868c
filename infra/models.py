"""A model's files on the host, every checksum right."""

from __future__ import annotations

from collections.abc import Generator

from pyinfra import host, logger
from pyinfra.api import QuoteString, StringCommand, operation

from infra.facts import JsonFact
from llmhost.addresses import environment
from llmhost.plan.model import BasePlan, Model


class ModelComplete(JsonFact):
    """Whether a model directory was verified and its files still have their sizes."""

    program = r"""
import json, os, sys
try:
    files = json.load(open(sys.argv[1] + "/.llmhost-manifest.json"))["files"]
    print(json.dumps(all(os.stat(os.path.join(sys.argv[1], name)).st_size == f["size"] for name, f in files.items())))
except (OSError, ValueError, KeyError): print("false")
"""


@operation()
def fetched(model: Model, base: BasePlan, python: str) -> Generator[StringCommand]:
    """The model's revision in its directory, verified against the hub's records.

    + base: the hub, and the way there
    + python: interpreter of an environment that holds the hub's client
    """
    if host.get_fact(ModelComplete, argument=model.directory):
        host.noop(f"{model.repository} at {model.revision[:12]} is complete")
        return
    size = (
        f"{model.weights_bytes / (1 << 20):,.0f} MiB of weights" if model.weights_bytes else "weights of unknown size"
    )
    logger.info(f"{host.print_prefix}fetch {size} from {base.hub}")
    program = "/usr/local/lib/llmhost/fetch-model"
    token = "set -a; . /etc/llmhost/secrets/hub.env; set +a; umask 022;"
    words = (python, program, model.repository, model.revision, model.directory)
    command = StringCommand(*map(QuoteString, words))
    yield StringCommand(
        "sh",
        "-c",
        QuoteString(StringCommand(token, "exec", command)),
        _env={"HF_ENDPOINT": base.hub, **environment(base)},
    )
