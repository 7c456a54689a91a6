"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024).

    R'_i = clip(R_i, -10, 10) - beta sum_t log(pi/ref)_t
    A_i  = R'_i - mean_{j != i} R'_j,   on every token of response i
    L    = -min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i)

The baseline does not depend on response i, so the gradient is unbiased: the stationary policy is ref exp(R / beta).
With `kl_before_baseline: false` the KL is subtracted token by token after the baseline, so the advantage of a token holds only the KL
from it onwards.

Deviations: the paper takes one plain gradient step per batch; here the ratio is clipped, which changes nothing in the first of
several optimizer steps on the same responses. Truncated importance weights between engines and trainer (`correction`).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def rloo(settings: Settings) -> Algorithm:
    """The declaration: current policy, groups of K, leave-one-out baseline, KL in the reward."""
    chosen = settings.algorithm
    return policy_gradient_method(settings, baseline="leave_one_out", kl_before_baseline=chosen.kl_before_baseline)
