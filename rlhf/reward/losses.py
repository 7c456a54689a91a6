"""What reward models are trained with and measured by: pure functions, no models and no files."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: float | torch.Tensor = 0.0, centring: float = 0.0
) -> torch.Tensor:
    """Mean of -log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2.

    Args:
        chosen, rejected: rewards r_w and r_l, [n_pairs].
        margin: m, by how much the chosen reward should win; a number or [n_pairs].
        centring: c; above 0 it keeps the rewards, which are defined only up to a constant, around 0.
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    if centring > 0:
        loss = loss + centring * (chosen + rejected).square()
    return loss.mean()


def pair_probabilities(differences: np.ndarray, temperature: float) -> np.ndarray:
    """P(first beats second) = sigmoid((r_1 - r_2) / T), elementwise on reward differences [n_pairs]."""
    return 0.5 * (1.0 + np.tanh(np.asarray(differences, dtype=np.float64) / (2.0 * temperature)))


def fit_temperature(differences: np.ndarray) -> float:
    """The T that makes sigmoid(difference / T) likeliest, for differences winner minus loser, [n_pairs].

    One-dimensional search on log T between 1e-3 and 1e3 times the differences' scale; there is one maximum.
    """
    differences = np.asarray(differences, dtype=np.float64)
    scale = float(np.abs(differences).mean())
    if scale == 0.0:
        return 1.0
    low, high = np.log(scale) - np.log(1e3), np.log(scale) + np.log(1e3)
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if _surprise(differences, left) < _surprise(differences, right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2.0))


def _surprise(differences: np.ndarray, log_temperature: float) -> float:
    """Mean -log P(winner beats loser), in nats."""
    return float(np.logaddexp(0.0, -differences / np.exp(log_temperature)).mean())


def expected_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> float:
    """How far confidence is from accuracy: sum_b |B_b| / N * |accuracy_b - confidence_b|.

    Args:
        probabilities: P(first beats second), [n_pairs]. The confidence is max(P, 1 - P); bins divide [0.5, 1] equally.
        outcomes: 1 where the first did win, else 0, [n_pairs].
    """
    probabilities, outcomes = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes)
    confidence = np.maximum(probabilities, 1.0 - probabilities)
    correct = (probabilities >= 0.5) == (outcomes == 1)
    index = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(int), bins - 1)
    size = np.bincount(index, minlength=bins)
    gap = np.abs(np.bincount(index, correct, bins) - np.bincount(index, confidence, bins))
    return float(gap[size > 0].sum() / len(confidence))


def brier(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean squared difference between P(first beats second) and what happened (0 or 1)."""
    return float(np.mean((np.asarray(probabilities, dtype=np.float64) - np.asarray(outcomes)) ** 2))
