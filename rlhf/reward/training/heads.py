"""Linear heads on frozen features: ridge regression on ratings, logistic regression (Bradley-Terry) on pairs.

Pure numerics on arrays. Features are standardised with the mean and deviation of the training rows; the head that is
returned has this folded in, so it applies to raw features. The strength of the regularisation is the one that
predicts validation best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

RIDGE_STRENGTHS = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)
LOGISTIC_STRENGTHS = (0.3, 0.1, 0.03, 0.01, 0.003)
LBFGS_ITERATIONS = 50


@dataclass(frozen=True)
class LinearHead:
    """reward = features @ weight + bias.

    Attributes:
        weight: [n_features].
        strength: the regularisation that was chosen.
        validation_loss: mean squared error (ridge) or mean -log P(winner beats loser) (logistic).
    """

    weight: np.ndarray
    bias: float
    strength: float
    validation_loss: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weight + self.bias


def fit_ridge(
    fit: np.ndarray, ratings: np.ndarray, validation: np.ndarray, validation_ratings: np.ndarray
) -> LinearHead:
    """Minimise sum (x.w + b - rating)^2 + strength |w|^2 in closed form, b not penalised.

    Args:
        fit, validation: features [n, n_features].
    """
    mean, deviation = _scale(fit)
    x, y = (fit - mean) / deviation, ratings - ratings.mean()
    gram, target = x.T @ x, x.T @ y
    heads = []
    for strength in RIDGE_STRENGTHS:
        weight = np.linalg.solve(gram + strength * np.eye(len(gram)), target) / deviation
        head = LinearHead(weight, float(ratings.mean() - mean @ weight), strength, 0.0)
        heads.append(_with_loss(head, float(np.mean((head(validation) - validation_ratings) ** 2))))
    return min(heads, key=lambda head: head.validation_loss)


def fit_logistic(
    fit: np.ndarray, pairs: np.ndarray, validation: np.ndarray, validation_pairs: np.ndarray
) -> LinearHead:
    """Minimise mean -log sigmoid(w.(x_winner - x_loser)) + strength / 2 |w|^2; rewards have mean 0 over `fit`.

    Args:
        fit, validation: features [n, n_features].
        pairs, validation_pairs: indices into them, winner first, [n_pairs, 2].
    """
    mean, deviation = _scale(fit)
    x = torch.from_numpy(((fit - mean) / deviation).astype(np.float32))  # single precision halves the time
    winners, losers = torch.from_numpy(pairs[:, 0].copy()), torch.from_numpy(pairs[:, 1].copy())
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    heads = []
    for strength in LOGISTIC_STRENGTHS:  # from strong to weak: each start is the solution before it
        optimizer = torch.optim.LBFGS([weight], max_iter=LBFGS_ITERATIONS, line_search_fn="strong_wolfe")

        def closure(strength: float = strength, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            rewards = x @ weight
            loss = F.softplus(rewards[losers] - rewards[winners]).mean() + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        raw = weight.detach().numpy() / deviation
        head = LinearHead(raw, float(-mean @ raw), strength, 0.0)
        rewards = head(validation)
        gaps = rewards[validation_pairs[:, 1]] - rewards[validation_pairs[:, 0]]
        heads.append(_with_loss(head, float(np.logaddexp(0.0, gaps).mean())))
    return min(heads, key=lambda head: head.validation_loss)


def _scale(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per feature; a constant feature stays as it is."""
    deviation = features.std(0)
    return features.mean(0), np.where(deviation > 1e-6, deviation, 1.0)


def _with_loss(head: LinearHead, loss: float) -> LinearHead:
    return LinearHead(head.weight, head.bias, head.strength, loss)
