"""Builders: from judged completions to training items. Pure; the only randomness is the generator passed in.

A builder returns items, or `Dropped` with the reason why this prompt teaches nothing. Two rules hold for every pair: its
responses have different token ids, and (with hard labels) different rewards; a tie carries no preference.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from rlhf.types import Feedback, Rollout, Score, TrainingItem


@dataclass(frozen=True)
class Dropped:
    """This prompt gives no training item."""

    reason: Literal["too_few_scores", "identical", "tie"]


@dataclass(frozen=True)
class Labels:
    """How a reward difference becomes the target probability that the chosen response is better.

    Attributes:
        soft: sigmoid(difference / temperature) instead of certainty.
        temperature: in reward units.
        smoothing: assumed probability that a hard label is flipped.
    """

    soft: bool = False
    temperature: float = 1.0
    smoothing: float = 0.0

    def target(self, difference: float) -> float:
        """Probability in [1/2, 1] for a reward difference >= 0."""
        if self.soft:
            return 1.0 / (1.0 + math.exp(-difference / self.temperature))
        return 1.0 - self.smoothing


def scored(feedback: Feedback) -> list[tuple[int, float]]:
    """(index, reward) of the completions that have a score; a failure is not a reward of zero."""
    return [(i, outcome.value) for i, outcome in enumerate(feedback.outcomes) if isinstance(outcome, Score)]


def best_vs_worst(
    rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels
) -> tuple[TrainingItem, ...] | Dropped:
    """One pair: the highest reward against the lowest, the lower index first. Draws nothing from `rng`."""
    rewards = scored(feedback)
    if len(rewards) < 2:
        return Dropped("too_few_scores")
    chosen, rejected = max(rewards, key=lambda r: r[1]), min(rewards, key=lambda r: r[1])
    if chosen[1] == rejected[1]:
        return Dropped("tie")
    return _pair(rollout, chosen, rejected, labels)


def random_pair(
    rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels
) -> tuple[TrainingItem, ...] | Dropped:
    """One pair drawn at random; the higher reward is the chosen one."""
    rewards = scored(feedback)
    if len(rewards) < 2:
        return Dropped("too_few_scores")
    first, second = rng.sample(rewards, 2)
    if first[1] == second[1] and not labels.soft:
        return Dropped("tie")
    chosen, rejected = (first, second) if first[1] >= second[1] else (second, first)
    return _pair(rollout, chosen, rejected, labels)


def _pair(
    rollout: Rollout, chosen: tuple[int, float], rejected: tuple[int, float], labels: Labels
) -> tuple[TrainingItem, ...] | Dropped:
    if rollout.infos[chosen[0]].digest == rollout.infos[rejected[0]].digest:
        return Dropped("identical")
    return (TrainingItem((chosen[0], rejected[0]), (1.0, -1.0), labels.target(chosen[1] - rejected[1])),)
