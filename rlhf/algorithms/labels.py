"""Labels: from a verdict on two responses to the probability that the loss is to believe.

Verdicts come as scores (then P(i beats j) = sigmoid((r_i - r_j) / temperature), Bradley and Terry) or as a matrix P from pairwise
judges. No verdict is not a tie: it is None here, and never a reward of zero. Pure but for the generator passed in.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from rlhf.types import Feedback, Rollout, Score


def scored(feedback: Feedback) -> list[tuple[int, float]]:
    """(index, reward) of the completions that have a score; a failure is not a reward of zero."""
    return [(i, outcome.value) for i, outcome in enumerate(feedback.outcomes) if isinstance(outcome, Score)]


def lead(feedback: Feedback, i: int, j: int) -> float | None:
    """How far response i is ahead of j: r_i - r_j in reward units, or P_ij - 1/2 from pairwise judges. None without a verdict."""
    if feedback.preferences is not None:
        p = float(feedback.preferences[i, j])
        return None if math.isnan(p) else p - 0.5
    first, second = feedback.outcomes[i], feedback.outcomes[j]
    if isinstance(first, Score) and isinstance(second, Score):
        return first.value - second.value
    return None


def identical(rollout: Rollout, i: int, j: int) -> bool:
    """Whether two responses have the same token ids."""
    return rollout.infos[i].digest == rollout.infos[j].digest


@dataclass(frozen=True)
class Labels:
    """How a verdict becomes the target probability that the chosen response is better.

    Attributes:
        kind: hard: certainty for the likelier winner; soft: the probability itself; sampled: certainty for a winner drawn with that
            probability, which is soft in expectation.
        temperature: reward difference, in reward units, that counts as one nat; unused with pairwise judges.
        smoothing: assumed probability that a hard or sampled label is flipped.
    """

    kind: Literal["hard", "soft", "sampled"] = "hard"
    temperature: float = 1.0
    smoothing: float = 0.0

    def probability(self, feedback: Feedback, lead: float) -> float:
        """P(i beats j) for a lead of i over j (see `lead`)."""
        if feedback.preferences is not None:
            return lead + 0.5
        return _sigmoid(lead / self.temperature)

    def order(
        self, feedback: Feedback, i: int, j: int, lead: float, rng: random.Random
    ) -> tuple[tuple[int, int], float] | None:
        """((chosen, rejected), target) of the pair i, j; None for a tie, which is a preference only if labels are not hard."""
        p = self.probability(feedback, lead)
        if self.kind == "soft":
            return ((i, j), p) if lead >= 0 else ((j, i), 1.0 - p)
        if self.kind == "hard" and lead == 0:
            return None
        wins = rng.random() < p if self.kind == "sampled" else lead > 0
        return (i, j) if wins else (j, i), 1.0 - self.smoothing

    def win(self, feedback: Feedback, lead: float, rng: random.Random) -> float:
        """What one response gains against another, in [0, 1]: a tie is 1/2, or 0 or 1 at random where labels are sampled."""
        p = self.probability(feedback, lead)
        if self.kind == "soft":
            return p
        if self.kind == "sampled":
            return float(rng.random() < p)
        return 0.5 if lead == 0 else float(lead > 0)


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))
