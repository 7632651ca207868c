"""What decides how the engine runs on an accelerator, as far as it differs from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

from llmhost.plan.model import Scalar


@dataclass(frozen=True)
class Fit:
    """The engine fitted to what it computes on: flags and environment beyond every engine's, and its memory."""

    flags: dict[str, Scalar]
    environment: dict[str, str]
    kv_cache_tokens: int | None  # None where it is not known before the engine has started
    kv_cache_bytes: int | None
    memory_bytes: int | None  # resident size predicted for the whole engine
    start_timeout_seconds: int
