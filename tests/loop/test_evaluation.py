"""Held-out figures, with and without rewards."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from rlhf.commands.evaluate import evaluate
from rlhf.config import Settings, UserError
from rlhf.loop.evaluation import held_out_metrics
from rlhf.tracking.report import HeldOut


def answers(*rewards: float) -> HeldOut:
    n = len(rewards)
    return HeldOut(prompts=["p"] * n, responses=["r"] * n, rewards=list(rewards), lengths=list(range(1, n + 1)))


def test_means_leave_out_what_was_not_judged() -> None:
    assert held_out_metrics(answers(1.0, math.nan, 2.0)) == {"reward/mean": 1.5, "rollout/length": 2.0}


def test_without_any_reward_there_is_none_to_report() -> None:
    assert held_out_metrics(answers(math.nan, math.nan)) == {"rollout/length": 1.5}


def test_a_pairwise_judge_cannot_score_lone_answers(tiny_settings: Callable[..., Settings]) -> None:
    settings = tiny_settings(data={"eval_prompts": "p.jsonl"}, reward={"kind": "pairwise_function", "path": "m:f"})
    with pytest.raises(UserError, match=r"reward\.kind.*Name one that scores"):
        evaluate(settings, "export", None, None)
