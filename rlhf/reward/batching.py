"""Dynamic batching: single requests in, batches out, results back to whoever asked.

Knows nothing of rewards. Lives on one event loop; the work itself may run in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items until a batch is full or the oldest has waited long enough. One batch is worked on at a time."""

    def __init__(
        self, work: Callable[[list[Item]], Awaitable[Sequence[Result]]], batch_size: int, max_wait_s: float
    ) -> None:
        """
        Args:
            work: results of at most `batch_size` items, in order.
            max_wait_s: how long an item waits for others, in seconds.
        """
        self._work = work
        self._batch_size = batch_size
        self._max_wait_s = max_wait_s
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of `items`, in order. Raises what `work` raised for a batch that one of them was in."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting += zip(items, futures, strict=True)
        if self._runner is None or self._runner.done():
            self._full = asyncio.Event()
            self._runner = loop.create_task(self._run())
        if len(self._waiting) >= self._batch_size:
            self._full.set()
        return await asyncio.gather(*futures)

    async def _run(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._batch_size:
                self._full.clear()
                try:
                    await asyncio.wait_for(self._full.wait(), self._max_wait_s)
                except asyncio.TimeoutError:
                    pass  # the batch goes as it is
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            # Those whose caller gave up (a deadline) need no work any more.
            batch = [(item, future) for item, future in batch if not future.done()]
            if batch:
                await self._work_on(batch)

    async def _work_on(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._work([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: every caller of the batch gets it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
