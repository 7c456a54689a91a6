"""The online loop: lease prompts, sample, judge, build items, learn, publish, record.

The driver runs this. It holds facts, rewards and references, never a tensor. The loop is synchronous: every response of a
step was written by the weights that the step starts from. What a run has to remember is in `state`, how many prompts a step asks for is
decided in `batch`, who has shared devices in `turns`, and whether the run learns anything in `progress`.
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
from rlhf.cluster.tasks import task_group
from rlhf.config import Settings
from rlhf.engines.sampling import Sampling
from rlhf.loop.batch import Batch, Refill
from rlhf.loop.clock import Clock
from rlhf.loop.judged import JudgedRollout, rollout_metrics
from rlhf.loop.probe import probe_samplings
from rlhf.loop.progress import Progress, require_builder, require_rewards
from rlhf.loop.roles import Roles, StepRecord
from rlhf.loop.sampling import step_samplings
from rlhf.loop.state import RunState
from rlhf.loop.turns import policy_turn
from rlhf.policy import StepContext
from rlhf.types import Assignment, Feedback, Invalid, ModelSlot, Prompt, Rollout, Shipment


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
        self._full_length = full_length

    async def step(self) -> list[JudgedRollout]:
        """The next step. After it, all engines hold the weights that it made, one version on.

        Raises:
            RewardsFailing: more than `reward.max_failed_fraction` of the responses got no verdict, or none has a reward.
            BuilderFailing: the algorithm's builder failed for more than this part of the prompts.
            CanaryAlarm: the judge has changed since the start.
            InvariantBroken: an engine does not compute what the policy computes (and see `PolicyGroup.learn`).
        """
        state, step, clock = self.state, self.state.step + 1, Clock()
        prompts = state.ledger.lease(self.settings.loop.prompts_per_step)
        async with task_group() as tasks:
            collecting = tasks.create_task(self._collect(step, prompts, clock))
            probing = tasks.create_task(self._probe(step, prompts[0]))
        batch, probes = collecting.result(), probing.result()
        metrics = rollout_metrics(batch.judged) | state.shaping.metrics([one.feedback for one in batch.shaped])
        metrics |= await self.roles.rewards.check(step)

        async with policy_turn(self.roles):
            metrics |= await self.roles.policy.check_engines(probes)
            metrics |= await self._learn(step, batch.assignments)
            changed = await self.roles.policy.follow(step)
            state.next_version()
        clock.lap("time/train")

        await self._publish("policy")
        if self.algorithm.mixes and (changed["partner"] or "partner" in self.roles.rollouts.missing):
            await self._publish("partner")
        clock.lap("time/sync")

        for prompt_id, outcome in batch.outcomes():
            state.ledger.settle(prompt_id, outcome)
        metrics |= clock.laps() | batch.metrics() | {"loop/epoch": state.ledger.epoch}
        metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step"]
        self.record.step(step, metrics, self.progress.after(batch))
        state.finish_step()
        return batch.judged

    async def _collect(self, step: int, prompts: Sequence[Prompt], clock: Clock) -> Batch:
        """Sample and judge prompts, and further ones until enough teach something or no more may be asked for (`loop.refill`)."""
        settings, ledger = self.settings, self.state.ledger
        batch = Batch(Refill(len(prompts), settings.loop.refill * len(prompts)))
        samplings = step_samplings(
            self.algorithm.sources, settings.rollout, seed=settings.run.seed, step=step, full_length=self._full_length
        )
        while prompts:
            judged = await self.sample_and_judge(prompts, samplings, clock, self.algorithm)
            batch.judged += judged
            if self.algorithm.judged:
                require_rewards(step, batch.judged, settings.reward)
            self._build(step, self._shape(judged), batch)
            require_builder(step, batch, self.algorithm.name, settings.reward.max_failed_fraction)
            prompts = ledger.lease(batch.refill.next(batch.taught, ledger.available))
        return batch

    async def sample_and_judge(
        self, prompts: Sequence[Prompt], samplings: Sequence[Sampling], clock: Clock, algorithm: Algorithm | None = None
    ) -> list[JudgedRollout]:
        """Responses and verdicts for all prompts; a prompt is judged as soon as it is answered, while others still sample.

        Args:
            algorithm: whose wishes about the data set's pairs and about judging count; None: no pairs, everything judged.
        """
        pairs = algorithm is not None and algorithm.dataset_pairs
        judge = self.roles.rewards.judge if algorithm is None or algorithm.judged else _not_judged

        async def answer(prompt: Prompt) -> tuple[Rollout, asyncio.Task[Feedback]]:
            rollout = await self.roles.rollouts.sample(prompt, samplings, with_pair=pairs)
            return rollout, tasks.create_task(judge(rollout))

        async with task_group() as tasks:
            answering = [tasks.create_task(answer(prompt)) for prompt in prompts]
            await asyncio.wait(answering)
            clock.lap("time/generate")
        clock.lap("time/reward")
        answers = [task.result() for task in answering]
        return [JudgedRollout(rollout, judging.result()) for rollout, judging in answers]

    async def _probe(self, step: int, prompt: Prompt) -> dict[int, Rollout]:
        """What each engine writes so that one sees what it computes (`rlhf.loop.probe`)."""
        rollouts = self.roles.rollouts
        return await rollouts.probe(prompt, probe_samplings(self.settings, self.algorithm, rollouts.engines, step))

    def _shape(self, judged: Sequence[JudgedRollout]) -> list[JudgedRollout]:
        """The same responses with the rewards to learn from. Each response once: the transforms may remember it."""
        rollouts = [one.rollout for one in judged]
        shaped = self.state.shaping.shape(rollouts, [one.feedback for one in judged])
        return [JudgedRollout(rollout, feedback) for rollout, feedback in zip(rollouts, shaped, strict=True)]

    def _build(self, step: int, shaped: Sequence[JudgedRollout], batch: Batch) -> None:
        """What each prompt teaches, or why it teaches nothing."""
        batch.shaped += shaped
        for one in shaped:
            rng = random.Random(f"{self.settings.run.seed}/{step}/{one.rollout.prompt.id}")
            built = build(self.algorithm, one.rollout, one.feedback, rng)
            moves = not isinstance(built, Dropped) and teaches(self.algorithm.objective, built)
            batch.add(one.rollout, built, teaches=moves)

    async def _learn(self, step: int, assignments: Sequence[Assignment]) -> dict[str, float]:
        """Let the policy learn from what there is."""
        if not assignments:
            return {}
        kl, equal = self.state.kl, equals_policy(self.algorithm.reference, step)
        metrics = await self.roles.policy.learn(assignments, StepContext(step, equal=equal, kl_coef=kl.coef))
        return metrics | kl.after(step, metrics, sum(len(assignment.members()) for assignment in assignments))

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


async def _not_judged(rollout: Rollout) -> Feedback:
    return Feedback(rollout.prompt.id, (Invalid("not judged"),) * len(rollout.infos))
