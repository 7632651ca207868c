"""Facts: each is one round trip."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

from pyinfra import state
from pyinfra.api import FactBase, QuoteString, StringCommand
from pyinfra.api.exceptions import FactProcessError

from llmhost.catalogue import ROOT
from llmhost.hardware import FactsError, Hardware, parse

_SCRIPT = Path(ROOT / "runtime/facts.sh")


class HostFacts(FactBase[str]):
    """The JSON of runtime/facts.sh."""

    def command(self) -> StringCommand:
        script = QuoteString(_SCRIPT.read_text())
        return StringCommand("sh", "-c", script, "facts.sh", str(int(time.time())))


def hardware(facts: str | None) -> Hardware:
    """Parse facts; a host that answered nothing usable raises FactsError."""
    if not facts:
        raise FactsError("the fact script printed nothing")
    return parse(facts)


class JsonFact(FactBase[Any]):
    """The JSON that a Python program prints on the host; None where there is no Python yet (a bare host, `--dry`)."""

    abstract = True
    program: ClassVar[str]

    def requires_command(self, *args: Any, **kwargs: Any) -> str:
        return "python3"

    def command(self, argument: str) -> StringCommand:
        return StringCommand("python3", "-c", QuoteString(self.program), QuoteString(argument))

    def process(self, output: list[str]) -> Any:
        try:
            return json.loads("\n".join(output))
        except ValueError as error:
            raise FactProcessError(f"expected JSON from the host: {error}") from None


def failed_look(seen: Any) -> bool:
    """Whether a look at the host failed in the middle of a run: pyinfra has said why and given the host up.

    Its operation must not go on as if the host had nothing. (Before the run, a host may lack Python: all is to do.)
    """
    return seen is None and bool(state.is_executing)


class Unreachable(JsonFact):
    """{url: why} for those of the given URLs from which the host gets no HTTP answer; any status is an answer.

    The argument is JSON: {urls, environment: of the planned proxies, trusted: PEM text of the planned CA}. The host
    may not have them yet, and a login shell's own are not asked.
    """

    program = r"""
import concurrent.futures, json, os, ssl, sys, urllib.error, urllib.request
asked = json.loads(sys.argv[1])
os.environ.update(asked["environment"])
context = ssl.create_default_context()
if asked["trusted"]: context.load_verify_locations(cadata=asked["trusted"])
def why(url):
    try: urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10, context=context)
    except urllib.error.HTTPError as error: return str(error) if error.code == 407 else None
    except Exception as error: return str(getattr(error, "reason", error))
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    answers = dict(zip(asked["urls"], pool.map(why, asked["urls"])))
print(json.dumps({url: reason for url, reason in answers.items() if reason}))
"""
