"""Transforms of scores against known values (algorithms.md, section 8), and what must hold for any scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf.config.transforms import Calibrate, Clip, LengthPenalty, LogSigmoid, MissingEos, Normalise, Overlong
from rlhf.reward.transforms import (
    Moments,
    Scored,
    before_reference,
    clip,
    log_sigmoid,
    phi,
    quantile,
    rank,
    stateless,
)

numbers = st.floats(-1e3, 1e3)
many = st.lists(numbers, min_size=1, max_size=30)


def test_log_sigmoid_has_its_known_values() -> None:
    assert log_sigmoid(1.0, 0.5) == pytest.approx(-0.474077, abs=1e-6)
    assert log_sigmoid(3.0, 3.0) == pytest.approx(-math.log(2))
    assert log_sigmoid(-1000.0, 0.0) == pytest.approx(-1000.0), "no overflow far below"
    assert log_sigmoid(1000.0, 0.0) == pytest.approx(0.0)


def test_the_sum_of_log_sigmoids_is_a_soft_and() -> None:
    """log of the product of the two probabilities."""
    both = log_sigmoid(1.0, 0.5) + log_sigmoid(0.2, 0.4)
    assert math.exp(both) == pytest.approx(1 / (1 + math.exp(-0.5)) / (1 + math.exp(0.2)))


def test_the_rank_counts_ties_half() -> None:
    assert rank(2.0, [1.0, 2.0, 3.0, 4.0]) == pytest.approx((1 + 0.5) / 4)
    assert rank(0.0, [1.0, 2.0]) == 0.0
    assert rank(9.0, [1.0, 2.0]) == 1.0
    assert rank(5.0, [5.0, 5.0, 5.0]) == 0.5


@given(many)
def test_the_mean_rank_of_the_references_own_scores_is_one_half(scores: list[float]) -> None:
    assert np.mean([rank(score, scores) for score in scores]) == pytest.approx(0.5)


@given(many, numbers, numbers)
def test_a_better_score_never_ranks_lower(scores: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert rank(low, scores) <= rank(high, scores)


@given(many, numbers)
def test_the_rank_knows_the_order_alone(scores: list[float], score: float) -> None:
    assert rank(2 * score, [2 * other for other in scores]) == rank(score, scores)  # exact: no rounding


def test_phi_has_its_known_values() -> None:
    assert phi(0.3, "identity", 10.0) == 0.3
    assert phi(0.5, "best_of_n", 10.0) == pytest.approx((math.exp(5) - 1) / (math.exp(10) - 1))
    assert phi(0.5, "worst_of_n", 10.0) == pytest.approx((1 - math.exp(-5)) / (1 - math.exp(-10)))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 100))
def test_phi_rises_from_0_to_1_and_the_two_mirror_each_other(u: float, v: float, t: float) -> None:
    for kind in ("best_of_n", "worst_of_n"):
        assert phi(0.0, kind, t) == 0.0
        assert phi(1.0, kind, t) == pytest.approx(1.0)
        low, high = sorted((u, v))
        assert phi(low, kind, t) <= phi(high, kind, t)
    assert phi(u, "worst_of_n", t) == pytest.approx(1 - phi(1 - u, "best_of_n", t), abs=1e-9)


def test_phi_is_the_papers_up_to_a_factor_and_a_constant() -> None:
    t, u = 10.0, np.linspace(0, 1, 5)
    for kind, papers in (("best_of_n", np.exp(t * u)), ("worst_of_n", -np.exp(-t * u))):
        ours = np.array([phi(value, kind, t) for value in u])
        assert ours == pytest.approx((papers - papers[0]) / (papers[-1] - papers[0]))


@given(numbers, numbers, numbers)
def test_clip(score: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert low <= clip(score, low, high) <= high
    assert clip(score, None, None) == score
    assert clip(score, low, None) == max(score, low)


def test_each_transform_of_one_response() -> None:
    response = Scored(2.0, n_tokens=30, cut=True)
    references = [0.0, 1.0, 2.0, 5.0]
    for transform, value in (
        (Clip(name="clip", high=1.5), 1.5),
        (LengthPenalty(name="length_penalty", per_token=0.1), -1.0),
        (MissingEos(name="missing_eos", penalty=3.0), -1.0),
        (LogSigmoid(name="log_sigmoid", quantile=0.5), -math.log1p(math.exp(-0.5))),  # the median is 1.5
        (Calibrate(name="calibrate"), (2 + 0.5) / 4),
    ):
        assert stateless(transform, response, references) == pytest.approx(value), transform.name
    soft = Overlong(name="overlong", buffer=20, penalty=2.0)
    for n_tokens, value in ((70, 2.0), (80, 2.0), (85, 1.5), (100, 0.0)):  # DAPO, equation 13, with 100 tokens at most
        assert stateless(soft, Scored(2.0, n_tokens=n_tokens, limit=100), ()) == value
    whole = Scored(2.0, n_tokens=30)
    assert stateless(MissingEos(name="missing_eos", penalty=3.0), whole, ()) == 2.0
    with pytest.raises(TypeError, match="state"):
        stateless(Normalise(name="normalise"), response, ())


def test_quantiles_are_interpolated() -> None:
    assert quantile([0.0, 10.0], 0.85) == pytest.approx(8.5)
    assert quantile([3.0], 0.2) == 3.0


def test_references_go_through_what_stands_before() -> None:
    chain = [
        LengthPenalty(name="length_penalty", per_token=1.0),
        Calibrate(name="calibrate"),
        Clip(name="clip", low=9.0),
    ]
    assert before_reference(chain, [Scored(5.0, 2), Scored(5.0, 4)]) == [3.0, 1.0]


@given(st.lists(many, min_size=1, max_size=5))
def test_moments_of_batches_are_those_of_all_together(batches: list[list[float]]) -> None:
    moments = Moments()
    for batch in batches:
        moments = moments.including(batch)
    everything = np.concatenate(batches)
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert moments.std == pytest.approx(everything.std(), abs=1e-6)


@given(many)
def test_normalised_scores_have_mean_0_and_deviation_1(scores: list[float]) -> None:
    assume(np.std(scores) > 1e-3)
    moments = Moments().including(scores)
    normalised = np.array([moments.normalised(score) for score in scores])
    assert normalised.mean() == pytest.approx(0, abs=1e-6)
    assert normalised.std() == pytest.approx(1, abs=1e-6)


def test_equal_scores_are_normalised_to_0() -> None:
    assert Moments().including([2.0, 2.0]).normalised(2.0) == 0.0
    assert Moments().including([]) == Moments()
