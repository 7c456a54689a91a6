"""One step's batch while it comes together: what has arrived is shaped and built, and prompts that teach nothing are replaced.

Two ways, by the same parts. Whole: everything that the step has asked for is waited for and built together, in the order of the prompts.
In pieces (`loop.stream`): each prompt is built as it arrives, and what fills a micro-batch on every rank is given to the policy at once.
Owns the step's `Batch`. Knows nothing of the policy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.algorithms import Algorithm
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.building import build, teaches
from rlhf.config import Settings
from rlhf.config.transforms import remembers
from rlhf.loop.batch import Batch, Refill
from rlhf.loop.clock import Clock
from rlhf.loop.judged import JudgedRollout, require_fresh
from rlhf.loop.producing import Arrival, Producer
from rlhf.loop.progress import require_builder, require_rewards
from rlhf.reward.shaping import Shaping
from rlhf.types import Assignment


def streams(settings: Settings) -> bool:
    """Whether a step is learned from in pieces (`loop.stream`). `auto`: where sampling runs ahead, unless a transform of the rewards must
    see the whole step."""
    if settings.loop.stream == "auto":
        return settings.loop.staleness > 0 and not remembers(settings.reward.transforms)
    return settings.loop.stream == "always"


@dataclass(frozen=True)
class Piece:
    """What the policy can learn from now.

    Attributes:
        update: which of the step's optimizer steps it belongs to, from 0.
        first: of its step.
    """

    assignments: tuple[Assignment, ...]
    update: int
    first: bool


class Collecting:
    """The prompts of step `step`, which learns with the weights of the version before."""

    def __init__(
        self, step: int, settings: Settings, algorithm: Algorithm, shaping: Shaping, producer: Producer, clock: Clock
    ):
        self._step, self._settings, self._algorithm = step, settings, algorithm
        self._shaping, self._producer, self._clock = shaping, producer, clock
        loop = settings.loop
        size = loop.prompts_per_step
        self.batch = Batch(Refill(size, loop.refill * size, exact=loop.staleness > 0 or streams(settings)))
        self._given = 0  # of the batch's assignments
        producer.open(size)

    async def whole(self) -> Batch:
        """The whole batch.

        Raises:
            RewardsFailing, BuilderFailing: see `OnlineLoop.step`.
            StaleWeights: a response is older than may be.
        """
        producer = self._producer
        while producer.pending:
            self._take(await producer.take_all())
            self.check()
            self._refill()
        return self.batch

    async def piece(self) -> Piece | None:
        """The next piece, once there is one; None after the last. `check` comes before anything is learned for good. Raises as `whole`,
        but for what `check` raises."""
        producer, settings, batch = self._producer, self._settings, self.batch
        budget = settings.policy.micro_batch_tokens * settings.policy.ranks
        update, built, tokens = self._update_of(self._given), self._given, 0
        while producer.pending:
            self._take(await producer.take_next())
            self._refill()
            tokens += sum(one.n_tokens() for one in batch.assignments[built:])
            built = len(batch.assignments)
            border = built > self._given and self._update_of(built) != update
            if border or tokens >= budget:
                break
        given, self._given = self._given, len(batch.assignments)
        piece = tuple(batch.assignments[given:])
        return Piece(piece, update, first=given == 0) if piece else None

    def check(self) -> None:
        """Make sure that rewards and builder work."""
        reward = self._settings.reward
        if self._algorithm.judged:
            require_rewards(self._step, self.batch.judged, reward)
        require_builder(self._step, self.batch, self._algorithm.name, reward.max_failed_fraction)

    def _refill(self) -> None:
        batch, producer = self.batch, self._producer
        producer.replace(batch.refill.next(batch.taught + producer.pending, producer.available))

    def _update_of(self, place: int) -> int:
        """Of the assignment with this number. The last update takes those that are replaced in surplus."""
        loop = self._settings.loop
        return min(place * loop.updates_per_step // loop.prompts_per_step, loop.updates_per_step - 1)

    def _take(self, arrivals: Sequence[Arrival]) -> None:
        """Shape and build what has arrived, in this order."""
        judged = [one.judged for one in arrivals]
        require_fresh([one.rollout for one in judged], self._step - 1, self._settings.loop.staleness)
        self._clock.lap("time/generate", until=max(one.answered for one in arrivals))
        self._clock.lap("time/reward")
        self.batch.judged += judged
        self._build(self._shape(judged))

    def _shape(self, judged: Sequence[JudgedRollout]) -> list[JudgedRollout]:
        """The same responses with the rewards to learn from. Each response once: the transforms may remember it."""
        rollouts = [one.rollout for one in judged]
        shaped = self._shaping.shape(rollouts, [one.feedback for one in judged])
        return [JudgedRollout(rollout, feedback) for rollout, feedback in zip(rollouts, shaped, strict=True)]

    def _build(self, shaped: Sequence[JudgedRollout]) -> None:
        """What each prompt teaches, or why it teaches nothing."""
        self.batch.shaped += shaped
        for one in shaped:
            rng = random.Random(f"{self._settings.run.seed}/{self._step}/{one.rollout.prompt.id}")
            built = build(self._algorithm, one.rollout, one.feedback, rng)
            moves = not isinstance(built, Dropped) and teaches(self._algorithm.objective, built)
            self.batch.add(one.rollout, built, teaches=moves)
