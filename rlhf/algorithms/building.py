"""Calls an algorithm's builder, which may be the user's own: an exception, or a value that cannot be learned from, is reported and drops
the prompt.

Also knows which items have no gradient: those on responses without a learned token, and a group of equal rewards where only the rewards
matter.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from rlhf.algorithms.algorithm import Algorithm, Objective
from rlhf.algorithms.builders import Dropped, Items
from rlhf.algorithms.contrast import Preference
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.config.user_code import ends_the_run, shown, told
from rlhf.types import Feedback, Rollout, TrainingItem


def build(algorithm: Algorithm, rollout: Rollout, feedback: Feedback, rng: random.Random) -> Items | Dropped:
    """What `algorithm.build` makes of a judged rollout. A builder that raises, or returns what cannot be learned from, drops the prompt as
    `build_failed`, with the reason in `detail`; one without a token to learn from is dropped as `nothing_learned`."""
    try:
        built = algorithm.build(rollout, feedback, rng)
    except BaseException as error:  # the user's code: whatever it raises is reported
        if ends_the_run(error):
            raise
        return Dropped("build_failed", told(error, algorithm.build))
    if isinstance(built, Dropped):
        return built
    n_terms = len(algorithm.objective.terms) if isinstance(algorithm.objective, Preference) else 1
    wrong = _objection(built, len(rollout.infos), n_terms)
    if wrong is not None:
        return Dropped("build_failed", wrong)
    return _with_tokens(algorithm.objective, rollout, built)


def teaches(objective: Objective, items: Items) -> bool:
    """Whether the items have a gradient. They have none, whatever the policy, if all rewards of a group are equal, are compared with that
    group alone, and are all that counts: a KL or an entropy bonus teaches something also there, and whitening compares all groups."""
    if not isinstance(objective, PolicyGradient) or not _rewards_alone(objective):
        return True
    bound = float("inf") if objective.reward_clip is None else objective.reward_clip
    return len({max(-bound, min(bound, item.target)) for item in items}) > 1


def _with_tokens(objective: Objective, rollout: Rollout, items: Items) -> Items | Dropped:
    """The items that have learned tokens (`Span.learned`). A reward for a response without any stays in its group's baseline."""
    empty = {member for member, info in enumerate(rollout.infos) if not info.n_learned}
    weights = [0.0 if empty.issuperset(item.members) else item.weight for item in items]
    if not any(weights):
        return Dropped("nothing_learned")
    if isinstance(objective, PolicyGradient):
        return tuple(replace(item, weight=weight) for item, weight in zip(items, weights, strict=True))
    return tuple(item for item in items if not empty.issuperset(item.members))


def _rewards_alone(objective: PolicyGradient) -> bool:
    pulled = objective.kl_placement != "none" and objective.kl_coef > 0
    return objective.baseline != "none" and not (
        objective.critic or objective.whiten or objective.entropy_coef or pulled
    )


def _objection(built: Any, n_responses: int, n_terms: int) -> str | None:
    """Why this cannot be learned from; None if it can."""
    if not isinstance(built, tuple) or not all(isinstance(item, TrainingItem) for item in built):
        return f"the builder returned {shown(built)}, which is neither a tuple of TrainingItem nor Dropped"
    if not built:
        return "the builder returned no items; it should return Dropped with a reason"
    if not any(item.weight for item in built):
        return (
            "every item has the weight 0, so there is nothing to learn; the builder should return Dropped with a reason"
        )
    for item in built:
        if not item.members or not all(member in range(n_responses) for member in item.members):
            return f"the item {shown(item)} has members that are not among the {n_responses} responses"
        if len(item.coefficients) != len(item.members):
            return f"the item {shown(item)} has not one coefficient per member"
        if not all(math.isfinite(number) for number in (*item.coefficients, item.target, item.weight)):
            return f"the item {shown(item)} has a number that is not finite"
        if item.term not in range(n_terms):
            return f"the item {shown(item)} belongs to a term that the objective does not have (it has {n_terms})"
    return None
