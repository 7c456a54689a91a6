"""From a step's judged scores to those that are learned from: `reward.transforms`, applied in order.

Lives on the driver and works on a whole step at once, in the order of the prompts, so that what it remembers (the moments of
`normalise`) does not depend on who answered first: a run that is repeated or resumed shapes the same rewards. A response without a
score stays without one. Knows nothing of servers and algorithms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from rlhf.config import Settings
from rlhf.config.reward import RewardSettings
from rlhf.config.transforms import REFERENCED, Normalise, Transform
from rlhf.data.assets import resolve
from rlhf.reward.errors import RewardError
from rlhf.reward.reference_scores import (
    REWARD,
    ReferenceScores,
    members_need_references,
    read_reference_scores,
)
from rlhf.reward.transforms import Moments, Scored, before_reference, stateless
from rlhf.types import Feedback, Prompt, Rollout, Score


class Shaping:
    """The chain of transforms of a run, and what it remembers. Make it with `start`."""

    def __init__(self, transforms: Sequence[Transform], references: ReferenceScores | None = None, limit: int = 0):
        """
        Args:
            references: of every prompt that will be shaped, if a transform reads them.
            limit: the most tokens of a response (`rollout.max_tokens`), if a transform reads it.
        """
        self._transforms, self._references, self._limit = transforms, references, limit
        self._moments = {i: Moments() for i, one in enumerate(transforms) if isinstance(one, Normalise)}
        self._reference_of = functools.cache(self._scores_of_reference)

    @classmethod
    def start(cls, settings: Settings, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> Shaping:
        """The chain that the settings describe.

        Args:
            prompts: of training.
            held_out: those of evaluations, which only the transforms of an ensemble's members see.

        Raises:
            RewardError: the reference scores cannot be read, lack prompts, or are another model's.
        """
        reward, limit = settings.reward, settings.rollout.max_tokens
        if reward.reference_scores is None:
            return cls(reward.transforms, limit=limit)
        references = read_reference_scores(resolve(reward.reference_scores))
        references.require([*prompts, *(held_out if members_need_references(reward) else ())], settings)
        return cls(reward.transforms, references, limit)

    def require_judge(self, reward: RewardSettings, fingerprint: str | None) -> None:
        """Check that the judge that is now ready is the one that scored the reference.

        Raises:
            RewardError: it is another one.
        """
        if self._references is not None:
            self._references.require_judge(reward, fingerprint)

    def shape(self, rollouts: Sequence[Rollout], feedbacks: Sequence[Feedback]) -> list[Feedback]:
        """The feedbacks of one step with the rewards to learn from; each `normalise` now also remembers this step."""
        if not self._transforms:
            return list(feedbacks)
        scored = [
            (rollout.prompt.id, Scored(outcome.value, info.n_tokens, info.finish_reason == "length", self._limit))
            for rollout, feedback in zip(rollouts, feedbacks, strict=True)
            for info, outcome in zip(rollout.infos, feedback.outcomes, strict=True)
            if isinstance(outcome, Score)
        ]
        for i in range(len(self._transforms)):
            values = self._transformed(i, scored)
            scored = [
                (prompt_id, replace(one, value=value)) for (prompt_id, one), value in zip(scored, values, strict=True)
            ]
        rewards = iter(one.value for _, one in scored)
        return [
            replace(
                feedback,
                outcomes=tuple(Score(next(rewards)) if isinstance(one, Score) else one for one in feedback.outcomes),
            )
            for feedback in feedbacks
        ]

    def metrics(self, feedbacks: Sequence[Feedback]) -> dict[str, float]:
        """reward/shaped_mean and reward/shaped_std of what `shape` returned; empty without transforms."""
        rewards = [one.value for feedback in feedbacks for one in feedback.outcomes if isinstance(one, Score)]
        if not self._transforms or not rewards:
            return {}
        return {"reward/shaped_mean": float(np.mean(rewards)), "reward/shaped_std": float(np.std(rewards))}

    def state(self) -> list[list[float]]:
        """What the chain remembers, as JSON."""
        return [list(astuple(moments)) for moments in self._moments.values()]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on from what `state` gave.

        Raises:
            RewardError: the run had another number of `normalise` transforms.
        """
        if len(state) != len(self._moments):
            raise RewardError(
                f"`reward.transforms`: the checkpoint remembers {len(state)} `normalise`, but there are {len(self._moments)} now. "
                "Restore the transforms that the run began with, or start a new run in another run.dir"
            )
        self._moments = {i: Moments(*moments) for i, moments in zip(self._moments, state, strict=True)}

    def _transformed(self, i: int, scored: Sequence[tuple[str, Scored]]) -> list[float]:
        """All scores of a step after transform number i."""
        transform = self._transforms[i]
        if isinstance(transform, Normalise):
            self._moments[i] = self._moments[i].including([one.value for _, one in scored])
            return [self._moments[i].normalised(one.value) for _, one in scored]
        compared = isinstance(transform, REFERENCED)
        return [
            stateless(transform, one, self._reference_of(prompt_id) if compared else ()) for prompt_id, one in scored
        ]

    def _scores_of_reference(self, prompt_id: str) -> list[float]:
        assert self._references is not None, "read where a transform needs them"
        references = [replace(one, limit=self._limit) for one in self._references.of(prompt_id, REWARD)]
        return before_reference(self._transforms, references)
