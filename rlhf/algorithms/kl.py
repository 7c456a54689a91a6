"""KL of the policy to the reference, token by token, and the controller that steers its coefficient.

With lr = log pi - log ref on a token that pi wrote (Schulman 2020, "Approximating KL divergence"):

    k1 = lr        k2 = lr^2 / 2        k3 = exp(-lr) - 1 + lr

k1 and k3 have the mean KL(pi||ref). As a loss, their gradients differ: in expectation that of k1 is 0, that of k2 is the
gradient of KL(pi||ref), and that of k3 is the gradient of KL(ref||pi). In the reward, where nothing is differentiated through them, the
score-function gradient of k1 is that of KL(pi||ref); that of k2 or k3 lacks the term that k1's own derivative cancels, and near the
reference it is a few percent of it, some of them with the opposite sign. So k1 belongs in the reward, and k2 in a loss.
No estimator is clamped: a clamp would change the KL of a policy that has drifted far, where it matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logratio: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Estimate of KL(pi||ref) at each token (nats), from lr = log pi - log ref; any shape."""
    if estimator == "k1":
        return logratio
    if estimator == "k2":
        return logratio.square() / 2
    return torch.expm1(-logratio) + logratio


@dataclass
class AdaptiveKl:
    """A coefficient that rises while the KL is above its target, and falls below it (Ziegler et al. 2019, section 2.2).

        coef <- coef (1 + clip(KL / target - 1, -0.2, 0.2) min(1, n / horizon))

    The bound on n / horizon is not in the paper, whose batches are far smaller than the horizon: without it the factor is negative
    from n = 5 horizon on.

    Attributes:
        coef: the present coefficient.
        target: KL per response to steer to (nats); None: the coefficient is constant.
        horizon: responses over which a full correction of 20% is made; more of them at once make no larger one.
    """

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, n_responses: int) -> None:
        """Take in the mean KL per response of `n_responses` responses."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(1.0, n_responses / self.horizon)
