"""CISPO, clipped importance-sampling weights (MiniMax 2025, the report on M1).

    A_i = (R_i - mean_group(R)) / (std_group(R) + 1e-6),   on every token of response i; std with n - 1
    L   = -mean_t sg[ clip(rho_t, 1 - eps_low, 1 + eps_high) ] A_i log pi_t,   rho_t = pi(y_t) / pi_old(y_t)

GRPO's clipping removes the gradient of tokens that a first update has made much likelier; often these are the rare ones that change the
course of the reasoning. Here such a token keeps its gradient, with the bound as its weight. In a single update per batch rho is 1 and
both are the plain policy gradient. There is no KL and, as in the report, no lower bound; the report names no upper one, 5 is usual since.

Deviations: truncated importance weights between engines and trainer (`correction`).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def cispo(settings: Settings) -> Algorithm:
    """The declaration: current policy, groups of K, standardised rewards, a clipped weight on each token's log-prob."""
    return policy_gradient_method(settings, baseline="mean_std", surrogate="cispo")
