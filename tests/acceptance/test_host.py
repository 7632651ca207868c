"""What proves a deployed host: every row of llmhost/checks.py, on every host of the inventory."""

from __future__ import annotations

import pytest

from llmhost.certificate import text
from llmhost.evidence import FAILED, SKIPPED, Result


def test_host(result: Result) -> None:
    sentence = f"expected {text(result.expected)}; seen {text(result.seen)}; remedy: {result.remedy}"
    if result.state == SKIPPED:
        pytest.skip(sentence)  # not a pass: the session ends with exit code 2
    assert result.state != FAILED, sentence
