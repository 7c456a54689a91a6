"""How far a command is, on standard error: its results go to standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

ANNOUNCEMENTS = 5
"""How often a count says how far it is."""


@dataclass(frozen=True)
class Progress:
    """Lines with the seconds since the beginning.

    Attributes:
        part: what the lines speak of, before each.
    """

    part: str = ""
    began: float = field(default_factory=time.monotonic)

    def of(self, part: str) -> Progress:
        """The same clock, for a part of the work."""
        return replace(self, part=f"{part}: ")

    def say(self, text: str) -> None:
        """One line."""
        sys.stderr.write(f"{time.monotonic() - self.began:5.0f} s  {self.part}{text}\n")
        sys.stderr.flush()

    def counted(self, total: int, done: str) -> Callable[[], None]:
        """To be called after each of `total` pieces of work; now and then it says how many are `done`."""
        count, every = 0, max(1, -(-total // ANNOUNCEMENTS))

        def one_more() -> None:
            nonlocal count
            count += 1
            if count % every == 0 or count == total:
                self.say(f"{count:,} of {total:,} {done}")

        return one_more
