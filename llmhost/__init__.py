"""llmhost: facts in, plan out, tasks apply, acceptance proves (docs/design.md)."""

__version__ = "0.1.0"
