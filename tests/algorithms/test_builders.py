"""Builders: which responses become a pair, and which prompts teach nothing."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.builders import Dropped, Labels, best_vs_worst, random_pair
from rlhf.types import Failed, Invalid, TimedOut
from tests.helpers import make_feedback, make_rollout

RNG = random.Random(0)
DISTINCT = make_rollout([[1], [2], [3], [4]])


def test_best_against_worst() -> None:
    (item,) = best_vs_worst(make_rollout([[1], [2], [3]]), make_feedback([3, 1, 2]), RNG, Labels())
    assert (item.members, item.coefficients, item.target, item.weight) == ((0, 1), (1.0, -1.0), 1.0, 1.0)


def test_ties_and_identical_responses_are_dropped() -> None:
    assert best_vs_worst(make_rollout([[1], [2]]), make_feedback([1, 1]), RNG, Labels()) == Dropped("tie")
    assert best_vs_worst(make_rollout([[1], [1]]), make_feedback([2, 1]), RNG, Labels()) == Dropped("identical")
    assert random_pair(make_rollout([[1], [2]]), make_feedback([1, 1]), RNG, Labels()) == Dropped("tie")
    assert random_pair(make_rollout([[1], [1]]), make_feedback([2, 1]), RNG, Labels()) == Dropped("identical")


def test_failures_are_not_zero_rewards() -> None:
    """The responses without a score would be the worst if they counted as zero."""
    feedback = make_feedback([Failed("x"), 5.0, TimedOut(1.0), 3.0])
    (item,) = best_vs_worst(DISTINCT, feedback, RNG, Labels())
    assert item.members == (1, 3)
    one_left = make_feedback([Invalid("nan"), 5.0, Failed("x"), Failed("y")])
    assert best_vs_worst(DISTINCT, one_left, RNG, Labels()) == Dropped("too_few_scores")
    assert random_pair(DISTINCT, one_left, RNG, Labels()) == Dropped("too_few_scores")


def test_labels() -> None:
    assert Labels().target(0.3) == 1.0
    assert Labels(smoothing=0.1).target(0.3) == pytest.approx(0.9)
    assert Labels(soft=True, temperature=2.0).target(1.0) == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_a_tie_under_soft_labels_is_a_pair_without_preference() -> None:
    (item,) = random_pair(make_rollout([[1], [2]]), make_feedback([1, 1]), RNG, Labels(soft=True))
    assert item.target == 0.5


@given(rewards=st.lists(st.floats(-10, 10), min_size=2, max_size=8), seed=st.integers(0, 100))
def test_the_chosen_response_never_has_the_lower_reward(rewards: list[float], seed: int) -> None:
    rollout = make_rollout([[i + 1] for i in range(len(rewards))])
    for build in (best_vs_worst, random_pair):
        built = build(rollout, make_feedback(rewards), random.Random(seed), Labels())
        if not isinstance(built, Dropped):
            chosen, rejected = built[0].members
            assert rewards[chosen] > rewards[rejected]
        else:
            assert built.reason == "tie"


def test_random_pairs_reach_every_pair() -> None:
    rng = random.Random(1)
    pairs = {random_pair(DISTINCT, make_feedback([4, 3, 2, 1]), rng, Labels())[0].members for _ in range(200)}
    assert len(pairs) == 6
