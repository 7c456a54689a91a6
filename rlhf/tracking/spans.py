"""Who was busy with what, from when to when. Timings overlap, so they are no laps of a step: a prompt is judged while others are sampled
and the policy learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timing:
    """One piece of work.

    Attributes:
        who: `engine-3`, `reward`, `policy`, or `loop` for what the loop itself waits for.
        what: `sample`, `judge`, `wait`, `learn`, `publish`, `save`, `evaluate`.
        start, stop: seconds since 1970.
        step: the loop step that it belongs to, from 1.
        facts: whatever else is known, as JSON: tokens, a prompt's id, versions.
    """

    who: str
    what: str
    start: float
    stop: float
    step: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """As a line of the record; times to the microsecond."""
        times = {"start": round(self.start, 6), "stop": round(self.stop, 6)}
        return {"step": self.step, "who": self.who, "what": self.what, **times, **self.facts}
