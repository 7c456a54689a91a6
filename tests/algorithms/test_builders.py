"""Builders: which responses become items, with which labels, and which prompts teach nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.builders import (
    Dropped,
    Pairs,
    against_opponent,
    all_pairs,
    best_of,
    best_vs_worst,
    dataset_pair,
    pairs_of,
    random_pair,
    source_pair,
    with_bonus,
    with_likelihood,
)
from rlhf.algorithms.labels import Labels, lead
from rlhf.types import Failed, Feedback, Invalid, Outcome, Rollout, Score, TimedOut, TrainingItem
from tests.algorithms.tabular import CYCLE, answered, judged_by

RNG = random.Random(0)
HARD, SOFT, SAMPLED = Labels("hard"), Labels("soft"), Labels("sampled")
DISTINCT = answered([[1], [2], [3], [4]])


def scores(outcomes: list[float | Outcome]) -> Feedback:
    """Numbers become scores."""
    return Feedback("p", tuple(Score(float(o)) if isinstance(o, int | float) else o for o in outcomes))


def distinct(n: int) -> Rollout:
    return answered([[action] for action in range(n)])


PAIR_BUILDERS = [best_vs_worst, random_pair, all_pairs]
any_builder = pytest.mark.parametrize("build", PAIR_BUILDERS, ids=lambda build: build.__name__)


def test_best_against_worst() -> None:
    (item,) = best_vs_worst(distinct(3), scores([3, 1, 2]), RNG, HARD)
    assert item == TrainingItem((0, 1), (1.0, -1.0), target=1.0, weight=1.0, term=0)


def test_the_best_alone() -> None:
    assert best_of(distinct(3), scores([1, 3, 3]), RNG, 0.0) == (TrainingItem((1,), (1.0,)),), "the first of equals"
    _, *pull = best_of(distinct(2), scores([3, 1]), RNG, 0.4)
    assert [(item.members, item.target, item.weight, item.term) for item in pull] == [
        ((i,), 0.5, 0.1, 1) for i in (0, 1)
    ]
    assert best_of(distinct(2), scores([Failed("x"), 3.0]), RNG, 0.0) == Dropped("too_few_scores")


@any_builder
def test_ties_and_identical_responses_are_dropped(build: Pairs) -> None:
    assert build(distinct(2), scores([1, 1]), RNG, HARD) == Dropped("tie")
    assert build(answered([[1], [1]]), scores([2, 1]), RNG, HARD) == Dropped("identical")


@any_builder
def test_failures_are_not_zero_rewards(build: Pairs) -> None:
    """The responses without a score would be the worst if they counted as zero."""
    (item,) = build(DISTINCT, scores([Failed("x"), 5.0, TimedOut(1.0), 3.0]), RNG, HARD)
    assert item.members == (1, 3)
    one_left = scores([Invalid("nan"), 5.0, Failed("x"), Failed("y")])
    assert build(DISTINCT, one_left, RNG, HARD) == Dropped("too_few_scores")


def test_a_comparison_without_a_verdict_is_no_tie() -> None:
    missing = CYCLE.copy()
    missing[0, 1] = missing[1, 0] = math.nan
    feedback = judged_by(missing, [0, 1, 2])
    assert lead(feedback, 0, 1) is None
    assert {item.members for item in all_pairs(distinct(3), feedback, RNG, HARD)} == {(2, 0), (1, 2)}
    assert all(random_pair(distinct(3), feedback, RNG, HARD)[0].members != (0, 1) for _ in range(50))
    ranked = replace(feedback, outcomes=(Score(0.9), Score(0.1), Score(0.5)))
    assert best_vs_worst(distinct(3), ranked, RNG, SOFT) == Dropped("too_few_scores")


def test_labels_from_scores() -> None:
    feedback = scores([1.5, 0.5])
    assert all_pairs(distinct(2), feedback, RNG, HARD)[0].target == 1.0
    assert all_pairs(distinct(2), feedback, RNG, Labels("hard", smoothing=0.1))[0].target == pytest.approx(0.9)
    soft = all_pairs(distinct(2), feedback, RNG, Labels("soft", temperature=2.0))[0].target
    assert soft == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_labels_from_judges() -> None:
    feedback = judged_by(CYCLE, [0, 2])  # 2 beats 0 with probability .8
    assert all_pairs(distinct(2), feedback, RNG, HARD)[0].members == (1, 0)
    (item,) = all_pairs(distinct(2), feedback, RNG, Labels("soft", temperature=9.0))
    assert (item.members, item.target) == ((1, 0), pytest.approx(0.8)), "no temperature on a probability"


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_sampled_labels_are_soft_in_expectation(p: float) -> None:
    feedback = judged_by(np.array([[0.5, p], [1 - p, 0.5]]), [0, 1])
    rng = random.Random(0)
    wins = [all_pairs(distinct(2), feedback, rng, SAMPLED)[0].members == (0, 1) for _ in range(4000)]
    assert np.mean(wins) == pytest.approx(p, abs=3.5 * math.sqrt(p * (1 - p) / 4000))
    rewards = [against_opponent(GAME, feedback, rng, SAMPLED, "opponent")[0].target for _ in range(4000)]
    assert np.mean(rewards) == pytest.approx(p - 0.5, abs=3.5 * math.sqrt(p * (1 - p) / 4000))


def test_a_tie_under_soft_labels_is_a_pair_without_preference() -> None:
    (item,) = random_pair(distinct(2), scores([1, 1]), RNG, SOFT)
    assert item.target == 0.5


def test_all_equal_has_no_best_and_no_worst_but_a_pair_that_holds_the_policy() -> None:
    """Hard labels have nothing to say of a tie; a target of 1/2 does: h should be 0, which regularises IPO and soft DPO."""
    assert best_vs_worst(distinct(3), scores([1, 1, 1]), RNG, HARD) == Dropped("tie")
    assert best_vs_worst(distinct(3), scores([1, 1, 1]), RNG, SOFT) == (TrainingItem((0, 1), (1.0, -1.0), 0.5),)
    assert best_vs_worst(answered([[1], [1], [2]]), scores([1, 1, 1]), RNG, SOFT)[0].members == (0, 2)
    assert best_vs_worst(answered([[1], [1]]), scores([1, 1]), RNG, SOFT) == Dropped("identical")
    rng = random.Random(0)
    wins = [best_vs_worst(distinct(2), scores([1, 1]), rng, SAMPLED)[0].members == (0, 1) for _ in range(1000)]
    assert np.mean(wins) == pytest.approx(0.5, abs=0.06)


def test_ranking_decides_hard_labels_and_the_comparison_soft_ones() -> None:
    """Action 0 wins most often on average, and loses against 2, which wins least."""
    matrix = np.array([[0.5, 0.9, 0.9, 0.4], [0.1, 0.5, 0.5, 0.9], [0.1, 0.5, 0.5, 0.9], [0.6, 0.1, 0.1, 0.5]])
    feedback = judged_by(matrix, [0, 1, 2, 3])
    assert best_vs_worst(distinct(4), feedback, RNG, HARD)[0].members == (0, 3)
    (item,) = best_vs_worst(distinct(4), feedback, RNG, SOFT)
    assert (item.members, item.target) == ((3, 0), pytest.approx(0.6))


# Any feedback a prompt can get: scores, some of them missing, on responses some of which are identical.
outcome = st.one_of(st.floats(-10, 10), st.just(Failed("x")), st.just(Invalid("y")))
prompts = st.lists(st.tuples(outcome, st.integers(0, 3)), min_size=2, max_size=6)
labels = st.sampled_from([HARD, SOFT, SAMPLED, Labels("hard", smoothing=0.2)])


@any_builder
@given(prompt=prompts, kind=labels, seed=st.integers(0, 5))
def test_what_holds_for_every_pair(build: Pairs, prompt: list, kind: Labels, seed: int) -> None:
    outcomes, actions = zip(*prompt, strict=True)
    rollout, feedback = answered([[a] for a in actions]), scores(list(outcomes))
    built = build(rollout, feedback, random.Random(seed), kind)
    assert build(rollout, feedback, random.Random(seed), kind) == built, "the same draw gives the same items"
    if isinstance(built, Dropped):
        return
    assert sum(item.weight for item in built) == pytest.approx(1.0)
    for item in built:
        chosen, rejected = item.members
        assert actions[chosen] != actions[rejected]
        assert item.coefficients == (1.0, -1.0)
        assert item.target >= 0.5
        ahead = lead(feedback, chosen, rejected)
        assert ahead is not None
        if kind.kind == "hard":
            assert ahead > 0
        if kind.kind == "soft":
            assert ahead >= 0 and item.target == pytest.approx(1 / (1 + math.exp(-ahead)))


@given(prompt=prompts, order=st.permutations(range(6)))
def test_the_order_of_responses_changes_nothing(prompt: list, order: list[int]) -> None:
    """Permuting the K responses permutes the members (up to responses that are exactly tied for best or worst)."""
    order = [place for place in order if place < len(prompt)]
    shuffled = [prompt[place] for place in order]

    def members(rows: list, build: Pairs, names: list[int]) -> object:
        outcomes, actions = zip(*rows, strict=True)
        built = build(answered([[a] for a in actions]), scores(list(outcomes)), RNG, HARD)
        return None if isinstance(built, Dropped) else {tuple(names[m] for m in item.members) for item in built}

    assert members(prompt, all_pairs, list(range(len(prompt)))) == members(shuffled, all_pairs, order)
    rewards = [outcome for outcome, _ in prompt if not isinstance(outcome, Failed | Invalid)]
    if len(set(rewards)) == len(rewards):
        assert members(prompt, best_vs_worst, list(range(len(prompt)))) == members(shuffled, best_vs_worst, order)


def test_random_pairs_reach_every_pair() -> None:
    rng = random.Random(1)
    pairs = {random_pair(DISTINCT, scores([4, 3, 2, 1]), rng, HARD)[0].members for _ in range(200)}
    assert pairs == set(combinations(range(4), 2))


def test_all_pairs_share_the_prompts_weight() -> None:
    built = all_pairs(answered([[1], [2], [2], [3]]), scores([4, 3, 2, 3]), RNG, HARD)
    assert {item.members for item in built} == {(0, 1), (0, 2), (0, 3), (3, 2)}, "1, 2 identical; 1, 3 a tie"
    assert {item.weight for item in built} == {0.25}


def test_the_configurations_names_lead_to_the_builders() -> None:
    for pairing, build in [("best_vs_worst", best_vs_worst), ("random", random_pair), ("all", all_pairs)]:
        made = pairs_of(pairing, SOFT)
        assert (made.func, made.keywords) == (build, {"labels": SOFT})


# Several sources

GAME = answered([[1], [2]], ["policy", "opponent"])
EXPLORING = answered([[1], [2], [3]], ["y_gen", "chosen", "rejected"])


def test_a_pair_of_two_sources_is_ordered_by_the_feedback() -> None:
    build = partial(source_pair, labels=HARD, sources=("policy", "reference"))
    rollout = answered([[1], [2]], ["policy", "reference"])
    assert build(rollout, scores([1, 2]), RNG)[0].members == (1, 0)
    assert build(rollout, scores([2, 1]), RNG)[0].members == (0, 1)
    assert build(rollout, scores([2, Failed("x")]), RNG) == Dropped("too_few_scores")
    assert build(answered([[1], [1]], ["policy", "reference"]), scores([2, 1]), RNG) == Dropped("identical")


def test_the_data_sets_pair_needs_no_verdict() -> None:
    silent = scores([Invalid("not judged")] * 3)
    assert dataset_pair(EXPLORING, silent, RNG, 0.1) == (TrainingItem((1, 2), (1.0, -1.0), 0.9),)
    same = answered([[2], [2]], ["chosen", "rejected"])
    assert dataset_pair(same, silent, RNG, 0.0) == Dropped("identical")


@pytest.mark.parametrize(
    ("rewards", "pair"),
    [([3, 2, 1], (0, 2)), ([0, 2, 1], (1, 0)), ([2, 3, 1], (1, 2))],
    ids=["chosen", "rejected", "neither"],
)
def test_the_bonus_falls_on_its_source_wherever_that_ended_up(rewards: list[float], pair: tuple[int, int]) -> None:
    built = with_bonus(EXPLORING, scores(rewards), RNG, partial(best_vs_worst, labels=HARD), "y_gen")
    assert built == (TrainingItem(pair, (1.0, -1.0)), TrainingItem((0,), (1.0,), term=1))


def test_the_bonus_needs_no_verdict_of_its_own_but_a_pair() -> None:
    build = partial(with_bonus, pairs=partial(best_vs_worst, labels=HARD), source="y_gen")
    pair, bonus = build(EXPLORING, scores([Failed("x"), 1, 2]), RNG)
    assert (pair.members, bonus.members) == ((2, 1), (0,))
    assert build(EXPLORING, scores([1, 1, 1]), RNG) == Dropped("tie")
    assert build(EXPLORING, scores([1, Failed("x"), Failed("x")]), RNG) == Dropped("too_few_scores")


def test_every_pair_brings_the_likelihood_of_its_chosen_response() -> None:
    built = with_likelihood(distinct(3), scores([1, 3, 2]), RNG, partial(all_pairs, labels=HARD))
    pairs, likelihoods = built[:3], built[3:]
    assert [item.members[0] for item in pairs] == [item.members[0] for item in likelihoods] == [1, 2, 1]
    assert {(item.weight, item.term, item.coefficients) for item in likelihoods} == {(1 / 3, 1, (1.0,))}
    dropped = with_likelihood(distinct(2), scores([1, 1]), RNG, partial(all_pairs, labels=HARD))
    assert dropped == Dropped("tie")


@pytest.mark.parametrize(("kind", "reward"), [(HARD, -0.5), (SOFT, 1 / (1 + math.exp(1)) - 0.5)])
def test_against_an_opponent_only_the_policys_response_learns(kind: Labels, reward: float) -> None:
    (item,) = against_opponent(GAME, scores([1, 2]), RNG, kind, "opponent")
    assert (item.members, item.coefficients, item.target) == ((0,), (1.0,), pytest.approx(reward))


@pytest.mark.parametrize("kind", [HARD, SOFT])
def test_ties_and_identical_responses_stay_in_the_game_with_no_reward(kind: Labels) -> None:
    tie = against_opponent(GAME, scores([1, 1]), RNG, kind, "opponent")
    identical = answered([[1], [1]], ["policy", "opponent"])
    assert (
        tie == against_opponent(identical, scores([5, 1]), RNG, kind, "opponent") == (TrainingItem((0,), (1.0,), 0.0),)
    )
    assert against_opponent(GAME, scores([1, TimedOut(1.0)]), RNG, kind, "opponent") == Dropped("too_few_scores")
