"""Learning from contrasts: the loss of algorithms/contrast.py on one rank's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rlhf.algorithms.contrast import Preference, preference_loss
from rlhf.config import Settings
from rlhf.policy.learner import Moment, Update, gap_meters, kl_meters, require_equal
from rlhf.policy.meters import Meters, item_meters, merge
from rlhf.training.deepspeed import Trainer
from rlhf.training.packing import Experience

LogProbs = Callable[[Experience], tuple[torch.Tensor, torch.Tensor]]


class PreferenceLearner:
    """The policy's optimizer steps under a `Preference` objective.

    Args:
        reference: fp32 [N] log-probs of the anchor, and those at the sampling temperature; without gradient.
    """

    def __init__(self, settings: Settings, objective: Preference, policy: Trainer, reference: LogProbs):
        self.settings, self.objective, self.policy, self.reference = settings, objective, policy, reference
        self.trainers = {"policy": policy}

    def learn(self, updates: Sequence[Update], moment: Moment) -> Meters:
        """Make the optimizer steps, as often as `loop.epochs_per_step`. Raises as `PolicyRank.learn`."""
        references: dict[tuple[int, int], torch.Tensor] = {}
        tempered: torch.Tensor | None = None
        meters: list[Meters] = []
        for epoch in range(self.settings.loop.epochs_per_step):
            for number, update in enumerate(updates):
                untouched = epoch == 0 and number == 0
                for place, experience in enumerate(update.experiences):
                    if (number, place) not in references:
                        references[number, place], tempered = self.reference(experience)
                    reference = references[number, place]
                    equal = moment.equal and untouched and place == 0
                    start = tempered if untouched else None
                    meters.append(self._accumulate(experience, reference, update.n_groups, start, equal))
                norm, rate = self.policy.step()
                meters.append({"policy/grad_norm": (norm, 1.0), "policy/learning_rate": (rate, 1.0)})
        return merge(meters)

    def _accumulate(
        self,
        experience: Experience,
        reference: torch.Tensor,
        n_groups: int,
        start: torch.Tensor | None,
        equal: bool,
    ) -> Meters:
        """Forward and backward of one micro-batch.

        Args:
            start: if the policy's weights are still those that wrote the completions: the anchor's log-probs at the sampling
                temperature. What is measured of the policy that sampled (its KL, the engines' gap) is measured then alone; once an
                update has moved it, the completions are no samples of it.
            equal: the policy's weights are still those of the reference.
        """
        logprobs, tempered = self.policy.forward(experience)
        if equal and self.settings.run.invariants:
            require_equal(experience, logprobs, reference, self.settings.policy.dtype)
        losses = preference_loss(self.objective, experience, logprobs, reference)
        self.policy.backward(losses.sum() / n_groups)
        meters = item_meters(self.objective, experience, logprobs, reference)
        if len(losses):
            meters["policy/loss"] = (losses.sum().item(), float(len(experience.segments)))
        if len(losses) and start is not None:
            meters |= kl_meters(experience, tempered, start) | gap_meters(experience, tempered)
        return meters
