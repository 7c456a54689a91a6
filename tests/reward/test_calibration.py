"""What calibration measures: the known values of algorithms.md, section 8, and properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward.pairwise import pair_probabilities
from rlhf.reward.training.calibration import (
    brier,
    draw_reliability,
    expected_calibration_error,
    fit_temperature,
    length_bias,
    rank_correlation,
    reliability_bins,
)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.8, 0.0), (0.5, 0.3)])
@pytest.mark.parametrize("probability", [0.8, 0.2])
def test_ece_of_a_constant(probability: float, accuracy: float, expected: float):
    right = np.arange(10) < 10 * accuracy
    outcomes = right if probability > 0.5 else ~right
    assert expected_calibration_error(np.full(10, probability), outcomes) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_the_bins_hold_every_pair_once(judged: list[tuple[float, bool]]):
    p, won = np.array([p for p, _ in judged]), np.array([won for _, won in judged])
    bins = reliability_bins(p, won)
    assert sum(b.pairs for b in bins) == len(judged)
    assert sum(b.pairs * b.accuracy for b in bins) == pytest.approx(((p >= 0.5) == won).sum())
    assert sum(b.pairs * b.confidence for b in bins) == pytest.approx(np.maximum(p, 1 - p).sum())
    assert all(low.confidence < high.confidence for low, high in zip(bins, bins[1:], strict=False))


def test_the_diagram_is_a_picture(tmp_path: Path):
    draw_reliability(reliability_bins(np.array([0.6, 0.9, 0.2]), np.array([1, 1, 0])), tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_brier():
    assert brier(np.array([1.0, 0.5, 0.0]), np.array([1, 1, 1])) == pytest.approx((0 + 0.25 + 1) / 3)


def test_pair_probabilities_do_not_overflow():
    assert pair_probabilities(np.array([-1e6, 0.0, 1e6]), 0.1).tolist() == [0.0, 0.5, 1.0]


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=20_000) * 3
    won = rng.random(len(gaps)) < pair_probabilities(gaps, 2.0)
    assert fit_temperature(np.where(won, gaps, -gaps)) == pytest.approx(2.0, rel=0.05)


def test_temperature_is_recovered_from_probabilities():
    gaps = np.random.default_rng(0).normal(size=200)
    assert fit_temperature(gaps, pair_probabilities(gaps, 0.7)) == pytest.approx(0.7, rel=1e-3)


def test_temperature_of_a_few_right_pairs_is_not_certainty():
    """Eight equal gaps, all right: the likeliest P is Platt's (8 + 1) / (8 + 2)."""
    gaps = np.full(8, 2.0)
    assert pair_probabilities(gaps, fit_temperature(gaps))[0] == pytest.approx(0.9, abs=1e-4)


def test_rank_correlation_shares_ranks():
    """Against Pearson's r of ranks written out by hand."""
    assert rank_correlation([1, 2, 2, 9], [4, 3, 1, 0]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [4, 3, 2, 1])[0, 1]
    )
    assert rank_correlation([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_a_model_that_likes_length_is_seen():
    lengths = np.array([1, 5, 9, 3])
    pairs = np.array([[1, 0], [2, 3], [0, 2], [3, 1]])  # the longer text wins twice, and loses twice
    likes_length = (lengths[pairs[:, 0]] > lengths[pairs[:, 1]]).astype(float)
    assert length_bias(likes_length, lengths, pairs) == {"accuracy_longer_wins": 1, "accuracy_longer_loses": 0}
    assert length_bias(likes_length[:2], lengths, pairs[:2])["accuracy_longer_loses"] is None
