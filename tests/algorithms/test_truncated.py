"""`mask_truncated`: what was cut is not learned from, and everything else is as it was."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf.algorithms import make
from rlhf.algorithms.builders import Dropped
from rlhf.config.algorithm import METHODS
from rlhf.types import Assignment, Invalid, Rollout, TrainingItem
from tests.algorithms.tabular import answered, judged_by, scored_by, settings_of

RNG = random.Random(0)


def cut(*places: int, sources: list[str] | None = None, n: int = 4) -> Rollout:
    """Different responses, of which these were cut."""
    rollout = answered([[i] * (i + 1) for i in range(n)], sources)
    infos = [replace(one, finish_reason="length" if i in places else "stop") for i, one in enumerate(rollout.infos)]
    return replace(rollout, infos=tuple(infos))


def masked(name: str, **fields: Any) -> Any:
    return make(settings_of(name, mask_truncated=True, **fields)).build


def test_a_cut_response_is_in_no_pair() -> None:
    build, scores = masked("online_dpo", samples_per_prompt=4), scored_by([3, 2, 1, 0], range(4))
    assert build(cut(), scores, RNG)[0].members == (0, 3)
    assert build(cut(0), scores, RNG)[0].members == (1, 3)
    assert build(cut(0, 1, 2), scores, RNG) == Dropped("truncated")
    assert build(cut(0, 1, 2, 3), scores, RNG) == Dropped("truncated")
    assert build(cut(), scored_by([1] * 4, range(4)), RNG) == Dropped("tie"), "other reasons stay"


def test_a_cut_response_is_in_no_comparison() -> None:
    matrix = np.array([[0.5, 0.9, 0.9], [0.1, 0.5, 0.8], [0.1, 0.2, 0.5]])
    build = masked("online_ipo", samples_per_prompt=3, pairing="all")
    (item,) = build(cut(0, n=3), judged_by(matrix, [0, 1, 2]), RNG)
    assert (item.members, item.target, item.weight) == ((1, 2), 0.8, 1.0)


def test_no_bonus_falls_on_a_cut_response() -> None:
    """SELM's y_gen needs no verdict for its bonus, but an end."""
    rollout = cut(0, sources=["y_gen", "chosen", "rejected"], n=3)
    assert [item.term for item in masked("selm")(rollout, scored_by([0, 1, 2], range(3)), RNG)] == [0]


def test_a_cut_response_keeps_its_reward_in_the_baseline_and_leaves_the_means() -> None:
    rollout = cut(1)
    items = masked("grpo")(rollout, scored_by([3, 2, 1, 0], range(4)), RNG)
    assert [(item.target, item.weight) for item in items] == [(3, 1), (2, 0), (1, 1), (0, 1)]
    assignment = Assignment(rollout, items)
    assert (assignment.members(), assignment.learned()) == ((0, 1, 2, 3), (0, 2, 3))
    assert masked("grpo")(cut(0, 1, 2, 3), scored_by([3, 2, 1, 0], range(4)), RNG) == Dropped("truncated")


def test_a_missing_verdict_is_not_blamed_on_the_cut() -> None:
    """A group keeps the rewards of cut responses, so that too few are never their doing."""
    scores = scored_by([1, 0, 0, 0], range(4))
    alone = replace(scores, outcomes=(scores.outcomes[0], *[Invalid("no number")] * 3))
    assert masked("grpo")(cut(1), alone, RNG) == Dropped("too_few_scores")


def test_an_opponent_may_be_cut() -> None:
    sources = ["policy", "opponent"]
    build, scores = masked("nash_md"), scored_by([1, 0], range(2))
    assert isinstance(build(cut(1, sources=sources, n=2), scores, RNG)[0], TrainingItem)
    assert build(cut(0, sources=sources, n=2), scores, RNG) == Dropped("truncated")


@pytest.mark.parametrize("name", METHODS)
def test_it_changes_nothing_where_all_responses_ended(name: str) -> None:
    algorithm = make(settings_of(name))
    names = [source.name for source in algorithm.sources for _ in range(source.n)]
    names += ["chosen", "rejected"] * algorithm.dataset_pairs
    rollout, scores = cut(sources=names, n=len(names)), scored_by([1, 0, 3, 2, 5, 4, 7, 6], range(len(names)))
    assert masked(name)(rollout, scores, random.Random(1)) == algorithm.build(rollout, scores, random.Random(1))
