"""Prompts on their way: each is sampled, then judged, while others are sampled and the policy learns.

Owns the tasks of the prompts that are out, and what they bring back. How many may be out is decided in `admission`, what a step takes in
`buffer`; which responses are asked for, the caller says. Knows nothing of learning.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.algorithms import Algorithm
from rlhf.data.ledger import Ledger
from rlhf.engines.sampling import Sampling
from rlhf.loop.admission import Admission, Place
from rlhf.loop.buffer import Buffer
from rlhf.loop.clock import Timings
from rlhf.loop.judged import JudgedRollout
from rlhf.loop.roles import Roles
from rlhf.tracking.spans import Timing
from rlhf.types import Feedback, Invalid, Prompt, Rollout


@dataclass(frozen=True)
class Arrival:
    """A prompt that has come back.

    Attributes:
        place: its place.
        answered: when its last response was there, by `time.perf_counter`.
    """

    place: int
    judged: JudgedRollout
    answered: float


class Producer:
    """Starts prompts, and gives the steps what became of them."""

    def __init__(
        self,
        roles: Roles,
        algorithm: Algorithm,
        ledger: Ledger,
        admission: Admission,
        timings: Timings,
        samplings: Callable[[int], Sequence[Sampling]],
        tasks: asyncio.TaskGroup,
    ):
        """
        Args:
            samplings: what is asked for a prompt that is started for this step.
            tasks: where the prompts' tasks live; when one of them fails, the group ends with its error.
        """
        self._roles, self._algorithm, self._ledger, self._timings = roles, algorithm, ledger, timings
        self._admission, self._samplings, self._tasks = admission, samplings, tasks
        self._buffer: Buffer[Arrival] = Buffer(admission.started)
        self._prompts: dict[int, Prompt] = {}  # of places that have not been taken
        self._sampling: dict[int, tuple[str, float]] = {}  # place -> prompt that is being sampled, and since when
        self._arrived = asyncio.Event()

    def open(self, count: int) -> None:
        """A step takes so many prompts; those that may start are started."""
        self._buffer.open(count)
        self._start()

    def replace(self, count: int) -> None:
        """The step takes further prompts, in place of some that teach nothing."""
        self._admission.replace(count)
        self.open(count)

    def finish_step(self) -> None:
        """The step's weights are published, and its prompts are settled: others may start. In the synchronous loop they do when their
        step begins, for the engines may be needed otherwise until then."""
        self._admission.finish_step()
        if self._admission.runs_ahead:
            self._start()

    @property
    def first(self) -> Prompt:
        """The first prompt of the step."""
        return self._prompts[self._buffer.first]

    @property
    def pending(self) -> int:
        """Prompts that the step has asked for and not taken."""
        return self._buffer.pending

    @property
    def available(self) -> int:
        """Prompts that the step could have beside those it has asked for."""
        return self._ledger.available + max(0, self._admission.started - self._buffer.beyond)

    @property
    def writing(self) -> list[tuple[int, float]]:
        """What engines write now: place of the engine, and since when, in seconds since 1970."""
        engines = self._roles.rollouts.writing
        return [(engines[prompt], since) for prompt, since in self._sampling.values() if prompt in engines]

    @property
    def ahead(self) -> dict[str, float]:
        """How far sampling is ahead of the steps."""
        out = self._admission.started - self._buffer.beyond
        return {"loop/ahead": float(max(0, out)), "loop/ready": float(self._buffer.waiting)}

    async def take_all(self) -> list[Arrival]:
        """All prompts that the step has asked for, in the order of their start."""
        return await self._take(self._buffer.take_all)

    async def take_next(self) -> list[Arrival]:
        """The one that came back first."""
        return await self._take(self._buffer.take_next)

    async def _take(self, take: Callable[[], list[Arrival]]) -> list[Arrival]:
        while not (taken := take()):
            self._arrived.clear()
            await self._arrived.wait()
        for arrival in taken:
            del self._prompts[arrival.place]
        return taken

    def _start(self) -> None:
        while self._admission.may_start and self._ledger.available:
            place = self._admission.start()
            (prompt,) = self._ledger.lease(1)
            self._prompts[place.number] = prompt
            self._tasks.create_task(self._run(place, prompt))

    async def _run(self, place: Place, prompt: Prompt) -> None:
        """One prompt: sampled, then judged."""
        started = time.time()
        self._sampling[place.number] = prompt.id, started
        rollout = await self._roles.rollouts.sample(
            prompt, self._samplings(place.step), with_pair=self._algorithm.dataset_pairs
        )
        answered, clock = time.time(), time.perf_counter()
        del self._sampling[place.number]
        judge = self._roles.rewards.judge if self._algorithm.judged else not_judged
        feedback = await judge(rollout)
        self._note(place, rollout, started, answered)
        self._buffer.put(place.number, Arrival(place.number, JudgedRollout(rollout, feedback, place.number), clock))
        self._arrived.set()

    def _note(self, place: Place, rollout: Rollout, started: float, answered: float) -> None:
        prompt, infos = rollout.prompt, rollout.infos
        facts = {"prompt": prompt.id, "place": place.number}
        written = {
            "prompt_tokens": len(prompt.token_ids),
            "tokens": [info.n_tokens for info in infos if info.versions],
            "versions": sorted({version for info in infos for version in info.versions}),
        }
        if self._algorithm.sources:
            engine = f"engine-{rollout.engine}"
            self._timings.timing(Timing(engine, "sample", started, answered, place.step, facts | written))
        if self._algorithm.judged:
            self._timings.timing(Timing("reward", "judge", answered, time.time(), place.step, facts))


async def not_judged(rollout: Rollout) -> Feedback:
    """What a method that asks no judge learns from."""
    return Feedback(rollout.prompt.id, (Invalid("not judged"),) * len(rollout.infos))
