"""How a step's time splits: laps, which follow one another, and shares of idle time, from timings that overlap."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rlhf.loop.roles import StepRecord
from rlhf.tracking.spans import Timing, idle_share


class Clock:
    """Laps of one step, in seconds of wall time.

    Attributes:
        began: when the step began, in seconds since 1970.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str, until: float | None = None) -> None:
        """The time since the last lap belongs to `name`.

        Args:
            until: when it ended, by `time.perf_counter`; None: now. If that was before the last lap, nothing is added.
        """
        now = time.perf_counter() if until is None else max(self._last, until)
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def laps(self) -> dict[str, float]:
        """All laps, and `time/step`: everything since the clock was made."""
        return self._laps | {"time/step": time.perf_counter() - self._start}


class Timings:
    """The timings of a run: each goes to the record, and is kept until its step is described."""

    def __init__(self, record: StepRecord):
        self._record = record
        self._kept: list[Timing] = []

    def timing(self, timing: Timing) -> None:
        """A piece of work is done."""
        self._record.timing(timing)
        self._kept.append(timing)

    def describe(
        self, start: float, stop: float, engines: int, writing: Iterable[tuple[int, float]]
    ) -> dict[str, float]:
        """Who was idle in a step, and how long the loop waited for prompts in it. Steps are described in order.

        Args:
            start, stop: of the step, in seconds since 1970.
            engines: how many there are.
            writing: what is still being written: place of the engine, and since when. What was begun in one step and ends in another
                counts in each with its part of it.
        """
        busy: dict[str, list[tuple[float, float]]] = {}
        for timing in self._kept:
            busy.setdefault(timing.who, []).append((timing.start, timing.stop))
        waits = busy.pop("loop", [])
        busy.pop("reward", None)
        policy = {"policy": busy.pop("policy", [])}
        for place, since in writing:
            busy.setdefault(f"engine-{place}", []).append((since, stop))
        self._kept.clear()
        return {
            "idle/engines": idle_share(busy, engines, start, stop),
            "idle/policy": idle_share(policy, 1, start, stop),
            "time/wait": sum(end - begin for begin, end in waits),
        }
