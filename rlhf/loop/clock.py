"""How a step's time splits."""

from __future__ import annotations

import time


class Clock:
    """Laps of one step, in seconds of wall time."""

    def __init__(self) -> None:
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
