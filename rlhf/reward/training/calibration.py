"""Accuracy and calibration of rewards and preference probabilities on held-out pairs. Pure functions on arrays.

Accuracy, calibration (ECE, Brier score, the bins of a reliability diagram), the temperature that makes probabilities of
reward differences, and how much of a reward is only length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.config import MissingPackageError
from rlhf.config.extras import remedy

BINS = 10


def fit_temperature(differences: np.ndarray, probabilities: np.ndarray | float = 1.0) -> float:
    """The T that makes sigmoid(difference / T) likeliest, for differences winner minus loser, [n_pairs].

    One-dimensional search on log T between 1e-3 and 1e3 times the differences' scale; there is one maximum. No verdict counts as surer
    than (n + 1) / (n + 2) (Platt 1999): a model that orders all of a few pairs rightly is not therefore certain.

    Args:
        probabilities: that the winner is the better one, [n_pairs] or one number.
    """
    differences = np.asarray(differences, dtype=np.float64)
    probabilities = np.minimum(probabilities, (len(differences) + 1) / (len(differences) + 2))
    scale = float(np.abs(differences).mean())
    if scale == 0.0:
        return 1.0
    low, high = np.log(scale) - np.log(1e3), np.log(scale) + np.log(1e3)
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if _surprise(differences, probabilities, left) < _surprise(differences, probabilities, right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2.0))


def _surprise(differences: np.ndarray, probabilities: np.ndarray | float, log_temperature: float) -> float:
    """Mean -p log P(winner beats loser) - (1 - p) log P(loser beats winner), in nats."""
    logits = differences / np.exp(log_temperature)
    return float((np.logaddexp(0.0, -logits) + (1.0 - np.asarray(probabilities)) * logits).mean())


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence lies in one tenth of [0.5, 1].

    Attributes:
        confidence: mean of max(P, 1 - P).
        accuracy: how often the likelier one did win.
    """

    pairs: int
    confidence: float
    accuracy: float


def reliability_bins(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> list[Bin]:
    """The bins that are not empty, by rising confidence.

    Args:
        probabilities: P(first beats second), [n_pairs]. The confidence is max(P, 1 - P); bins divide [0.5, 1] equally.
        outcomes: 1 where the first did win, else 0, [n_pairs].
    """
    probabilities, outcomes = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes)
    confidence = np.maximum(probabilities, 1.0 - probabilities)
    correct = (probabilities >= 0.5) == (outcomes == 1)
    index = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(int), bins - 1)
    members = [index == number for number in range(bins)]
    return [Bin(int(m.sum()), float(confidence[m].mean()), float(correct[m].mean())) for m in members if m.any()]


def expected_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> float:
    """How far confidence is from accuracy: sum_b |B_b| / N * |accuracy_b - confidence_b|, of `reliability_bins`."""
    found = reliability_bins(probabilities, outcomes, bins)
    return sum(b.pairs * abs(b.accuracy - b.confidence) for b in found) / len(probabilities)


def brier(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean squared difference between P(first beats second) and what happened (0 or 1)."""
    return float(np.mean((np.asarray(probabilities, dtype=np.float64) - np.asarray(outcomes)) ** 2))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rho: the correlation of the ranks, equal values sharing theirs. None if one of them is constant."""
    ranks = [_ranks(np.asarray(values)) for values in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def length_bias(preferred: np.ndarray, lengths: np.ndarray, pairs: np.ndarray) -> dict[str, float | None]:
    """Accuracy on pairs whose longer text is the better one, and on those where it is the worse one; None without such pairs.

    A model that likes long texts is good at the first and bad at the second.

    Args:
        preferred: 1 where the model is right, 0 where it is wrong, 1/2 for a tie, [n_pairs].
        lengths: of the examples, in tokens.
        pairs: [n_pairs, 2], winner first.
    """
    longer = lengths[pairs[:, 0]] - lengths[pairs[:, 1]]
    parts = {"accuracy_longer_wins": longer > 0, "accuracy_longer_loses": longer < 0}
    return {name: float(preferred[mask].mean()) if mask.any() else None for name, mask in parts.items()}


def draw_reliability(bins: list[Bin], path: Path) -> None:
    """The reliability diagram as a PNG: accuracy against confidence, dots as large as their bins are full.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingPackageError(f"{path.name} needs the package matplotlib. {remedy('plots')}") from None

    figure = Figure(figsize=(4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1)
    most = max(b.pairs for b in bins)
    axes.scatter(
        [b.confidence for b in bins], [b.accuracy for b in bins], s=[20 + 180 * b.pairs / most for b in bins], zorder=2
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0.48, 1.02), title="held-out pairs")
    figure.savefig(path, dpi=100)
