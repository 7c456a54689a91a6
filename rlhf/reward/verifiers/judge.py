"""The judge of `kind: verifier`: each response is verified by itself, by a worker process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from rlhf.cluster.devices import own_share
from rlhf.config import Settings
from rlhf.reward.verifiers.verifier import make_verifier
from rlhf.reward.verifiers.workers import WorkerPool
from rlhf.types import Prompt, TimedOut

MOST_WORKERS = 8
"""Each holds its verifier's packages in memory (SymPy: about 100 MB)."""


class VerifierJudge:
    """A raw value is a number from 0 to 1, or why there is none. Made by `start`."""

    def __init__(self, workers: WorkerPool, time_limit_s: float):
        self._workers, self._time_limit_s = workers, time_limit_s

    @classmethod
    async def start(cls, name: str, settings: Settings) -> VerifierJudge:
        """The verifier, with workers for this server's share of the cores.

        Raises:
            RewardError: it cannot work on this machine.
        """
        workers = await WorkerPool.start(name, min(own_share(os.environ, settings.reward.servers), MOST_WORKERS))
        return cls(workers, make_verifier(name).time_limit_s)

    async def judge(self, prompt: Prompt, items: Sequence[tuple[str, ...]], deadline_s: float) -> list[Any]:
        payload = dict(prompt.payload)
        return await asyncio.gather(*(self._verify(prompt.text, text, payload, deadline_s) for (text,) in items))

    async def _verify(self, prompt: str, response: str, payload: dict[str, Any], deadline_s: float) -> Any:
        limit_s = min(self._time_limit_s, deadline_s)
        try:
            return await asyncio.wait_for(self._workers.verify(prompt, response, payload, limit_s), deadline_s)
        except TimeoutError:
            return TimedOut(deadline_s)

    def fingerprint(self) -> None:
        return None

    def close(self) -> None:
        """End the workers."""
        self._workers.close()
