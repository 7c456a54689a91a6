"""What the policy-gradient methods share: the builder, in which every scored response is an item, and how settings become an objective."""

from __future__ import annotations

import random
from functools import partial
from typing import Literal

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import update_rule
from rlhf.algorithms.builders import Dropped, scored
from rlhf.algorithms.policy_gradient import Critic, PolicyGradient
from rlhf.config import Settings
from rlhf.config.methods.gradient import correction_bounds
from rlhf.types import Feedback, Rollout, TrainingItem


def every_response(
    rollout: Rollout, feedback: Feedback, rng: random.Random, at_least: int
) -> tuple[TrainingItem, ...] | Dropped:
    """One item per scored response, its reward the target. Draws nothing from `rng`.

    Identical responses stay: each carries its reward. Equal rewards stay too: their advantage is 0, or what a KL makes of it.

    Args:
        at_least: fewer scores than this drop the prompt: 2 where a response is compared with the others of its group.
    """
    rewards = scored(feedback)
    if len(rewards) < at_least:
        return Dropped("too_few_scores")
    return tuple(TrainingItem((index,), (1.0,), target=value) for index, value in rewards)


def policy_gradient_method(
    settings: Settings,
    baseline: Literal["none", "mean", "leave_one_out", "mean_std"] = "none",
    critic: Critic | None = None,
    kl_before_baseline: bool = False,
    surrogate: Literal["clipped", "cispo"] = "clipped",
) -> Algorithm:
    """The declaration that `settings.algorithm` describes: the policy writes K responses to each prompt, each learns its reward."""
    chosen = settings.algorithm
    low, high = correction_bounds(chosen)
    return Algorithm(
        name=chosen.name,
        sources=(Source("policy", chosen.samples_per_prompt),),
        build=partial(every_response, at_least=1 if baseline == "none" else 2),
        objective=PolicyGradient(
            baseline=baseline,
            critic=critic,
            gamma=chosen.gamma,
            whiten=chosen.whiten,
            reward_clip=chosen.reward_clip,
            kl_placement=chosen.kl_placement,
            kl_estimator=chosen.kl_estimator,
            kl_coef=chosen.kl_coef,
            kl_target=chosen.kl_target,
            kl_horizon=chosen.kl_horizon,
            kl_before_baseline=kl_before_baseline,
            clip_low=chosen.clip_low,
            clip_high=chosen.clip_high,
            dual_clip=getattr(chosen, "dual_clip", None),
            ratio=chosen.ratio,
            entropy_coef=chosen.entropy_coef,
            aggregation=chosen.aggregation,
            max_tokens=settings.rollout.max_tokens,
            correction=chosen.correction,
            correction_low=low,
            correction_high=high,
            surrogate=surrogate,
        ),
        reference=update_rule(chosen),
    )
