"""What has been sampled and judged, until its step takes it. Pure: owns no task; whoever waits for an arrival does so elsewhere.

A step opens the next places in the order of their start (`rlhf.loop.admission`) and takes what arrives there: all together in the order of
the places, or one by one in the order of arrival. What arrives at later places waits for its step. So what a step learns from does not
depend on who answered first, and the order in which it takes it depends on that alone.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Buffer(Generic[Item]):
    """The arrivals of a run."""

    def __init__(self, first: int = 0):
        """
        Args:
            first: the place with which the next step begins.
        """
        self._first = self._end = first
        self._open: set[int] = set()
        self._arrived: dict[int, tuple[int, Item]] = {}  # place -> number of the arrival, and what arrived
        # What has arrived at open places, as a heap: number of the arrival, place
        self._ready: list[tuple[int, int]] = []
        self._arrivals = 0

    # Facts

    def put(self, place: int, item: Item) -> None:
        """An item has arrived.

        Raises:
            ValueError: this place's has arrived before.
        """
        if place in self._arrived or (place < self._end and place not in self._open):
            raise ValueError(f"what was started at place {place} has arrived twice")
        self._arrived[place] = (self._arrivals, item)
        if place in self._open:
            heapq.heappush(self._ready, (self._arrivals, place))
        self._arrivals += 1

    def open(self, count: int) -> None:
        """The step takes so many further places; the first of a step opens them when those of the step before are taken."""
        if not self._open:
            self._first = self._end
        for place in range(self._end, self._end + count):
            self._open.add(place)
            if place in self._arrived:
                heapq.heappush(self._ready, (self._arrived[place][0], place))
        self._end += count

    # Decisions

    @property
    def pending(self) -> int:
        """Open places whose items have not been taken."""
        return len(self._open)

    @property
    def first(self) -> int:
        """The first place that was opened when none was pending."""
        return self._first

    @property
    def beyond(self) -> int:
        """The place after the last one that was opened."""
        return self._end

    @property
    def waiting(self) -> int:
        """Items that have arrived for later steps."""
        return len(self._arrived) - len(self._ready)

    def take_all(self) -> list[Item]:
        """All open places' items, in the order of the places; none unless all have arrived."""
        if len(self._ready) < len(self._open):
            return []
        taken = [self._arrived.pop(place)[1] for place in sorted(self._open)]
        self._open.clear()
        self._ready.clear()
        return taken

    def take_next(self) -> list[Item]:
        """The item that arrived first of those at open places; none if none has."""
        if not self._ready:
            return []
        _, place = heapq.heappop(self._ready)
        self._open.remove(place)
        return [self._arrived.pop(place)[1]]
