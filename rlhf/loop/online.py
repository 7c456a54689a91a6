"""The online loop: lease prompts, sample, judge, build items, learn, publish, record.

The driver runs this. It holds facts, rewards and references, never a tensor. The loop is synchronous: every response of a
step was written by the weights that the step starts from.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rlhf.algorithms import Algorithm
from rlhf.algorithms.anchors import equals_policy
from rlhf.algorithms.builders import Dropped
from rlhf.cluster import together
from rlhf.config import Settings
from rlhf.data.ledger import Ledger
from rlhf.loop.clock import Clock
from rlhf.loop.judged import Judged, rollout_metrics
from rlhf.loop.probe import probe_samplings
from rlhf.policy import Moment, PolicyGroup
from rlhf.reward.serving.pool import RewardPool
from rlhf.reward.shaping import Shaping
from rlhf.rollout.pool import RolloutPool
from rlhf.rollout.sampling import Sampling
from rlhf.tracking.record import Record
from rlhf.types import Assignment, Failed, Feedback, Half, Invalid, Prompt, Rollout, TimedOut


class RewardsFailing(RuntimeError):
    """Too many responses of a step got no verdict."""


@dataclass(frozen=True)
class Roles:
    """Who takes part.

    Attributes:
        turns: policy and engines share devices. Then the engines sleep while the policy works, and the policy's optimizer
            states and frozen models are offloaded otherwise; reward models that share them are offloaded as the engines sleep.
    """

    policy: PolicyGroup
    rollouts: RolloutPool
    rewards: RewardPool
    turns: bool = False


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
        self._full_length = full_length
        self._version = 0

    async def step(self, step: int) -> list[Judged]:
        """Step number `step` (1-based). After it, all engines hold weight version `step`.

        Raises:
            RewardsFailing: more than `reward.max_failed_fraction` of the responses got no verdict.
            CanaryAlarm: the judge has changed since the start.
            InvariantBroken: an engine does not compute what the policy computes (and see `PolicyGroup.learn`).
        """
        clock = Clock()
        prompts = self.ledger.lease(self.settings.loop.prompts_per_step)
        judged, probes = await together(
            self.sample_and_judge(prompts, self._samplings(step), clock, self.algorithm), self._probe(prompts[0], step)
        )
        self._require_verdicts(judged)
        canaries = await self.roles.rewards.check(step)
        learned = self._shape(judged)
        assignments, dropped = self._build(step, learned)
        metrics = rollout_metrics(judged) | self.shaping.metrics([one.feedback for one in learned]) | canaries
        async with self.policy_turn(publish=False):
            metrics |= await self.roles.policy.check_engines(probes)
            if assignments:
                moment = Moment(step, equal=equals_policy(self.algorithm.reference, step))
                metrics |= await self.roles.policy.learn(assignments, moment)
            changed = await self.roles.policy.follow(step)
        clock.lap("time/train")
        await self.publish(version=step)
        if self.algorithm.mixes and (changed["partner"] or self._weights_lost()):
            await self.publish(version=step, half="partner")
        clock.lap("time/sync")
        self._settle(assignments, dropped)
        metrics |= clock.laps() | {"loop/epoch": self.ledger.epoch, "loop/prompts_trained": float(len(assignments))}
        metrics |= {f"dropped/{reason}": float(n) for reason, n in Counter(dropped.values()).items()}
        metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step"]
        self.record.step(step, metrics)
        return judged

    async def sample_and_judge(
        self, prompts: Sequence[Prompt], samplings: Sequence[Sampling], clock: Clock, algorithm: Algorithm | None = None
    ) -> list[Judged]:
        """Responses and verdicts for all prompts; a prompt is judged as soon as it is answered, while others still sample.

        Args:
            algorithm: whose wishes about the data set's pairs and about judging count; None: no pairs, everything judged.
        """
        pairs = algorithm is not None and algorithm.dataset_pairs
        judged = algorithm is None or algorithm.judged

        async def answer(prompt: Prompt) -> tuple[Rollout, Awaitable[Feedback]]:
            rollout = await self.roles.rollouts.sample(prompt, samplings, with_pair=pairs)
            verdict = self.roles.rewards.judge(rollout) if judged else _unjudged(rollout)
            return rollout, asyncio.create_task(verdict)

        answered = await asyncio.gather(*(answer(prompt) for prompt in prompts))
        clock.lap("time/generate")
        feedbacks = await asyncio.gather(*(judging for _, judging in answered))
        clock.lap("time/reward")
        return [Judged(rollout, feedback) for (rollout, _), feedback in zip(answered, feedbacks, strict=True)]

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """KL of the policy to the model the run started from, on given responses."""
        async with self.policy_turn():
            return await self.roles.policy.measure(assignments)

    async def publish(self, version: int, half: Half = "policy") -> None:
        """Bring the weights of the policy, or of the engines' second model, into all engines, as `version`, attested by each."""
        fingerprint, _ = await together(
            self.roles.policy.send_weights(half), self.roles.rollouts.receive(self.roles.policy.specs, version, half)
        )
        self.roles.rollouts.accept(version, fingerprint, half)
        self._version = version

    @asynccontextmanager
    async def policy_turn(self, publish: bool = True) -> AsyncIterator[None]:
        """Inside, the policy has the devices that it shares with engines to itself.

        Args:
            publish: give the engines back what they lost in sleep; the caller publishes something newer otherwise.
        """
        if self.roles.turns:
            await together(self.roles.rollouts.sleep(), self.roles.rewards.offload())
            await self.roles.policy.wake()
        yield
        if self.roles.turns:
            await self.roles.policy.rest()
            await together(self.roles.rollouts.wake(), self.roles.rewards.reload())
        if publish and self._weights_lost():
            await self.publish(self._version)
            if self.algorithm.mixes:
                await self.publish(self._version, half="partner")

    def _weights_lost(self) -> bool:
        return self.roles.turns and self.settings.rollout.sleep_level == 2

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

    def _shape(self, judged: Sequence[Judged]) -> list[Judged]:
        """The same responses with the rewards to learn from."""
        rollouts = [one.rollout for one in judged]
        shaped = self.shaping.shape(rollouts, [one.feedback for one in judged])
        return [Judged(rollout, feedback) for rollout, feedback in zip(rollouts, shaped, strict=True)]

    def _build(self, step: int, judged: Sequence[Judged]) -> tuple[list[Assignment], dict[str, str]]:
        """Assignments to learn from, and prompt id -> reason for the prompts that teach nothing."""
        assignments, dropped = [], {}
        for one in judged:
            rng = random.Random(f"{self.settings.run.seed}/{step}/{one.rollout.prompt.id}")
            built = self.algorithm.build(one.rollout, one.feedback, rng)
            if isinstance(built, Dropped):
                dropped[one.rollout.prompt.id] = built.reason
            else:
                assignments.append(Assignment(one.rollout, built))
        return assignments, dropped

    def _settle(self, assignments: Sequence[Assignment], dropped: dict[str, str]) -> None:
        for assignment in assignments:
            self.ledger.settle(assignment.rollout.prompt.id, "trained")
        for prompt_id, reason in dropped.items():
            self.ledger.settle(prompt_id, reason)

    def _require_verdicts(self, judged: Sequence[Judged]) -> None:
        outcomes = [outcome for one in judged for outcome in one.feedback.outcomes]
        broken = [outcome for outcome in outcomes if isinstance(outcome, Failed | TimedOut)]
        if len(broken) > self.settings.reward.max_failed_fraction * len(outcomes):
            raise RewardsFailing(
                f"{len(broken)} of {len(outcomes)} responses got no verdict; the first: {broken[0]}. Nothing was learned from this "
                "step. Mend the reward (reward.path), or allow more failures with reward.max_failed_fraction."
            )


async def _unjudged(rollout: Rollout) -> Feedback:
    return Feedback(rollout.prompt.id, (Invalid("not judged"),) * len(rollout.infos))
