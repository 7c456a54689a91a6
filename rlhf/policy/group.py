"""All ranks as one object: the driver talks to the policy here, in assignments and plain numbers, never in tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rlhf.algorithms.contrast import Contrast
from rlhf.cluster import Handle, Runtime, compute_env, uses_gpu
from rlhf.config import Settings
from rlhf.policy.meters import means, merge
from rlhf.policy.rank import InvariantBroken, PolicyRank, UpdateShare
from rlhf.training.balance import plan_updates
from rlhf.transfer import TransferSession, WeightSpec
from rlhf.types import Assignment


class PolicyGroup:
    """Made by `start`. All calls are collective over the ranks and wait at most the deadlines in `cluster`."""

    def __init__(self, settings: Settings, ranks: Sequence[Handle]):
        self._settings, self._ranks = settings, ranks
        self._reference_fingerprints: list[str] = []
        self.specs: list[WeightSpec] = []

    @classmethod
    async def start(cls, runtime: Runtime, settings: Settings, objective: Contrast, total_updates: int) -> PolicyGroup:
        """Start all ranks and wait until they have loaded their models.

        Args:
            total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        """
        count = settings.policy.ranks
        ranks = [
            runtime.start(
                f"policy[{rank}]",
                PolicyRank,
                settings,
                rank,
                objective,
                total_updates,
                gpus=1 if uses_gpu(settings.cluster) else 0,
                env=compute_env(settings.cluster, count),
            )
            for rank in range(count)
        ]
        group = cls(settings, ranks)
        deadline = settings.cluster.startup_deadline_s
        host, port = await ranks[0].call("address", deadline=deadline)
        await group._all("setup", host, port, deadline=deadline)
        group.specs = await ranks[0].call("weight_specs", deadline=deadline)
        group._reference_fingerprints = await group._all("reference_fingerprint", deadline=deadline)
        return group

    async def learn(self, assignments: Sequence[Assignment], first: bool) -> dict[str, float]:
        """Learn from these assignments in `loop.updates_per_step` optimizer steps; returns mean metrics.

        Args:
            first: no update was ever made, so policy and reference must agree.

        Raises:
            InvariantBroken: the engines' and the trainer's log-probs differ by more than `run.max_logprob_gap`.
        """
        settings = self._settings
        plan = plan_updates(
            [assignment.n_tokens() for assignment in assignments],
            settings.loop.updates_per_step,
            len(self._ranks),
            settings.policy.micro_batch_tokens,
        )
        shares: list[list[UpdateShare]] = [[] for _ in self._ranks]
        for update in plan:
            n_groups = sum(len(batch) for share in update for batch in share)
            for rank, share in enumerate(update):
                batches = tuple(tuple(assignments[i] for i in batch) for batch in share)
                shares[rank].append(UpdateShare(batches, n_groups))
        calls = (
            rank.call("learn", share, first, deadline=settings.cluster.learn_deadline_s)
            for rank, share in zip(self._ranks, shares, strict=True)
        )
        metrics = means(merge(await asyncio.gather(*calls)))
        self._check_gap(metrics.get("policy/logprob_gap", 0.0))
        return metrics

    def _check_gap(self, gap: float) -> None:
        run, rollout = self._settings.run, self._settings.rollout
        comparable = rollout.top_p == 1 and rollout.top_k == 0 and rollout.temperature > 0
        if run.invariants and comparable and gap > run.max_logprob_gap:
            raise InvariantBroken(
                f"the engines' log-probs differ from the trainer's by {gap:.3g} nats per token on average (allowed by "
                f"run.max_logprob_gap: {run.max_logprob_gap:g}). Either the engines hold other weights than the policy, or the two "
                "compute in different precision: compare policy.dtype with rollout.dtype."
            )

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """Mean KL metrics of the policy to the reference on these completions; nothing is learned."""
        settings = self._settings
        costs = [assignment.n_tokens() for assignment in assignments]
        (shares,) = plan_updates(costs, 1, len(self._ranks), settings.policy.micro_batch_tokens)
        calls = (
            rank.call(
                "measure",
                [tuple(assignments[i] for i in batch) for batch in share],
                deadline=settings.cluster.learn_deadline_s,
            )
            for rank, share in zip(self._ranks, shares, strict=True)
        )
        return means(merge(await asyncio.gather(*calls)))

    async def open_transfer(self, session: TransferSession) -> None:
        """Join the engines' transfer group; to be awaited together with the pool's `connect`."""
        await self._all("open_transfer", session, deadline=self._settings.cluster.startup_deadline_s)

    async def transfer_address(self) -> tuple[str, int]:
        """Host of the sender and a free port there."""
        return await self._ranks[0].call("address", deadline=self._settings.cluster.startup_deadline_s)

    async def send_weights(self) -> str:
        """Send the weights to the engines, which must be receiving; returns their fingerprint."""
        return (await self._all("send_weights", deadline=self._settings.cluster.publish_deadline_s))[0]

    async def save(self, folder: str, tag: str) -> None:
        """Write a DeepSpeed checkpoint to `folder/tag` (a folder that all ranks share)."""
        await self._all("save", folder, tag, deadline=self._settings.cluster.learn_deadline_s)

    async def load(self, folder: str, tag: str) -> None:
        """Restore a checkpoint that `save` wrote."""
        await self._all("load", folder, tag, deadline=self._settings.cluster.learn_deadline_s)

    async def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format to `folder`."""
        await self._all("export", folder, deadline=self._settings.cluster.learn_deadline_s)

    async def check_reference(self) -> None:
        """Compare the reference's weights with those at the start.

        Raises:
            InvariantBroken: they changed.
        """
        now = await self._all("reference_fingerprint", deadline=self._settings.cluster.learn_deadline_s)
        changed = [rank for rank, (a, b) in enumerate(zip(self._reference_fingerprints, now, strict=True)) if a != b]
        if changed:
            raise InvariantBroken(f"the reference's weights changed on ranks {changed}; every log-ratio since is wrong")

    async def close(self) -> None:
        """Let the ranks leave their group."""
        await self._all("close", deadline=self._settings.cluster.startup_deadline_s)

    async def _all(self, method: str, *args: Any, deadline: float) -> list[Any]:
        return await asyncio.gather(*(rank.call(method, *args, deadline=deadline) for rank in self._ranks))
