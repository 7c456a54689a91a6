"""Supervised training on a DeepSpeed group, from the first step to the last: what SFT and reward models share.

Owns: which units each optimizer step learns from (`Course`), how they are spread over ranks and micro-batches (`SupervisedGroup`),
and the run with its held-out losses, checkpoints and resume (`train`).
Does not know: what is learned. The data are `Examples`, on the driver; the model and its loss a `Learner`, on the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rlhf.cluster import Runtime
from rlhf.config.cluster import ClusterSettings
from rlhf.config.loader import UserError
from rlhf.config.policy import PolicySettings
from rlhf.training.balance import plan_updates
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.deepspeed import TrainingDiverged
from rlhf.training.rank_group import RankGroup, start_ranks
from rlhf.training.resume import RUN
from rlhf.training.supervised_rank import Learner, SupervisedRank

BATCHES_PER_SORT = 20
"""Among how many batches units of like length are sought: enough to leave little padding, few enough to keep the order random."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its way to a rank, and over how many tokens, texts or pairs its loss will be a sum."""

    payload: Any
    count: float


class Examples(Protocol):
    """What is learned from. A unit is what must stay together in one micro-batch."""

    def units(self, epoch: int) -> Sequence[Any]:
        """All units, always as many; which texts make one may differ from epoch to epoch."""
        ...

    def cost(self, unit: Any) -> int:
        """Its tokens."""
        ...

    def batch(self, units: Sequence[Any]) -> Batch:
        """These units as one micro-batch."""
        ...


class Course:
    """Which units each optimizer step learns from: a pure function of the seed and the step, so that a resumed run repeats it.

    Args:
        batch_size: units per optimizer step; the last one of an epoch may have fewer.
        like_lengths: a step's units are of like length, so that padding them costs little.
    """

    def __init__(self, examples: Examples, batch_size: int, epochs: int, seed: int, like_lengths: bool = False):
        self.examples, self.batch_size, self.epochs, self.seed = examples, batch_size, epochs, seed
        self._like_lengths = like_lengths
        self.updates_per_epoch = -(-len(examples.units(0)) // batch_size)
        self._epoch = -1
        self._batches: list[Any] = []

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole course."""
        return self.epochs * self.updates_per_epoch

    def units(self, step: int) -> list[Any]:
        """What optimizer step `step` (from 1) learns from."""
        epoch, place = divmod(step - 1, self.updates_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._divided(epoch)
        return self._batches[place]

    def _divided(self, epoch: int) -> list[list[Any]]:
        rng = np.random.default_rng([self.seed, epoch])
        units = self.examples.units(epoch)
        order = rng.permutation(len(units)).tolist()
        size = self.batch_size
        if self._like_lengths:
            chunks = [order[i : i + size * BATCHES_PER_SORT] for i in range(0, len(order), size * BATCHES_PER_SORT)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: self.examples.cost(units[i]))]
        batches = [[units[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        return [batches[i] for i in rng.permutation(len(batches))] if self._like_lengths else batches


class SupervisedGroup:
    """All ranks as one object. Made by `start`; all calls are collective over the ranks and wait at most `cluster`'s deadlines."""

    def __init__(self, settings: PolicySettings, cluster: ClusterSettings, ranks: RankGroup[SupervisedRank]):
        self._settings, self._cluster, self._ranks = settings, cluster, ranks

    @classmethod
    async def start(
        cls,
        runtime: Runtime,
        learner: Learner,
        settings: PolicySettings,
        cluster: ClusterSettings,
        seed: int,
        total_updates: int,
    ) -> SupervisedGroup:
        """Start all ranks and wait until they have built their modules."""
        start = start_ranks(runtime, SupervisedRank, settings.ranks, cluster)
        return cls(settings, cluster, await start(learner, settings, cluster, seed, total_updates))

    async def learn(self, step: int, examples: Examples, units: Sequence[Any]) -> dict[str, float]:
        """Make optimizer step `step` with these units; its metrics (see `train`).

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
        """
        shares, count = self._shares(examples, units)
        learn = self._ranks.share(SupervisedRank.learn, shares, deadline=self._cluster.learn_deadline_s)
        learned = await learn(max(count, 1.0), step)
        loss = {"train/loss": sum(part.loss for part in learned) / count} if count else {}
        return loss | {"train/grad_norm": learned[0].grad_norm, "train/learning_rate": learned[0].learning_rate}

    async def measure(self, examples: Examples) -> float:
        """Mean loss on examples that are not learned from."""
        shares, count = self._shares(examples, examples.units(0))
        measure = self._ranks.share(SupervisedRank.measure, shares, deadline=self._cluster.learn_deadline_s)
        return sum(await measure()) / max(count, 1.0)

    def _shares(self, examples: Examples, units: Sequence[Any]) -> tuple[list[tuple[Any | None, ...]], float]:
        """Each rank's payloads, and the count over all."""
        costs = [examples.cost(unit) for unit in units]
        (plan,) = plan_updates(costs, 1, self._settings.ranks, self._settings.micro_batch_tokens)
        shares, count = [], 0.0
        for share in plan:
            batches = [examples.batch([units[i] for i in batch]) if batch else Batch(None, 0.0) for batch in share]
            shares.append(tuple(batch.payload for batch in batches))
            count += sum(batch.count for batch in batches)
        return shares, count

    async def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write a DeepSpeed checkpoint to `folder/tag` (a folder that all ranks share). Returns the files' checksums, for
        `Checkpoints.complete`."""
        return await self._ranks.save(folder, tag)

    async def load(self, folder: str, tag: str) -> None:
        """Restore a checkpoint that `save` wrote."""
        await self._ranks.load(folder, tag)

    async def export(self, folder: str) -> None:
        """Let the learner write the result to `folder` on rank 0's machine."""
        await self._ranks.export(folder)

    async def close(self) -> None:
        """Let the ranks leave their group."""
        await self._ranks.close()


class Journal(Protocol):
    """Who writes down what happens, on disk first: a `Record`, or something simpler."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rewind(self, step: int) -> None: ...


@dataclass(frozen=True)
class Saving:
    """Checkpoints of a run.

    Attributes:
        every: optimizer steps between two; 0: none.
        resume: go on from `found`.
        identity: what a resumed run must share with the one it continues (name -> value, as JSON).
        run: what else the checkpoints keep of the run (see `rlhf.training.resume`).
        found: with `resume`, what `checkpoints.latest()` gave before anything was loaded.
    """

    checkpoints: Checkpoints
    every: int
    resume: bool
    identity: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    found: tuple[str, dict[str, Any]] | None = None


class SupervisedState:
    """Where a run stands. What a step learns from is a pure function of its number (`Course`), so there is nothing else to remember.

    Attributes:
        step: optimizer steps done.
        identity, run: as in `Saving`; a checkpoint holds them to be compared, not to be restored.
    """

    def __init__(self, identity: Mapping[str, Any], run: Mapping[str, Any]):
        self.step, self.identity, self.run = 0, identity, run

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON."""
        return {"step": self.step, "identity": dict(self.identity), RUN: dict(self.run)}

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """What of the identity is another one in the state of another run; of an earlier version it may lack some."""
        return [name for name, value in self.identity.items() if state["identity"].get(name, value) != value]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.step = state["step"]


async def train(
    group: SupervisedGroup,
    course: Course,
    journal: Journal,
    saving: Saving,
    held_out: Examples | None = None,
    eval_every: int = 0,
) -> None:
    """Take the remaining steps of the course.

    Metrics of a step: train/loss (mean over the update), train/grad_norm, train/learning_rate, train/epoch, train/tokens, time/step
    (s), throughput/tokens_per_s. Evaluations: heldout/loss, before the first step, after the last and every `eval_every`.

    Raises:
        UserError: a loss or gradient is not finite, or the checkpoint is of another run.
    """
    state = SupervisedState(saving.identity, saving.run)
    if saving.resume:
        await _go_on(group, journal, saving, state)
    if held_out is not None and state.step == 0:
        journal.evaluation(0, {"heldout/loss": await group.measure(held_out)})
    for step in range(state.step + 1, course.updates + 1):
        began, units = time.monotonic(), course.units(step)
        try:
            metrics = await group.learn(step, course.examples, units)
        except TrainingDiverged as error:
            raise UserError(
                f"step {step} of {course.updates}: the loss or its gradient is not finite, so the training ended there; checkpoints "
                "of earlier steps are unharmed. Lower the learning rate, or look at the examples."
            ) from error
        seconds, tokens = time.monotonic() - began, sum(course.examples.cost(unit) for unit in units)
        journal.step(
            step,
            metrics
            | {"train/epoch": step / course.updates_per_epoch, "train/tokens": tokens}
            | {"time/step": seconds, "throughput/tokens_per_s": tokens / seconds},
        )
        state.step = step
        last = step == course.updates
        if saving.every and (step % saving.every == 0 or last):
            await _save(group, saving, state)
        if held_out is not None and (last or (eval_every and step % eval_every == 0)):
            journal.evaluation(step, {"heldout/loss": await group.measure(held_out)})


async def _go_on(group: SupervisedGroup, journal: Journal, saving: Saving, state: SupervisedState) -> None:
    """Restore the state and load the weights of the checkpoint that was found, if there is one."""
    if saving.found is None:
        journal.rewind(-1)  # also of what was measured before the first step
        return
    tag, found = saving.found
    if differ := state.differences(found):
        raise UserError(
            f"{saving.checkpoints.folder / tag}: the checkpoint was made with another {' and '.join(differ)}, so the run cannot go on "
            "where it stopped. Restore it, or start a new run in another folder."
        )
    state.restore(found)
    journal.rewind(state.step)
    await group.load(str(saving.checkpoints.folder), tag)


async def _save(group: SupervisedGroup, saving: Saving, state: SupervisedState) -> None:
    tag = saving.checkpoints.tag(state.step)
    written = await group.save(str(saving.checkpoints.folder), tag)
    saving.checkpoints.complete(tag, state.state(), written)
