"""GRPO: group relative policy optimisation (Shao et al. 2024).

    A_i = (R_i - mean_group(R)) / (std_group(R) + 1e-6),   on every token of response i; std with n - 1
    L_i = mean_t[ -min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i) + beta k3(log(pi/ref)_t) ],   then the mean over responses

k3 = ref/pi - 1 - log(ref/pi). Its value estimates KL(pi||ref), its gradient as a loss is that of KL(ref||pi), and each token is
penalised for its own KL only, not for that of the tokens that follow. Because of the division by the standard deviation, the stationary
policy does not depend on the scale of the rewards. So it is not ref exp(R / beta).

`ratio: sequence` is GSPO (Zheng et al. 2025): rho is the geometric mean over the response's tokens; use clip bounds near 3e-4.

Deviations: one-step and multi-step updates alike use the old policy of the step; truncated importance weights between engines and
trainer (`correction`).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def grpo(settings: Settings) -> Algorithm:
    """The declaration: current policy, groups of K, standardised rewards, KL as a loss."""
    return policy_gradient_method(settings, baseline="mean_std")
