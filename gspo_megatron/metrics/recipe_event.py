"""An event stands in a run's record where the run went on with other values of its recipe.

Left out: why somebody changed them.
"""

from dataclasses import dataclass
from typing import Any

CHANGE = "change"


@dataclass(frozen=True)
class Event:
    """Says that a run went on with other values of its recipe behind a step."""

    phase: str  # one of tracker.PHASES
    step: int  # the last one with the old values
    changes: dict[str, tuple[Any, Any]]  # by field, dotted: the old value and the new one
    prompts: int = 0  # drawn with the old values

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Event":
        """Read one of the record, whose phase and step have been looked at. Raises ValueError for anything else."""
        changes, prompts = row.get("changes"), row.get("prompts")
        is_known = row.keys() == {"phase", "step", "event", "prompts", "changes"} and row["event"] == CHANGE
        is_counted = type(prompts) is int and prompts >= 0
        are_changes = isinstance(changes, dict) and all(_is_change(one) for one in changes.values())
        if not (is_known and is_counted and are_changes):
            raise ValueError(
                "not an event, which has changes with an old and a new value each, and a number of prompts"
            )
        values = {name: (one["old"], one["new"]) for name, one in row["changes"].items()}
        return cls(row["phase"], row["step"], values, row["prompts"])

    def row(self) -> dict[str, Any]:
        """Return it as it stands in the record."""
        changes = {name: {"old": old, "new": new} for name, (old, new) in self.changes.items()}
        return {"phase": self.phase, "step": self.step, "event": CHANGE, "prompts": self.prompts, "changes": changes}

    def told(self) -> dict[str, str]:
        """Return "old -> new" in short, by field."""
        return {name: f"{_short(old)} -> {_short(new)}" for name, (old, new) in self.changes.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {change}" for name, change in self.told().items())


def _is_change(one: object) -> bool:
    return isinstance(one, dict) and one.keys() == {"old", "new"}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value!s:.40}"
