"""What an algorithm is: a choice at each plug point (who writes, who judges, what is built, which loss, which anchors)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rlhf.algorithms.anchors import Fixed, UpdateRule
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.contrast import Preference
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.types import Feedback, Rollout, TrainingItem

Builder = Callable[[Rollout, Feedback, random.Random], "tuple[TrainingItem, ...] | Dropped"]
Objective = Preference | PolicyGradient


@dataclass(frozen=True)
class Source:
    """Who writes responses, and how many of each prompt.

    Attributes:
        name: marks the completions (`Completion.source`), so that a builder can tell them apart.
        n: responses per prompt.
        mixture: 0 is the policy, 1 its partner (the second model in the engines), between them the geometric mixture
            policy^(1 - mixture) partner^mixture, normalised token by token.
        greedy: take the likeliest token each time, regardless of `rollout.temperature`.
    """

    name: str
    n: int
    mixture: float = 0.0
    greedy: bool = False


@dataclass(frozen=True)
class Algorithm:
    """A choice at each plug point.

    Attributes:
        sources: who writes the responses; empty for a method that learns from the data set's pairs alone.
        build: judged completions -> items to learn from. It runs in the driver and sees facts and rewards, not tokens.
        objective: the loss on those items. It runs in the policy's ranks, so it must be picklable.
        reference: how the reference of the loss changes.
        partner: how the engines' second model changes, where it is not the reference (None: it is).
        dataset_pairs: each prompt's `chosen` and `rejected` join the completions, with the sources "chosen" and "rejected".
        judged: whether the reward servers are asked.
    """

    name: str
    sources: tuple[Source, ...]
    build: Builder
    objective: Objective
    reference: UpdateRule = Fixed()
    partner: UpdateRule | None = None
    dataset_pairs: bool = False
    judged: bool = True

    @property
    def mixes(self) -> bool:
        """Whether the engines need the second model."""
        return any(source.mixture > 0 for source in self.sources)

    @property
    def responses_per_prompt(self) -> int:
        """Completions of one prompt, those of the data set included."""
        return sum(source.n for source in self.sources) + 2 * self.dataset_pairs
