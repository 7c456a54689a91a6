"""REINFORCE++ (Hu 2025): PPO's loss without a critic.

    r_t = -beta log(pi/ref)_t + 1[t last] clip(R, -10, 10)
    A_t = sum_{s >= t} gamma^(s-t) r_s,   whitened over all tokens of the step
    L   = -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)

The only baseline is the mean over the step's tokens; whitening divides reward and KL alike, so the stationary policy
is still ref exp(R / beta), and only the size of the steps changes.

Deviations: truncated importance weights between engines and trainer (`correction`).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def reinforce_pp(settings: Settings) -> Algorithm:
    """The declaration: current policy, returns to go with the KL inside, whitened, clipped ratio."""
    return policy_gradient_method(settings)
