"""Dynamic batching: single requests in, batches out, results back to whoever asked.

`full` and `choose` decide, and know no clock and no task; `Batcher` waits and hands out. Knows nothing of rewards. Lives on one
event loop; the work itself may run in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 1024, 16384
"""Most tokens of a batch, where the configuration says nothing."""
WINDOW = 4
"""Among how many batches' worth of the oldest items those of like lengths are sought. More would hardly save padding, and
overtaking takes longer to end."""


@dataclass(frozen=True)
class Limits:
    """What a batch may hold.

    Attributes:
        items: most items.
        tokens: most tokens; with `padding`, the longest item's length times the number of items, else the lengths' sum.
        wait_s: how long an item waits for others, in seconds.
        padding: whether a batch costs as much as if all were as long as its longest item.
    """

    items: int
    tokens: int
    wait_s: float
    padding: bool


def full(lengths: Sequence[int], limits: Limits) -> bool:
    """Whether waiting items of these lengths make a whole batch, so that waiting longer would not fill it better."""
    tokens = max(lengths, default=0) * len(lengths) if limits.padding else sum(lengths)
    return len(lengths) >= limits.items or tokens >= limits.tokens


def choose(lengths: Sequence[int], limits: Limits) -> list[int]:
    """Which of the waiting items make the next batch.

    The oldest is always in it, so that none waits without end. Without padding those next in age follow; with it, of the oldest ones, those
    nearest to its length.

    Args:
        lengths: in tokens, the oldest item first; not empty.

    Returns:
        Indices in ascending order. An item longer than `limits.tokens` goes alone.
    """
    if not limits.padding:
        totals = itertools.accumulate(lengths[: limits.items])
        return list(range(max(1, sum(total <= limits.tokens for total in totals))))
    lengths = lengths[: WINDOW * limits.items]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    low = order.index(0)
    high = low + 1  # the batch is order[low:high]
    while high - low < limits.items:
        size = high - low + 1
        longer = lengths[order[high]] if high < len(order) else None
        if longer is not None and longer * size > limits.tokens:
            longer = None
        shorter = lengths[order[low - 1]] if low > 0 and lengths[order[high - 1]] * size <= limits.tokens else None
        if longer is None and shorter is None:
            break
        if shorter is None or (longer is not None and longer - lengths[0] <= lengths[0] - shorter):
            high += 1
        else:
            low -= 1
    return sorted(order[low:high])


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    length: int
    since: float
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Collects items until a batch is full or the oldest has waited long enough. One batch is worked on at a time."""

    def __init__(self, work: Callable[[list[Item]], Awaitable[Sequence[Result]]], limits: Limits) -> None:
        """
        Args:
            work: results of the items of one batch, in order.
        """
        self._work = work
        self._limits = limits
        self._waiting: list[_Waiting[Item, Result]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item], lengths: Sequence[int] | None = None) -> list[Result]:
        """Results of `items`, in order. Raises what `work` raised for a batch that one of them was in.

        Args:
            lengths: of the items, in tokens; None: length does not matter.
        """
        loop = asyncio.get_running_loop()
        lengths = [0] * len(items) if lengths is None else lengths
        arrived = [
            _Waiting(item, length, loop.time(), loop.create_future())
            for item, length in zip(items, lengths, strict=True)
        ]
        self._waiting += arrived
        if self._runner is None or self._runner.done():
            self._more = asyncio.Event()
            self._runner = loop.create_task(self._run())
        self._more.set()
        return await asyncio.gather(*(one.future for one in arrived))

    async def _run(self) -> None:
        while self._waiting:
            await self._fill()
            # Those whose caller gave up (a deadline) need no work any more.
            self._waiting = [one for one in self._waiting if not one.future.done()]
            if self._waiting:
                chosen = set(choose([one.length for one in self._waiting], self._limits))
                batch = [one for index, one in enumerate(self._waiting) if index in chosen]
                self._waiting = [one for index, one in enumerate(self._waiting) if index not in chosen]
                await self._work_on(batch)

    async def _fill(self) -> None:
        """Wait until a batch is full, or until the oldest item has waited long enough (it may have, during the last batch)."""
        clock = asyncio.get_running_loop().time
        until = self._waiting[0].since + self._limits.wait_s
        while not full([one.length for one in self._waiting], self._limits) and clock() < until:
            self._more.clear()
            try:
                await asyncio.wait_for(self._more.wait(), until - clock())
            except TimeoutError:
                return

    async def _work_on(self, batch: list[_Waiting[Item, Result]]) -> None:
        try:
            results = await self._work([one.item for one in batch])
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: every caller of the batch gets it
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
            return
        for one, result in zip(batch, results, strict=True):
            if not one.future.done():
                one.future.set_result(result)
