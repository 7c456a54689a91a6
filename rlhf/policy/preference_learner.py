"""Learning from contrasts: the loss of algorithms/contrast.py on one rank's micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf.algorithms.contrast import Preference, preference_loss
from rlhf.config import Settings
from rlhf.policy.learner import PendingUpdate, StepContext, gap_meters, kl_meters, require_equal
from rlhf.policy.meters import Meters, item_meters, merge
from rlhf.training.deepspeed import Trainer
from rlhf.training.packing import Experience
from rlhf.types import RankBatch

LogProbs = Callable[[Experience], tuple[torch.Tensor, torch.Tensor]]


class PreferenceLearner:
    """The policy's optimizer steps under a `Preference` objective; a `Learner`.

    Args:
        reference: fp32 [N] log-probs of the anchor, and those at the sampling temperature; without gradient.
    """

    def __init__(self, settings: Settings, objective: Preference, policy: Trainer, reference: LogProbs):
        self.settings, self.objective, self.policy, self.reference = settings, objective, policy, reference
        self.trainers = {"policy": policy}

    def begin(self, step: StepContext) -> None:
        """Start a loop step. Of one that was given up nothing is left."""
        for trainer in self.trainers.values():
            trainer.discard()
        self._version, self._equal = step.version, step.equal and self.settings.run.invariants
        self._updates: dict[int, PendingUpdate[torch.Tensor]] = {}
        self._meters: list[Meters] = []

    def accumulate(self, batch: RankBatch[Experience]) -> None:
        """Learn from a piece of the first optimizer step at once: whatever else the step brings, the gradient at these weights is a sum.
        Of a later one only the anchor's log-probs are made, since its weights do not exist yet. Raises as `PolicyRank.learn`."""
        update = self._updates.setdefault(batch.update, PendingUpdate())
        for experience in update.add(batch):
            reference, tempered = self.reference(experience)
            update.targets.append(reference)
            if batch.update == 0:
                equal = self._equal and len(update.targets) == 1
                self._meters.append(self._visit(experience, reference, tempered, equal=equal))

    def finish(self) -> Meters:
        """Make the optimizer steps. Raises as `PolicyRank.learn`."""
        for epoch in range(self.settings.loop.epochs_per_step):
            for number, update in sorted(self._updates.items()):
                if epoch or number:
                    self._meters += [self._visit(experience, reference) for experience, reference in update]
                norm, rate = self.policy.step(update.counts.n_groups)
                self._meters.append({"policy/grad_norm": (norm, 1.0), "policy/learning_rate": (rate, 1.0)})
        self._updates = {}
        return merge(self._meters)

    def _visit(
        self, experience: Experience, reference: torch.Tensor, start: torch.Tensor | None = None, *, equal: bool = False
    ) -> Meters:
        """Forward and backward of one micro-batch.

        Args:
            start: if the policy's weights are still those that the step started from: the anchor's log-probs at the sampling
                temperature. What is measured of the policy that sampled (its KL, the engines' gap) is measured then alone; once an
                update has moved it, the completions are no samples of it.
            equal: the policy's weights are still those of the reference, which is checked.
        """
        logprobs, tempered = self.policy.forward(experience)
        if equal:
            require_equal(experience, logprobs, reference, self.settings.policy.dtype)
        losses = preference_loss(self.objective, experience, logprobs, reference)
        self.policy.backward(losses.sum())
        meters = item_meters(self.objective, experience, logprobs, reference)
        if len(losses):
            meters["policy/loss"] = (losses.sum().item(), float(len(experience.segments)))
        if len(losses) and start is not None:
            meters |= kl_meters(experience, tempered, start) | gap_meters(experience, tempered, self._version)
        return meters
