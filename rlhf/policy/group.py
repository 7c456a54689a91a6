"""All ranks as one object: the driver talks to the policy here, in assignments and plain numbers, never in tensors."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

from rlhf.algorithms import Algorithm
from rlhf.cluster import Runtime
from rlhf.config import Settings
from rlhf.policy.learner import InvariantBroken, StepContext
from rlhf.policy.meters import Meters, means, merge
from rlhf.policy.probe import require_small
from rlhf.policy.rank import PolicyBatch, PolicyRank
from rlhf.policy.throughput import Learners, Throughput, learners
from rlhf.training.balance import plan_updates
from rlhf.training.rank_group import RankGroup, start_ranks
from rlhf.transfer import TransferSession
from rlhf.types import Assignment, Counts, RankBatch, Rollout, Shipment, WeightSpec

Answer = TypeVar("Answer")


class PolicyGroup:
    """Made by `start`. All calls are collective over the ranks and wait at most the deadlines in `cluster`."""

    def __init__(self, settings: Settings, ranks: RankGroup[PolicyRank], learners: Learners):
        self._settings, self._ranks = settings, ranks
        self._throughput = Throughput(learners)
        self.specs: tuple[WeightSpec, ...] = ()

    @classmethod
    async def start(cls, runtime: Runtime, settings: Settings, algorithm: Algorithm, total_updates: int) -> PolicyGroup:
        """Start all ranks and wait until they have loaded their models.

        Args:
            total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        """
        start = start_ranks(runtime, PolicyRank, settings.policy.ranks, settings.cluster)
        ranks = await start(settings, algorithm, total_updates)
        device = await ranks.first.ask(PolicyRank.device_name, deadline=settings.cluster.startup_s)()
        group = cls(settings, ranks, learners(settings, algorithm, device))
        group.specs = await ranks.first.ask(PolicyRank.weight_specs, deadline=settings.cluster.startup_s)()
        return group

    async def learn(self, assignments: Sequence[Assignment], step: StepContext) -> dict[str, float]:
        """Learn from these assignments in `loop.updates_per_step` optimizer steps; returns mean metrics.

        Raises:
            InvariantBroken: the engines' and the trainer's log-probs differ by more than `run.max_logprob_gap`.
        """
        batches = self._plan(assignments, self._settings.loop.updates_per_step)
        learn = self._ranks.share(PolicyRank.learn, batches, deadline=self._settings.cluster.learn_deadline_s)
        return self._checked(await self._timed(learn(step), assignments))

    async def begin(self, step: StepContext) -> None:
        """Start a loop step whose assignments come in pieces, while others are still sampled and judged."""
        await self._ranks.ask(PolicyRank.begin, deadline=self._settings.cluster.learn_deadline_s)(step)

    async def accumulate(self, assignments: Sequence[Assignment], update: int = 0) -> None:
        """Take in a piece; the ranks learn from it what their method can learn from it alone. Pieces may come in any order.

        Args:
            update: which of the loop step's optimizer steps it belongs to, from 0 and below `loop.updates_per_step`.
        """
        batches = self._plan(assignments, 1, update)
        accumulate = self._ranks.share(PolicyRank.accumulate, batches, deadline=self._settings.cluster.learn_deadline_s)
        await self._timed(accumulate(), assignments)

    async def finish(self) -> dict[str, float]:
        """Make the optimizer steps, whose pieces are all there; returns mean metrics. Raises as `learn`."""
        finish = self._ranks.ask(PolicyRank.finish, deadline=self._settings.cluster.learn_deadline_s)
        return self._checked(await self._timed(finish()))

    async def _timed(self, work: Awaitable[Answer], assignments: Sequence[Assignment] = ()) -> Answer:
        """What the ranks answer; that they learned from these assignments, and how long it took, is noted."""
        start = time.perf_counter()
        answer = await work
        self._throughput.learned(assignments, time.perf_counter() - start)
        return answer

    def _plan(self, assignments: Sequence[Assignment], updates: int, first: int = 0) -> list[list[PolicyBatch]]:
        """What each rank learns from in each of these optimizer steps, which are numbered from `first` on."""
        costs = [assignment.n_tokens() for assignment in assignments]
        batches: list[list[PolicyBatch]] = [[] for _ in self._ranks.handles]
        plan = plan_updates(costs, updates, len(self._ranks), self._settings.policy.micro_batch_tokens)
        for number, update in enumerate(plan, first):
            counts = Counts.of(assignments[i] for share in update for batch in share for i in batch)
            for mine, share in zip(batches, update, strict=True):
                micro_batches = tuple(tuple(assignments[i] for i in batch) for batch in share)
                mine.append(RankBatch(micro_batches, counts, number))
        return batches

    def _checked(self, parts: Sequence[Meters]) -> dict[str, float]:
        """What the ranks report of a whole loop step."""
        metrics = means(merge(parts))
        self._check_gap(metrics)
        return metrics | self._throughput.finish()

    def _check_gap(self, metrics: dict[str, float]) -> None:
        """Between engines and trainer, on what was learned from. Where sampling was truncated or greedy the log-probs are those of another
        distribution, and the number would mean nothing: there the engines are probed (`check_engines`)."""
        run, rollout = self._settings.run, self._settings.rollout
        gap = metrics.get("policy/logprob_gap", 0.0)
        if not (rollout.top_p == 1 and rollout.top_k == 0 and rollout.temperature > 0):
            metrics.pop("policy/logprob_gap", None)
        elif run.invariants and not gap <= run.max_logprob_gap:  # true of NaN
            raise InvariantBroken(
                f"the engines' log-probs differ from the trainer's by {gap:.3g} nats per token on average (allowed by "
                f"run.max_logprob_gap: {run.max_logprob_gap:g}). They attest the policy's weights, so either vLLM does not put new weights "
                "to use for a model of this kind, or the two compute in different precision: compare policy.dtype with rollout.dtype."
            )

    async def check_engines(self, probes: Mapping[int, Rollout]) -> dict[str, float]:
        """Compare what the engines computed on a probe with what the policy and its partner compute, before they change.

        Args:
            probes: engine -> its answer (`RolloutPool.probe`), all to one prompt; nothing happens if there is none.

        Returns:
            The largest gap of each slot that answered: policy/probe_gap, policy/probe_gap_partner.

        Raises:
            InvariantBroken: an engine's log-probs differ by more than `run.max_logprob_gap`.
        """
        if not probes:
            return {}
        deadline = self._settings.cluster.learn_deadline_s
        gaps, *_ = await self._ranks.ask(PolicyRank.probe_gaps, deadline=deadline)(list(probes.values()))
        return require_small(gaps, list(probes), self._settings.run.max_logprob_gap)

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """Mean KL metrics of the policy to the model the run started from, on these completions; nothing is learned."""
        settings = self._settings
        costs = [assignment.n_tokens() for assignment in assignments]
        (shares,) = plan_updates(costs, 1, len(self._ranks), settings.policy.micro_batch_tokens)
        batches = [[tuple(assignments[i] for i in batch) for batch in share] for share in shares]
        measure = self._ranks.share(PolicyRank.measure, batches, deadline=settings.cluster.learn_deadline_s)
        return means(merge(await measure()))

    async def open_transfer(self, session: TransferSession) -> None:
        """Join the engines' transfer group; to be awaited together with the pool's `connect`."""
        await self._ranks.ask(PolicyRank.open_transfer, deadline=self._settings.cluster.startup_s)(session)

    async def transfer_address(self) -> tuple[str, int]:
        """Host of the sender and a free port there."""
        return await self._ranks.first.ask(PolicyRank.address, deadline=self._settings.cluster.startup_s)()

    async def send_weights(self, shipment: Shipment) -> str:
        """Send the weights of the shipment's slot to the engines, which must be receiving it; returns their fingerprint."""
        send = self._ranks.ask(PolicyRank.send_weights, deadline=self._settings.cluster.publish_deadline_s)
        fingerprint, *_ = await send(shipment)
        assert fingerprint is not None, "rank 0 always sends"
        return fingerprint

    async def follow(self, step: int) -> dict[str, bool]:
        """Let reference and partner follow the policy after loop step `step`: name -> whether it changed.

        Raises:
            InvariantBroken: one of them had changed by itself.
        """
        changed, *_ = await self._ranks.ask(PolicyRank.follow, deadline=self._settings.cluster.learn_deadline_s)(step)
        return changed

    async def offload(self) -> None:
        """Leave only the policy's weights on the devices, for engines that share them."""
        await self._ranks.ask(PolicyRank.offload, deadline=self._settings.cluster.learn_deadline_s)()

    async def reload(self) -> None:
        """Undo `offload`; before everything but `send_weights`."""
        await self._ranks.ask(PolicyRank.reload, deadline=self._settings.cluster.learn_deadline_s)()

    async def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write a DeepSpeed checkpoint to `folder/tag` (a folder that all ranks share). Returns the files' checksums, for
        `Checkpoints.complete`."""
        return await self._ranks.save(folder, tag)

    async def load(self, folder: str, tag: str) -> None:
        """Restore a checkpoint that `save` wrote."""
        await self._ranks.load(folder, tag)

    async def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format to `folder`."""
        await self._ranks.export(folder)

    async def check_anchors(self) -> None:
        """Raises InvariantBroken if the weights of reference or partner are not those that their rule gave them."""
        await self._ranks.ask(PolicyRank.check_anchors, deadline=self._settings.cluster.learn_deadline_s)()

    async def close(self) -> None:
        """Let the ranks leave their group."""
        await self._ranks.close()
