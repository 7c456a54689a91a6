"""The known values of algorithms.md, section 8, and what calibration measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.reward.losses import (
    bradley_terry,
    brier,
    expected_calibration_error,
    fit_temperature,
    pair_probabilities,
)

ONE, ZERO = torch.tensor([1.0]), torch.tensor([0.0])


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 0.313262), ({"margin": 0.5}, 0.474077), ({"centring": 0.01}, 0.323262)]
)
def test_bradley_terry(options: dict, expected: float):
    assert bradley_terry(ONE, ZERO, **options).item() == pytest.approx(expected, abs=1e-6)


def test_bradley_terry_at_equal_rewards_is_log_2():
    assert bradley_terry(ZERO, ZERO).item() == pytest.approx(np.log(2))


def test_bradley_terry_pushes_the_right_way():
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    bradley_terry(chosen, rejected).backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


@pytest.mark.parametrize(("accuracy", "expected"), [(0.8, 0.0), (0.5, 0.3)])
@pytest.mark.parametrize("probability", [0.8, 0.2])
def test_ece_of_a_constant(probability: float, accuracy: float, expected: float):
    right = np.arange(10) < 10 * accuracy
    outcomes = right if probability > 0.5 else ~right
    assert expected_calibration_error(np.full(10, probability), outcomes) == pytest.approx(expected)


def test_brier():
    assert brier(np.array([1.0, 0.5, 0.0]), np.array([1, 1, 1])) == pytest.approx((0 + 0.25 + 1) / 3)


def test_pair_probabilities_do_not_overflow():
    assert pair_probabilities(np.array([-1e6, 0.0, 1e6]), 0.1).tolist() == [0.0, 0.5, 1.0]


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=20_000) * 3
    won = rng.random(len(gaps)) < pair_probabilities(gaps, 2.0)
    assert fit_temperature(np.where(won, gaps, -gaps)) == pytest.approx(2.0, rel=0.05)
