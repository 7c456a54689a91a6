"""How a step's time splits."""

from __future__ import annotations

import time


class Clock:
    """Laps of one step, in seconds of wall time."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def laps(self) -> dict[str, float]:
        """All laps, and `time/step`: everything since the clock was made."""
        return self._laps | {"time/step": time.perf_counter() - self._start}
