"""Keeps what each step learned from in the run folder (`tracking.responses`), while the next step goes on.

Owns the thread in which responses are fetched and written, one step at a time: no more than one step's responses are in the driver's
memory. Whatever fails here is warned about, once. The files are `rlhf.tracking.responses`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rlhf.cluster import fetch
from rlhf.loop.judged import JudgedRollout
from rlhf.tracking import Record
from rlhf.tracking.responses import Taken
from rlhf.types import Completion


class Keeping:
    """One step after the other."""

    def __init__(self, record: Record, *, remote: bool):
        """
        Args:
            remote: the responses are in other processes, and can be lost with them.
        """
        self._record, self._remote = record, remote
        self._writing: asyncio.Task[None] | None = None

    async def keep(self, step: int, judged: Sequence[JudgedRollout]) -> None:
        """Begin to keep what the step took, in its order; returns when the step before has been kept."""
        await self.finish()
        self._writing = asyncio.create_task(asyncio.to_thread(self._keep, step, judged))

    async def finish(self) -> None:
        """All that was begun is on disk: what a checkpoint presumes."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _keep(self, step: int, judged: Sequence[JudgedRollout]) -> None:
        try:
            completions = fetch([one.rollout.completions for one in judged])
        except self._lost() as error:
            self._record.not_kept(str(error).partition("\n")[0])
            return
        taken = [taken_of(one, tuple(some)) for one, some in zip(judged, completions, strict=True)]
        self._record.learned_from(step, taken)

    def _lost(self) -> tuple[type[Exception], ...]:
        if not self._remote:
            return ()
        from ray.exceptions import RayError

        return (RayError,)


def taken_of(judged: JudgedRollout, completions: tuple[Completion, ...]) -> Taken:
    """What is kept of one prompt that a step took."""
    rollout = judged.rollout
    assert judged.place is not None, "a step took it"
    return Taken(judged.place, rollout.prompt.id, rollout.engine, completions, judged.feedback)
