"""Dr. GRPO: GRPO done right (Liu et al. 2025).

    A_i = R_i - mean_group(R),   on every token of response i
    L   = 1/(B L_max) sum_i sum_t -min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i)

B is the number of responses, L_max the longest possible (`rollout.max_tokens`). No division by the standard deviation,
which would give very easy and very hard prompts more weight; none by a response's own length, which would penalise long wrong answers
less. No KL.

Deviations: truncated importance weights between engines and trainer (`correction`).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def dr_grpo(settings: Settings) -> Algorithm:
    """The declaration: current policy, groups of K, reward less the group's mean, a constant normaliser."""
    return policy_gradient_method(settings, baseline="mean")
