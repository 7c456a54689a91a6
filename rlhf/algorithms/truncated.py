"""Masks responses that were cut at the token limit (`algorithm.mask_truncated`), around any method's builder.

How such a response would have ended is unknown: its reward is that of an unfinished text, and lowering its tokens' probability
punishes a beginning that may have been right (DAPO's overlong filtering; Yu et al. 2025).
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from rlhf.algorithms.algorithm import Builder
from rlhf.algorithms.builders import Dropped, Items
from rlhf.types import Feedback, Invalid, Rollout


def without_truncated(
    rollout: Rollout, feedback: Feedback, rng: random.Random, build: Builder, baseline: bool
) -> Items | Dropped:
    """The items of `build` on the responses that ended by themselves.

    Args:
        baseline: a cut response keeps its verdict, since its group's baseline or its opponent's probability needs it, and its items get
            weight 0. Otherwise it has no verdict, so that `build` chooses among the others, and no item with it is left.
    """
    cut = {index for index, info in enumerate(rollout.infos) if info.finish_reason == "length"}
    built = build(rollout, feedback if baseline else _unjudged(feedback, cut), rng)
    if isinstance(built, Dropped):
        return Dropped("truncated") if cut and not baseline and built.reason == "too_few_scores" else built
    learned = [item for item in built if cut.isdisjoint(item.members)]
    if not learned:
        return Dropped("truncated")
    if baseline:
        return tuple(item if cut.isdisjoint(item.members) else replace(item, weight=0.0) for item in built)
    return tuple(learned)


def _unjudged(feedback: Feedback, cut: set[int]) -> Feedback:
    """Without the verdicts on these responses."""
    outcomes = tuple(Invalid("truncated") if i in cut else one for i, one in enumerate(feedback.outcomes))
    preferences = feedback.preferences
    if preferences is not None and cut:
        preferences = preferences.copy()
        preferences[list(cut), :] = preferences[:, list(cut)] = np.nan
    return replace(feedback, outcomes=outcomes, preferences=preferences)
