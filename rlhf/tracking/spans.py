"""Who was busy with what, from when to when. Timings overlap, so they are no laps of a step: a prompt is judged while others are sampled
and the policy learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        facts: whatever else is known, as JSON: tokens, a prompt's id, versions (docs/run_folder.md lists them).
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


def busy_s(intervals: Iterable[tuple[float, float]], start: float, stop: float) -> float:
    """Seconds between `start` and `stop` that lie in at least one of these intervals, which may overlap and reach beyond."""
    busy, done = 0.0, start
    for begin, end in sorted(intervals):
        begin, end = max(begin, done), min(end, stop)
        if end > begin:
            busy, done = busy + end - begin, end
    return busy


def idle_share(actors: Mapping[str, Iterable[tuple[float, float]]], count: int, start: float, stop: float) -> float:
    """Share of the time between `start` and `stop` in which an actor does nothing, mean over the actors: 0 to 1.

    Args:
        actors: name -> intervals in which it is busy.
        count: how many actors there are; those without a name here do nothing.
    """
    total = count * (stop - start)
    if total <= 0:
        return 0.0
    return max(0.0, 1 - sum(busy_s(intervals, start, stop) for intervals in actors.values()) / total)
