"""From rewards to advantages: token rewards, group baselines, returns, generalised advantage estimation, whitening.

Learned tokens of all responses lie in one flat row [N]; `response` [N] gives each token's response 0..R-1, ascending, and `group` [R]
each response's prompt. R is a response's scalar reward; lr = log pi - log ref of a token. Time t counts learned tokens: what a tool or
a user writes in between takes none, and the last learned token is the last one.

    R'  = clip(R)                     less kl_coef sum_t kl_t, if the KL is subtracted before the baseline
    A   = R' - baseline(group)
    r_t = A 1[t last] - kl_coef kl_t  (the KL only if it counts in the reward and was not subtracted before)
    A_t = sum_{s >= t} gamma^(s-t) r_s                                      without a critic
    A_t = sum_{s >= t} (gamma lam)^(s-t) (r_s + gamma V_{s+1} - V_s)        with one (GAE; Schulman et al. 2016)
    A_t <- (A_t - mean) / sqrt(var + 1e-8) over all tokens of the step      if whitened

Rewards are clipped before any baseline: after it the clip would act on differences. The value after the last token is 0, also of a
response that was cut at the token limit: the judge has scored the text as it is, so the limit is the end of the episode. (Bootstrapping
from a value there, as for a time limit in control, would give credit for text that no judge has seen.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.policy_gradient import PolicyGradient

Baseline = Literal["none", "mean", "leave_one_out", "mean_std"]

STD_EPSILON = 1e-6
"""Added to a group's standard deviation."""


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    advantages: [N], not yet whitened.
    returns: [N], what the critic learns, A_t + V_t; None without a critic.
    """

    advantages: torch.Tensor
    returns: torch.Tensor | None


def advantages(
    objective: PolicyGradient,
    rewards: torch.Tensor,
    response: torch.Tensor,
    group: torch.Tensor,
    *,
    kl_coef: float,
    logratio: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> Estimate:
    """Advantage of each response token, before whitening (see the module).

    Args:
        rewards: R of each response, [R].
        kl_coef: present factor on the KL in the reward.
        logratio: lr of each token under the policy as the step starts, [N]; only needed if the KL counts in the reward.
        values: the critic's V_t, [N]: the value of the state before token t; only with a critic.

    Raises:
        ValueError: `logratio` or `values` is needed and missing.
    """
    if objective.reward_clip is not None:
        rewards = rewards.clamp(-objective.reward_clip, objective.reward_clip)
    kl = None
    if objective.kl_placement == "reward":
        if logratio is None:
            raise ValueError("the KL counts in the reward, which needs `logratio`")
        kl = kl_coef * kl_estimate(logratio, objective.kl_estimator)
        if objective.kl_before_baseline:
            rewards = rewards.to(kl.dtype).index_add(0, response, -kl)
            kl = None
    tokens = token_rewards(group_advantages(rewards, group, objective.baseline), response, kl)
    if objective.critic is None:
        return Estimate(discounted_sums(tokens, response, objective.gamma), None)
    if values is None:
        raise ValueError("generalised advantage estimation needs the critic's `values`")
    result = gae(tokens, values, response, objective.gamma, objective.critic.lam)
    return Estimate(result, result + values)


def group_advantages(rewards: torch.Tensor, group: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    """Reward of each response less its group's baseline, [R]; exactly 0 where all rewards of a group are equal (or there is one).

    none: R. mean: R - mean. leave_one_out: R - mean of the others (RLOO). mean_std: (R - mean) / (std + 1e-6) with the
    unbiased standard deviation (GRPO).
    """
    if baseline == "none" or not len(rewards):
        return rewards
    n_groups = int(group.max()) + 1
    zeros = rewards.new_zeros(n_groups)
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    centred = rewards - (zeros.index_add(0, group, rewards) / count.clamp(min=1))[group]
    others = (count - 1).clamp(min=1)
    if baseline == "leave_one_out":
        centred = centred * (count / others)[group]
    elif baseline == "mean_std":
        variance = zeros.index_add(0, group, centred.square()) / others
        centred = centred / (variance.sqrt() + STD_EPSILON)[group]
    equal = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False) == zeros.scatter_reduce(
        0, group, rewards, "amin", include_self=False
    )
    return centred.masked_fill(equal[group], 0.0)  # a mean's rounding error over a tiny deviation is not a signal


def token_rewards(rewards: torch.Tensor, response: torch.Tensor, kl: torch.Tensor | None) -> torch.Tensor:
    """r_t, [N]: the response's reward [R] at its last token, less `kl` [N] (already multiplied by its coefficient)."""
    tokens = rewards[response] * _last(response)
    return tokens if kl is None else tokens - kl


def discounted_sums(values: torch.Tensor, response: torch.Tensor, discount: float) -> torch.Tensor:
    """sum_{s >= t} discount^(s-t) values_s within each response, [N].

    By doubling: after k rounds each token holds the sum over its next 2^k tokens, so a response of n tokens takes log2(n).
    """
    total, reach = values.clone(), 1
    longest = int(response.bincount().max())
    while reach < longest:
        same = response[:-reach] == response[reach:]
        total[:-reach] += discount**reach * total[reach:] * same
        reach *= 2
    return total


def gae(rewards: torch.Tensor, values: torch.Tensor, response: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimates, [N], from token rewards and values; the value after the last token is 0."""
    following = torch.cat([values[1:], values.new_zeros(1)]) * ~_last(response)
    return discounted_sums(rewards + gamma * following - values, response, gamma * lam)


def whiten(
    parts: Sequence[torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    learned: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """(x - mean) / sqrt(var + 1e-8), with mean and (biased) variance over all learned tokens of all parts and ranks.

    Args:
        parts: advantages of each micro-batch of this rank; may be none.
        learned: which tokens of each part have a loss, bool; None: all.
        total: adds up a float64 tensor over the ranks. Every rank calls it once.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for number, part in enumerate(parts):
        wide = (part if learned is None else part[learned[number]]).double()
        sums += torch.stack([wide.new_tensor(len(wide)), wide.sum(), wide.square().sum()]).cpu()
    count, first, second = total(sums).tolist()
    mean = first / max(count, 1.0)
    deviation = (max(second / max(count, 1.0) - mean**2, 0.0) + 1e-8) ** 0.5
    return [((part - mean) / deviation).to(part.dtype) for part in parts]


def _last(response: torch.Tensor) -> torch.Tensor:
    """Whether a token is its response's last, bool [N]."""
    return torch.cat([response[1:] != response[:-1], response.new_ones(1, dtype=torch.bool)])
