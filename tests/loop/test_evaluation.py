"""Held-out figures, with and without rewards."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from rlhf.cluster import LocalRef
from rlhf.commands.evaluate import evaluate
from rlhf.config import Settings, UserError
from rlhf.loop.evaluation import held_out_metrics, response_rows
from rlhf.loop.judged import JudgedRollout, rollout_metrics
from rlhf.tracking.report import HeldOut
from rlhf.types import DATASET_VERSION, Completion, Feedback, Prompt, Rollout, Score, Span


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


class Letters:
    """Token ids are letters."""

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        return "".join(chr(97 + number) for number in ids)


def test_the_record_names_the_oldest_weights_of_a_response_and_leaves_the_data_sets_responses_out_of_means() -> None:
    """A response that two versions wrote around a tool's turn; one of the data set; one that is only read."""
    tool = Span(1, 3, DATASET_VERSION, by_policy=False, learned=False)
    made = [
        Completion(
            "p",
            np.arange(4, dtype=np.int32),
            -np.arange(4, dtype=np.float32),
            (Span(0, 1, 3), tool, Span(3, 4, 4)),
            "stop",
        ),
        Completion.of_one_version(
            "p", np.arange(2, dtype=np.int32), np.full(2, np.nan, np.float32), DATASET_VERSION, "stop"
        ),
        Completion(
            "p", np.arange(2, dtype=np.int32), np.zeros(2, np.float32), (Span(0, 2, 4, learned=False),), "length"
        ),
    ]
    rollout = Rollout(Prompt("p", (1,), "text"), tuple(one.info() for one in made), LocalRef(made))
    judged = JudgedRollout(rollout, Feedback("p", (Score(1.0), Score(2.0), Score(3.0))))
    rows = response_rows(judged, Letters())
    assert [row["weight_version"] for row in rows] == [3, DATASET_VERSION, 4]
    assert [(row["response"], row["length"]) for row in rows] == [("abcd", 4), ("ab", 2), ("ab", 2)]
    metrics = rollout_metrics([judged])
    assert (metrics["rollout/responses"], metrics["rollout/tokens"]) == (2.0, 6.0)
    assert metrics["rollout/logprob"] == -1.5, "the mean of two learned tokens; a response without any has none"
