"""What a planner writes down while it decides."""

from __future__ import annotations

from typing import TypeVar

from llmhost.plan.model import Decision, Problem, Scalar
from llmhost.settings import Loaded, Settings

Value = TypeVar("Value", bound=Scalar)


class Notes:
    """Collects decisions with their reasons, and problems with the source of the setting at fault."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.decisions: list[Decision] = []
        self.problems: list[Problem] = []

    def decide(self, concern: str, setting: str, value: Value, reason: str) -> Value:
        """Write a decision down and return its value."""
        self.decisions.append(Decision(concern, setting, value, reason))
        return value

    def refuse(self, setting: str, message: str, remedy: str) -> None:
        """Write down why this host is refused. `setting` is a setting's name, or what of the host is at fault."""
        source = self._loaded.source(setting) if setting in Settings.model_fields else "the host"
        self.problems.append(Problem(setting, source, message, remedy))

    def given(self, setting: str) -> str:
        """The reason of a decision that an operator took."""
        source = self._loaded.source(setting)
        return "the default" if source == "default" else f"set in {source}"
