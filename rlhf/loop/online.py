"""The online loop: lease prompts, sample, judge, build items, learn, publish, record.

The driver runs this. It holds facts, rewards and references, never a tensor. The loop is synchronous: every response of a
step was written by the weights that the step starts from. How many prompts a step asks for is decided in `batch`, whether the run
learns anything in `progress`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rlhf.algorithms import Algorithm
from rlhf.algorithms.anchors import equals_policy
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.building import build, teaches
from rlhf.cluster import together
from rlhf.config import Settings
from rlhf.data.ledger import Ledger
from rlhf.engines.sampling import Sampling
from rlhf.loop.batch import Batch, Refill
from rlhf.loop.clock import Clock
from rlhf.loop.judged import JudgedRollout, rollout_metrics
from rlhf.loop.probe import probe_samplings
from rlhf.loop.progress import Progress, require_builder, require_rewards
from rlhf.loop.roles import Roles
from rlhf.policy import StepContext
from rlhf.reward.shaping import Shaping
from rlhf.tracking.record import Record
from rlhf.types import Assignment, Feedback, Invalid, ModelSlot, Prompt, Rollout, Shipment


class OnlineLoop:
    """The steps of a run. Owns the order of things; every part does its own work."""

    def __init__(
        self,
        settings: Settings,
        algorithm: Algorithm,
        roles: Roles,
        ledger: Ledger,
        record: Record,
        shaping: Shaping,
        full_length: bool = False,
    ):
        """
        Args:
            shaping: from the judged rewards to those that are learned from.
            full_length: responses go on after the end-of-sequence token: the most that a step can ask of the machines.
        """
        self.settings, self.algorithm, self.roles, self.ledger, self.record = settings, algorithm, roles, ledger, record
        self.shaping = shaping
        self.progress = Progress(settings.loop.max_empty_steps)
        self._full_length = full_length
        self._version = 0

    async def step(self, step: int) -> list[JudgedRollout]:
        """Step number `step` (1-based). After it, all engines hold weight version `step`.

        Raises:
            RewardsFailing: more than `reward.max_failed_fraction` of the responses got no verdict, or none has a reward.
            BuilderFailing: the algorithm's builder failed for more than this part of the prompts.
            CanaryAlarm: the judge has changed since the start.
            InvariantBroken: an engine does not compute what the policy computes (and see `PolicyGroup.learn`).
        """
        clock = Clock()
        prompts = self.ledger.lease(self.settings.loop.prompts_per_step)
        (batch, refill), probes = await together(self._collect(step, prompts, clock), self._probe(prompts[0], step))
        metrics = rollout_metrics(batch.judged) | self.shaping.metrics([one.feedback for one in batch.learned])
        metrics |= await self.roles.rewards.check(step)
        async with self.policy_turn(publish=False):
            metrics |= await self.roles.policy.check_engines(probes)
            if batch.assignments:
                context = StepContext(step, equal=equals_policy(self.algorithm.reference, step))
                metrics |= await self.roles.policy.learn(batch.assignments, context)
            changed = await self.roles.policy.follow(step)
        clock.lap("time/train")
        await self.publish(version=step)
        if self.algorithm.mixes and (changed["partner"] or "partner" in self.roles.rollouts.missing):
            await self.publish(version=step, slot="partner")
        clock.lap("time/sync")
        self._settle(batch)
        metrics |= clock.laps() | batch.metrics() | refill.metrics() | {"loop/epoch": self.ledger.epoch}
        metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step"]
        self.record.step(step, metrics, self.progress.after(batch, refill.size if refill.extra else 0))
        return batch.judged

    async def _collect(self, step: int, prompts: Sequence[Prompt], clock: Clock) -> tuple[Batch, Refill]:
        """Sample and judge prompts, and further ones until enough teach something or no more may be asked for (`loop.refill`)."""
        batch, samplings = Batch(), self._samplings(step)
        refill = Refill(len(prompts), self.settings.loop.refill * len(prompts))
        while prompts:
            judged = await self.sample_and_judge(prompts, samplings, clock, self.algorithm)
            batch.judged += judged
            if self.algorithm.judged:
                require_rewards(step, batch.judged, self.settings.reward)
            learned = self._shape(judged)
            batch.learned += learned
            self._build(step, learned, batch)
            require_builder(step, batch, self.algorithm.name, self.settings.reward.max_failed_fraction)
            prompts = self.ledger.lease(refill.next(batch.taught, self.ledger.available))
        return batch, refill

    async def sample_and_judge(
        self, prompts: Sequence[Prompt], samplings: Sequence[Sampling], clock: Clock, algorithm: Algorithm | None = None
    ) -> list[JudgedRollout]:
        """Responses and verdicts for all prompts; a prompt is judged as soon as it is answered, while others still sample.

        Args:
            algorithm: whose wishes about the data set's pairs and about judging count; None: no pairs, everything judged.
        """
        pairs = algorithm is not None and algorithm.dataset_pairs
        judged = algorithm is None or algorithm.judged

        judging: list[asyncio.Task[Feedback]] = []

        async def answer(prompt: Prompt) -> tuple[Rollout, asyncio.Task[Feedback]]:
            rollout = await self.roles.rollouts.sample(prompt, samplings, with_pair=pairs)
            verdict = self.roles.rewards.judge(rollout) if judged else _unjudged(rollout)
            judging.append(asyncio.create_task(verdict))
            return rollout, judging[-1]

        try:
            answered = await asyncio.gather(*(answer(prompt) for prompt in prompts))
            clock.lap("time/generate")
            feedbacks = await asyncio.gather(*(verdict for _, verdict in answered))
            clock.lap("time/reward")
        finally:
            for verdict in judging:  # after an error nobody asks for them
                verdict.cancel()
        return [JudgedRollout(rollout, feedback) for (rollout, _), feedback in zip(answered, feedbacks, strict=True)]

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """KL of the policy to the model the run started from, on given responses."""
        async with self.policy_turn():
            return await self.roles.policy.measure(assignments)

    async def publish(self, version: int, slot: ModelSlot = "policy") -> None:
        """Bring the weights of the policy, or of the engines' second model, into all engines, as `version`, attested by each."""
        policy, rollouts = self.roles.policy, self.roles.rollouts
        shipment = Shipment(version, slot, policy.specs)
        fingerprint, _ = await together(policy.send_weights(shipment), rollouts.receive(shipment))
        rollouts.accept(shipment, fingerprint)
        self._version = version

    @asynccontextmanager
    async def policy_turn(self, publish: bool = True) -> AsyncIterator[None]:
        """Inside, the policy has the devices that it shares with engines to itself.

        Args:
            publish: give the engines back what they lost in sleep; the caller publishes something newer otherwise.
        """
        if self.roles.turns:
            await together(self.roles.rollouts.offload(), self.roles.rewards.offload())
            await self.roles.policy.reload()
        yield
        if self.roles.turns:
            await self.roles.policy.offload()
            await together(self.roles.rollouts.reload(), self.roles.rewards.reload())
        if publish:
            for slot in self.roles.rollouts.missing:
                await self.publish(self._version, slot)

    def _samplings(self, step: int) -> list[Sampling]:
        rollout = self.settings.rollout
        return [
            Sampling(
                n=source.n,
                max_tokens=rollout.max_tokens,
                temperature=0.0 if source.greedy else rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                seed=self.settings.run.seed * 1_000_003 + step,
                source=source.name,
                mixture=source.mixture,
                ignore_eos=self._full_length,
            )
            for source in self.algorithm.sources
        ]

    async def _probe(self, prompt: Prompt, step: int) -> dict[int, Rollout]:
        """What each engine writes so that one sees what it computes (`rlhf.loop.probe`)."""
        rollouts = self.roles.rollouts
        return await rollouts.probe(prompt, probe_samplings(self.settings, self.algorithm, rollouts.engines, step))

    def _shape(self, judged: Sequence[JudgedRollout]) -> list[JudgedRollout]:
        """The same responses with the rewards to learn from. Each response once: the transforms may remember it."""
        rollouts = [one.rollout for one in judged]
        shaped = self.shaping.shape(rollouts, [one.feedback for one in judged])
        return [JudgedRollout(rollout, feedback) for rollout, feedback in zip(rollouts, shaped, strict=True)]

    def _build(self, step: int, judged: Sequence[JudgedRollout], batch: Batch) -> None:
        """Put each prompt among those to learn from, or among those that are dropped. Groups without a gradient are learned from all the
        same, for a loss is a mean over them too, unless others can take their places; and these may be more than there are places."""
        for one in judged:
            prompt = one.rollout.prompt.id
            built = build(
                self.algorithm, one.rollout, one.feedback, random.Random(f"{self.settings.run.seed}/{step}/{prompt}")
            )
            idle = not isinstance(built, Dropped) and not teaches(self.algorithm.objective, built)
            if idle and self.settings.loop.refill:
                built, idle = Dropped("equal_rewards"), False
            elif batch.taught == self.settings.loop.prompts_per_step and not isinstance(built, Dropped):
                built = Dropped("surplus")
            if isinstance(built, Dropped):
                batch.dropped[prompt] = built
            else:
                batch.assignments.append(Assignment(one.rollout, built))
                batch.idle += idle

    def _settle(self, batch: Batch) -> None:
        """Each leased prompt ends once, trained or dropped."""
        for assignment in batch.assignments:
            self.ledger.settle(assignment.rollout.prompt.id, "trained")
        for prompt_id, dropped in batch.dropped.items():
            self.ledger.settle(prompt_id, dropped.reason)


async def _unjudged(rollout: Rollout) -> Feedback:
    return Feedback(rollout.prompt.id, (Invalid("not judged"),) * len(rollout.infos))
