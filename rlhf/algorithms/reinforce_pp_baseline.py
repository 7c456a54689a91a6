"""REINFORCE++ with a group baseline (Hu 2025).

    A_i = R_i - mean_group(R),   on every token of response i, then whitened over all tokens of the step
    L   = -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta k2(log(pi/ref)_t)

k2 = (log pi/ref)^2 / 2 has the gradient of the KL to the reference at each token; a token is not penalised for the KL of those that follow.
Whitening divides the reward's part by its spread sigma and not the KL's, and a mean that contains the response itself is (K-1)/K of
the leave-one-out one. So on one-token responses the stationary policy is ref exp(R (K-1) / (K beta sigma)): the strength of the
regularisation depends on how much rewards still differ.

Deviations: truncated importance weights between engines and trainer (`correction`).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def reinforce_pp_baseline(settings: Settings) -> Algorithm:
    """The declaration: current policy, groups of K, reward less the group's mean, whitened, KL as a loss."""
    return policy_gradient_method(settings, baseline="mean")
