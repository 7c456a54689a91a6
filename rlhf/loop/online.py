"""The online loop: lease prompts, sample, judge, build items, learn, publish, record.

The driver runs this. It holds facts, rewards and references, never a tensor. The loop is synchronous: every response of a
step was written by the weights that the step starts from.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.algorithms import Algorithm
from rlhf.algorithms.builders import Dropped, scored
from rlhf.config import Settings
from rlhf.data.ledger import Ledger
from rlhf.loop.clock import Clock
from rlhf.policy import PolicyGroup
from rlhf.reward.pool import RewardPool
from rlhf.rollout.pool import RolloutPool
from rlhf.rollout.sampling import Sampling
from rlhf.tracking.record import Record
from rlhf.types import Assignment, Failed, Feedback, Invalid, Prompt, Rollout, TimedOut


class RewardsFailing(RuntimeError):
    """Too many responses of a step got no verdict."""


@dataclass(frozen=True)
class Roles:
    """Who takes part.

    Attributes:
        turns: policy and engines share one GPU, so the engines sleep while the policy works.
    """

    policy: PolicyGroup
    rollouts: RolloutPool
    rewards: RewardPool
    turns: bool = False


@dataclass(frozen=True)
class Judged:
    """One prompt's responses and what the reward side says of them."""

    rollout: Rollout
    feedback: Feedback


class OnlineLoop:
    """The steps of a run. Owns the order of things; every part does its own work."""

    def __init__(self, settings: Settings, algorithm: Algorithm, roles: Roles, ledger: Ledger, record: Record):
        self.settings, self.algorithm, self.roles, self.ledger, self.record = settings, algorithm, roles, ledger, record

    async def step(self, step: int) -> list[Judged]:
        """Step number `step` (1-based). After it, all engines hold weight version `step`.

        Raises:
            RewardsFailing: more than `reward.max_failed_fraction` of the responses got no verdict.
        """
        clock = Clock()
        prompts = self.ledger.lease(self.settings.loop.prompts_per_step)
        judged = await self.sample_and_judge(prompts, self._sampling(step), clock)
        self._require_verdicts(judged)
        assignments, dropped = self._build(step, judged)
        metrics = rollout_metrics(judged)
        if assignments:
            await self._rest_engines()
            metrics |= await self.roles.policy.learn(assignments, first=step == 1)
        clock.lap("time/train")
        await self.publish(version=step)
        clock.lap("time/sync")
        self._settle(assignments, dropped)
        metrics |= clock.laps() | {"loop/epoch": self.ledger.epoch, "loop/prompts_trained": float(len(assignments))}
        metrics |= {f"dropped/{reason}": float(n) for reason, n in Counter(dropped.values()).items()}
        metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step"]
        self.record.step(step, metrics)
        return judged

    async def sample_and_judge(self, prompts: Sequence[Prompt], sampling: Sampling, clock: Clock) -> list[Judged]:
        """Responses and verdicts for all prompts; a prompt is judged as soon as it is answered, while others still sample."""

        async def answer(prompt: Prompt) -> tuple[Rollout, asyncio.Task[Feedback]]:
            rollout = await self.roles.rollouts.sample(prompt, sampling)
            return rollout, asyncio.create_task(self.roles.rewards.judge(rollout))

        answered = await asyncio.gather(*(answer(prompt) for prompt in prompts))
        clock.lap("time/generate")
        feedbacks = await asyncio.gather(*(judging for _, judging in answered))
        clock.lap("time/reward")
        return [Judged(rollout, feedback) for (rollout, _), feedback in zip(answered, feedbacks, strict=True)]

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """KL of the policy to the reference on given responses."""
        await self._rest_engines()
        metrics = await self.roles.policy.measure(assignments)
        await self._wake_engines()
        return metrics

    async def publish(self, version: int) -> None:
        """Bring the policy's weights into all engines, as `version`, attested by each."""
        await self._wake_engines()
        fingerprint, _ = await asyncio.gather(
            self.roles.policy.send_weights(), self.roles.rollouts.receive(self.roles.policy.specs, version)
        )
        self.roles.rollouts.accept(version, fingerprint)

    def _sampling(self, step: int) -> Sampling:
        rollout = self.settings.rollout
        return Sampling(
            n=self.algorithm.samples_per_prompt,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self.settings.run.seed * 1_000_003 + step,
        )

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

    async def _rest_engines(self) -> None:
        if self.roles.turns:
            await self.roles.rollouts.sleep()

    async def _wake_engines(self) -> None:
        if self.roles.turns:
            await self.roles.rollouts.wake()


def rollout_metrics(judged: Sequence[Judged]) -> dict[str, float]:
    """What was sampled and how it was judged: means over all responses with a score, counts of the other outcomes."""
    infos = [info for one in judged for info in one.rollout.infos]
    rewards = np.array([value for one in judged for _, value in scored(one.feedback)])
    outcomes = [outcome for one in judged for outcome in one.feedback.outcomes]
    metrics = {
        "rollout/length": float(np.mean([info.n_tokens for info in infos])),
        "rollout/truncated": float(np.mean([info.finish_reason == "length" for info in infos])),
        "rollout/logprob": float(np.mean([info.mean_logprob for info in infos])),
        "rollout/tokens": float(sum(info.n_tokens for info in infos)),
        "reward/invalid": float(sum(isinstance(outcome, Invalid) for outcome in outcomes)),
        "reward/failed": float(sum(isinstance(outcome, Failed) for outcome in outcomes)),
        "reward/timed_out": float(sum(isinstance(outcome, TimedOut) for outcome in outcomes)),
    }
    if len(rewards):
        metrics |= {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
    return metrics
