"""The losses of reward models and of preference models: pure functions on tensors, one value per text or per pair.

Means are taken by whoever knows what to divide by (`objectives`). How good trained models are is measured in
`calibration`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bradley_terry(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: float | torch.Tensor = 0.0,
    centring: float = 0.0,
    probability: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (r_w + r_l)^2 with d = r_w - r_l - m; one loss per pair.

    Args:
        chosen, rejected: rewards r_w and r_l, [n_pairs].
        margin: m, by how much the chosen reward should win (Touvron et al. 2023, Llama 2, equation 2); a number or [n_pairs].
        centring: c; above 0 it keeps the rewards, which are defined only up to a constant, around 0 (Eisenstein et al.
            2023).
        probability: p, that the chosen one is the better; a number or [n_pairs].
    """
    gap = chosen - rejected - margin
    loss = cross_entropy(gap, probability)
    if centring > 0:
        loss = loss + centring * (chosen + rejected).square()
    return loss


def cross_entropy(logit: torch.Tensor, probability: float | torch.Tensor = 1.0) -> torch.Tensor:
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z), elementwise on logits z."""
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


def ordinal(cumulative: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """-log P(y = level) in the proportional-odds model (McCullagh 1980), one loss per text.

    P(y > k) = sigmoid(z_k), so P(y = k) = sigmoid(z_{k-1}) - sigmoid(z_k), with z_{-1} = inf and z_{K-1} = -inf. The difference
    of two sigmoids is sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose logarithm is exact also far out.

    Args:
        cumulative: z, [n_texts, K - 1], falling along each row.
        level: [n_texts], 0 to K - 1.
    """
    edge = torch.full_like(cumulative[:, :1], 1e4)
    bounds = torch.cat([edge, cumulative, -edge], dim=1)
    above = bounds.gather(1, level[:, None])[:, 0]
    below = bounds.gather(1, level[:, None] + 1)[:, 0]
    return -(F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(below - above)))


RIDGE = 1e-8
"""Added to the squared lengths that `min_norm_weights` compares, as a share of their mean: directions closer than 1e-4 count as one.
fp32 gradients are known to about 1e-6, so rounding moves no weight by more than 1%."""


def min_norm_weights(gradients: torch.Tensor, iterations: int = 250) -> torch.Tensor:
    """Weights [n], fp64, at least 0 and of sum 1, of the shortest convex combination of `gradients` [n, n_features].

    A step along that combination makes no loss larger, to first order (Sener and Koltun 2018). Frank-Wolfe with pairwise steps and exact
    line search (Lacoste-Julien and Jaggi 2015): weight moves from the gradient that agrees most with the combination to the one that
    agrees least, which converges where the plain method of Sener and Koltun creeps. Where gradients are so nearly the same that their
    rounding would decide, the weights go to the equal share (`RIDGE`).
    """
    n = len(gradients)
    gram = gradients.double() @ gradients.double().T
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype, device=gram.device)
    weights = torch.full((n,), 1.0 / n, dtype=gram.dtype, device=gram.device)
    for _ in range(iterations):
        products = gram @ weights
        to = products.argmin()
        source = products.masked_fill(weights <= 0, -torch.inf).argmax()
        gain = products[source] - products[to]
        if gain <= 1e-12 * products.abs().max():
            break
        length = gram[to, to] - 2 * gram[to, source] + gram[source, source]
        step = torch.minimum(gain / length, weights[source])
        weights[to] += step
        weights[source] -= step
    return weights
