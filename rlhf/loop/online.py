"""The online loop: prompts are sampled and judged as far ahead as may be; each step learns from the next of them, publishes and records.

The driver runs this. It holds facts, rewards and references, never a tensor. With `loop.staleness` 0 sampling and learning take turns:
every response of a step was written by the weights that the step starts from. What a run has to remember is in `state`; how far sampling
may run ahead is decided in `admission`, what a step takes in `buffer`, how a batch comes together in `collecting`, who has shared
devices in `turns`, and whether the run learns anything in `progress`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from rlhf.algorithms import Algorithm
from rlhf.algorithms.anchors import equals_policy
from rlhf.cluster import together
from rlhf.cluster.tasks import task_group
from rlhf.config import Settings
from rlhf.engines.sampling import Sampling
from rlhf.loop.admission import Admission
from rlhf.loop.batch import Batch
from rlhf.loop.clock import Clock, Timings
from rlhf.loop.collecting import Collecting, streams
from rlhf.loop.judged import JudgedRollout, rollout_metrics, staleness_metrics
from rlhf.loop.probe import probe_samplings
from rlhf.loop.producing import Producer
from rlhf.loop.progress import Progress
from rlhf.loop.roles import Roles, StepRecord
from rlhf.loop.sampling import step_samplings
from rlhf.loop.state import RunState
from rlhf.loop.turns import policy_turn
from rlhf.policy import StepContext
from rlhf.tracking.spans import Timing
from rlhf.types import Assignment, ModelSlot, Prompt, Rollout, Shipment

Result = TypeVar("Result")


class OnlineLoop:
    """The steps of a run. Owns the order of things; every part does its own work."""

    def __init__(
        self,
        settings: Settings,
        algorithm: Algorithm,
        roles: Roles,
        state: RunState,
        record: StepRecord,
        *,
        full_length: bool = False,
    ):
        """
        Args:
            state: where the run stands; each step moves it on.
            full_length: responses go on after the end-of-sequence token: the most that a step can ask of the machines.
        """
        self.settings, self.algorithm, self.roles, self.state, self.record = settings, algorithm, roles, state, record
        self.progress = Progress(settings.loop.max_empty_steps)
        self.timings = Timings(record)
        self._full_length = full_length

    @asynccontextmanager
    async def producing(self) -> AsyncIterator[None]:
        """Inside, prompts are sampled and judged as far ahead as may be: the place for `step`. When it is left after an error, or
        cancelled, all that is under way ends."""
        settings = self.settings
        admission = Admission(
            settings.loop.prompts_per_step, settings.loop.staleness, settings.loop.steps, self.state.step
        )
        async with task_group() as tasks:
            self._producer = Producer(
                self.roles, self.algorithm, self.state.ledger, admission, self.timings, self._samplings, tasks
            )
            yield

    def _samplings(self, step: int) -> list[Sampling]:
        """What a prompt is asked that is started for this step."""
        settings, sources = self.settings, self.algorithm.sources
        return step_samplings(
            sources, settings.rollout, seed=settings.run.seed, step=step, full_length=self._full_length
        )

    async def step(self) -> list[JudgedRollout]:
        """The next step, inside `producing`. After it, all engines hold the weights that it made, one version on.

        Raises:
            RewardsFailing: more than `reward.max_failed_fraction` of the responses got no verdict, or none has a reward.
            BuilderFailing: the algorithm's builder failed for more than this part of the prompts.
            CanaryAlarm: the judge has changed since the start.
            InvariantBroken: an engine does not compute what the policy computes (and see `PolicyGroup.learn`).
            StaleWeights: a response is older than `loop.staleness` allows.
        """
        settings, state, producer = self.settings, self.state, self._producer
        step, clock, in_pieces = state.step + 1, Clock(), streams(settings)
        collecting = Collecting(step, settings, self.algorithm, state.shaping, producer, clock)
        batch, ahead = collecting.batch, producer.ahead
        metrics: dict[str, float] = {}
        async with task_group() as tasks:
            probing = tasks.create_task(self._probe(step, producer.first))
            if not in_pieces:
                await self._timed("loop", "wait", step, collecting.whole())
                await asyncio.wait([probing])
                metrics |= await self.roles.rewards.check(step)
            async with policy_turn(self.roles):
                if in_pieces:
                    metrics |= await self._learn_in_pieces(step, collecting, probing, clock)
                else:
                    metrics |= await self._learn(step, batch, probing)
                changed = await self.roles.policy.follow(step)
                state.next_version()
        clock.lap("time/train")

        await self._timed("policy", "publish", step, self._publish("policy"))
        if self.algorithm.mixes and (changed["partner"] or "partner" in self.roles.rollouts.missing):
            await self._timed("policy", "publish", step, self._publish("partner"))
        clock.lap("time/sync")

        for prompt_id, outcome in batch.outcomes():
            state.ledger.settle(prompt_id, outcome)
        producer.finish_step()
        described = rollout_metrics(batch.judged) | state.shaping.metrics([one.feedback for one in batch.shaped])
        if settings.loop.staleness:
            described |= staleness_metrics(batch.judged, step - 1) | ahead
        idle = self.timings.describe(clock.began, time.time(), self.roles.rollouts.engines, producer.writing)
        metrics = described | metrics | clock.laps() | idle | batch.metrics() | {"loop/epoch": state.ledger.epoch}
        metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step"]
        self.record.step(step, metrics, self.progress.after(batch))
        state.finish_step()
        return batch.judged

    async def _learn(self, step: int, batch: Batch, probing: asyncio.Task[dict[int, Rollout]]) -> dict[str, float]:
        """Let the policy learn from the whole batch."""
        checked = await self.roles.policy.check_engines(await probing)
        if not batch.assignments:
            return checked
        learning = self.roles.policy.learn(batch.assignments, self._context(step))
        tokens = n_tokens(batch.assignments)
        return checked | self._after(step, batch, await self._timed("policy", "learn", step, learning, tokens=tokens))

    async def _learn_in_pieces(
        self, step: int, collecting: Collecting, probing: asyncio.Task[dict[int, Rollout]], clock: Clock
    ) -> dict[str, float]:
        """Let the policy learn from the batch while it comes together. Before anything is learned for good, rewards, builder and engines
        are known to work."""
        policy, batch, pieces = self.roles.policy, collecting.batch, 0
        while (piece := await self._timed("loop", "wait", step, collecting.piece())) is not None:
            if piece.first:
                await policy.begin(self._context(step))
            accumulating = policy.accumulate(piece.assignments, piece.update)
            tokens, pieces = n_tokens(piece.assignments), pieces + 1
            await self._timed("policy", "learn", step, accumulating, tokens=tokens, piece=pieces)
            clock.lap("time/train")
        collecting.check()
        checked = await self.roles.rewards.check(step) | await policy.check_engines(await probing)
        if not batch.assignments:
            return checked
        tokens = n_tokens(batch.assignments)
        finishing = self._timed("policy", "learn", step, policy.finish(), tokens=tokens, pieces=pieces)
        return checked | self._after(step, batch, await finishing)

    def _context(self, step: int) -> StepContext:
        return StepContext(step, equal=equals_policy(self.algorithm.reference, step), kl_coef=self.state.kl.coef)

    def _after(self, step: int, batch: Batch, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of what was learned, with those of the KL controller, which takes note of them."""
        responses = sum(len(assignment.members()) for assignment in batch.assignments)
        return metrics | self.state.kl.after(step, metrics, responses)

    async def _timed(self, who: str, what: str, step: int, work: Awaitable[Result], **facts: int) -> Result:
        """The result of the work, which is recorded with its time."""
        start = time.time()
        result = await work
        self.timings.timing(Timing(who, what, start, time.time(), step, facts))
        return result

    async def sample_and_judge(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[JudgedRollout]:
        """Responses and verdicts for prompts that are not learned from; each is judged as soon as it is answered."""

        async def answer(prompt: Prompt) -> JudgedRollout:
            rollout = await self.roles.rollouts.sample(prompt, samplings)
            return JudgedRollout(rollout, await self.roles.rewards.judge(rollout))

        async with task_group() as tasks:
            answering = [tasks.create_task(answer(prompt)) for prompt in prompts]
        return [task.result() for task in answering]

    async def _probe(self, step: int, prompt: Prompt) -> dict[int, Rollout]:
        """What each engine writes so that one sees what it computes (`rlhf.loop.probe`)."""
        rollouts = self.roles.rollouts
        return await rollouts.probe(prompt, probe_samplings(self.settings, self.algorithm, rollouts.engines, step))

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """KL of the policy to the model the run started from, on given responses."""
        async with self.policy_turn():
            return await self.roles.policy.measure(assignments)

    @asynccontextmanager
    async def policy_turn(self) -> AsyncIterator[None]:
        """A turn of the policy between steps (`rlhf.loop.turns`), after which the engines hold its weights as before."""
        async with policy_turn(self.roles):
            yield
        for slot in self.roles.rollouts.missing:
            await self._publish(slot)

    async def publish(self) -> None:
        """Bring all weights into all engines, attested by each."""
        await self._publish("policy")
        if self.algorithm.mixes:
            await self._publish("partner")

    async def _publish(self, slot: ModelSlot) -> None:
        """Bring the weights of the policy, or of the engines' second model, into all engines, as the run's version."""
        policy, rollouts = self.roles.policy, self.roles.rollouts
        shipment = Shipment(self.state.version, slot, policy.specs)
        fingerprint, _ = await together(policy.send_weights(shipment), rollouts.receive(shipment))
        rollouts.accept(shipment, fingerprint)


def n_tokens(assignments: Sequence[Assignment]) -> int:
    """Tokens that are forwarded to learn from these."""
    return sum(assignment.n_tokens() for assignment in assignments)
