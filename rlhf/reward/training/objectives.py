"""What a reward model is trained to do: objectives, each the sum of a loss over a batch and the number of things summed.

An objective sees the model's outputs for the texts of a batch and what people said about these texts (`Labels`); it
knows nothing of models, files or optimizers. It returns a sum and a count, so that a trainer can divide by the count of
the whole global batch: then neither ranks nor micro-batches change the result. The formulas are in `losses`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, TypeGuard

import torch

from rlhf.reward.modules import skew_symmetric_score, split_embedding
from rlhf.reward.training import losses

TEMPERATURE = 0.1
"""GPM's tau: P(i beats j) = sigmoid(s_ij / tau) (Zhang et al. 2024)."""


@dataclass(frozen=True)
class Labels:
    """What is known of the texts in one batch. Positions are rows of the model's outputs.

    Attributes:
        ratings: [n_texts, n_ratings] fp32, one column per objective; NaN where a text has no such rating. No columns for
            data without ratings.
        pairs: [n_pairs, 2] positions, the preferred text first. For a cross-encoder: the comparison in the order
            (preferred, other), then the same in the order (other, preferred).
        margins: [n_pairs] by how much the reward of the first should be higher; 0 if nothing was said.
        probabilities: [n_pairs] that the first is better; 1 if nothing was said.
        prompts: [n_pairs] positions of the pairs' prompts, for a GPM with a gate; else no elements.
    """

    ratings: torch.Tensor
    pairs: torch.Tensor
    margins: torch.Tensor
    probabilities: torch.Tensor
    prompts: torch.Tensor

    def to(self, device: torch.device | str) -> Labels:
        return Labels(*(getattr(self, field.name).to(device) for field in fields(self)))


class Objective(Protocol):
    """A loss on a model's outputs.

    Attributes:
        outputs: width of the model's head.
        observes: the trainer must call `observe`, and keep `state_dict` in its checkpoints.
    """

    outputs: int
    observes: bool

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        """The sum of the losses over the batch's pairs (or texts), and how many these are; 0.0 if the batch has none.

        Args:
            outputs: what the model says of the batch's texts, fp32 [n_texts, width].
        """
        ...


class ObservingObjective(Objective, Protocol):
    """An objective that looks at the gradients. Its state must be the same on all ranks, so it is shown global gradients."""

    def observe(self, gradient: torch.Tensor) -> None:
        """Called after the backward pass of each optimizer step, before the optimizer uses the gradient.

        Args:
            gradient: of the global batch's mean loss with respect to the head's weight, [outputs, n_features].
        """
        ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


def observing(objective: Objective) -> TypeGuard[ObservingObjective]:
    """Whether it looks at the gradients."""
    return objective.observes


class Squared:
    """(reward - rating)^2, summed over texts. The rewards have the ratings' units."""

    outputs, observes = 1, False

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        return (outputs - batch.ratings).square().sum(), float(len(outputs))


class BradleyTerry:
    """`losses.bradley_terry`, summed over pairs."""

    outputs, observes = 1, False

    def __init__(self, centring: float = 0.0):
        self._centring = centring

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        chosen, rejected = outputs[batch.pairs[:, 0], 0], outputs[batch.pairs[:, 1], 0]
        each = losses.bradley_terry(chosen, rejected, batch.margins, self._centring, batch.probabilities)
        return each.sum(), float(len(each))


class Ordinal:
    """`losses.ordinal`, summed over texts. The model's outputs are the cumulative logits of the levels.

    Args:
        levels: the ratings that occur, rising. A rating counts as the nearest one of them.
    """

    observes = False

    def __init__(self, levels: tuple[float, ...]):
        self.outputs = len(levels) - 1
        self._levels = torch.tensor(levels)

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        distance = (batch.ratings[:, :1] - self._levels.to(outputs.device)).abs()
        return losses.ordinal(outputs, distance.argmin(1)).sum(), float(len(outputs))


class GeneralPreference:
    """-log sigmoid(s(chosen beats rejected) / tau), summed over pairs: the general preference model (Zhang et al. 2024).

    The head's first 2k outputs are a response's embedding v, brought to unit norm as in the paper (the reference code leaves
    the normalisation out). With a gate, the other k outputs of a PROMPT's row give lambda = k softmax, else lambda = 1.

    Args:
        dimensions: 2k, even.
    """

    observes = False

    def __init__(self, dimensions: int, gate: bool = False, temperature: float = TEMPERATURE):
        self.outputs = dimensions + (dimensions // 2 if gate else 0)
        self._dimensions, self._temperature = dimensions, temperature

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        embeddings, gates = split_embedding(outputs, self._dimensions)
        first, second = embeddings[batch.pairs[:, 0]], embeddings[batch.pairs[:, 1]]
        gate = None if gates is None else gates[batch.prompts]
        score = skew_symmetric_score(first, second, gate)
        each = losses.cross_entropy(score / self._temperature, batch.probabilities)
        return each.sum(), float(len(each))


class CrossEncoder:
    """A model that reads both responses: cross entropy of P(the first is better), mean of both orders, summed over pairs."""

    outputs, observes = 1, False

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        there, back = outputs[batch.pairs[:, 0], 0], outputs[batch.pairs[:, 1], 0]
        p = batch.probabilities
        each = 0.5 * (losses.cross_entropy(there, p) + losses.cross_entropy(back, 1 - p))
        return each.sum(), float(len(each))


class MultiObjective:
    """One head per rating, squared errors weighted so that no objective is sacrificed (MORE, Zeng et al. 2023).

    After each step the heads' gradients, each made unit long, give the min-norm weights (`losses.min_norm_weights`), times the number of
    heads; the next step's loss is their weighted sum. A gradient is averaged over time first: g = (1 - a) g_old + a g with a = .99.
    Of two unit gradients the shortest combination is always half of each, so the weights of two objectives never change.
    Deviations from the paper: heads regress ratings instead of ranking pairs, one for each objective instead of one for
    each data set; weights lag a step, so that they come at no extra backward pass and are the same on all ranks; and none
    falls below `FLOOR` times its equal share, for an objective of weight 0 would never be seen again.
    """

    FLOOR = 0.01
    MOMENTUM = 0.99

    observes = True

    def __init__(self, objectives: int):
        self.outputs = objectives
        self.weights = torch.ones(objectives)
        self._gradient: torch.Tensor | None = None

    def loss(self, outputs: torch.Tensor, batch: Labels) -> tuple[torch.Tensor, float]:
        rated = ~batch.ratings.isnan()
        errors = torch.where(rated, outputs - batch.ratings.nan_to_num(), 0.0).square()
        return (errors.sum(0) * self.weights.to(outputs.device)).sum(), float(len(outputs))

    def observe(self, gradient: torch.Tensor) -> None:
        # A head has no other loss than its own, so its gradient is its objective's times the objective's weight.
        gradient = gradient.detach().float().cpu() / self.weights[:, None]
        old = gradient if self._gradient is None else self._gradient
        self._gradient = (1 - self.MOMENTUM) * old + self.MOMENTUM * gradient
        # In fp32 the rounding of a unit length would decide between gradients that are nearly parallel.
        unit = torch.nn.functional.normalize(self._gradient.double(), dim=1)
        share = losses.min_norm_weights(unit).float()
        self.weights = (1 - self.FLOOR) * share * len(share) + self.FLOOR

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weights": self.weights, "gradient": torch.empty(0) if self._gradient is None else self._gradient}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.weights, self._gradient = state["weights"], state["gradient"] if len(state["gradient"]) else None
