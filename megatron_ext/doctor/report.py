"""What a check found, in a form that prints as text and as JSON."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """The outcome of one check; a problem means that the check failed."""

    check: str
    """Which check: machine, equivalence, checkpoint or data."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was seen, as plain values."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, a line each."""
    notes: list[str] = field(default_factory=list)
    """What is not wrong but should be known, a line each."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity: such a figure becomes null, and a problem spells it out."""
        return _plain({"check": self.check, "ok": self.ok, "problems": self.problems, "notes": self.notes, **self.facts})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
