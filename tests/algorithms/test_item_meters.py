"""What a preference learner reports of its pairs, against numbers worked out by hand; any split gives the same means."""

from __future__ import annotations

import pytest
import torch

from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.policy.meters import Meters, item_meters, means, merge
from rlhf.training.packing import idle
from rlhf.types import Assignment, TrainingItem
from tests.algorithms.tabular import answered, packed

# Two prompts: responses of 2 and 3 tokens, then of 1 and 1; the second prompt's bonus is on its rejected response.
FIRST = Assignment(answered([[1, 2], [3, 4, 5]]), (TrainingItem((0, 1), (1.0, -1.0)),))
SECOND = Assignment(answered([[1], [2]]), (TrainingItem((0, 1), (1.0, -1.0)), TrainingItem((1,), (1.0,), term=1)))
POLICY = torch.tensor([-1.0, -1.0, -2.0, -1.0, -1.0, -3.0, -1.0], dtype=torch.float64)
ANCHOR = torch.tensor([-1.5, -1.5, -1.0, -1.0, -1.0, -2.0, -4.0], dtype=torch.float64)
# U: first pair +1 and -1; second pair -1 and +3.
SELM = Preference((Contrast(scale=0.5), Contrast("linear", scale=0.1)))
EXPECTED = {
    "policy/accuracy": 0.5,
    "policy/reference_accuracy": 0.5,  # -3 against -3, and -2 against -4
    "policy/margin": 0.5 * (2 - 4) / 2,
    "policy/chosen_reward": 0.0,
    "policy/rejected_reward": 0.5 * (-1 + 3) / 2,
    "policy/chosen_rose": 0.5,
    "policy/chosen_logprob": (-2 - 3) / 3,
    "policy/rejected_logprob": (-4 - 1) / 4,
    "policy/bonus": 3.0,
}


def test_meters_of_pairs_and_bonus() -> None:
    meters = item_meters(SELM, packed([FIRST, SECOND]), POLICY, ANCHOR)
    assert means(meters) == pytest.approx(EXPECTED)


def test_any_split_gives_the_same_means_and_an_idle_rank_adds_nothing() -> None:
    nothing = torch.zeros(1)
    parts: list[Meters] = [
        item_meters(SELM, packed([FIRST]), POLICY[:5], ANCHOR[:5]),
        item_meters(SELM, packed([SECOND]), POLICY[5:], ANCHOR[5:]),
        item_meters(SELM, idle(torch.device("cpu")), nothing, nothing),
    ]
    assert means(merge(parts)) == pytest.approx(EXPECTED)


def test_a_chosen_response_alone_is_no_pair() -> None:
    raft = Preference((Contrast("linear", scale=-1.0, anchored=False),))
    alone = [
        Assignment(one.rollout, (TrainingItem(item.members[:1], (1.0,)),))
        for one, item in ((FIRST, FIRST.items[0]), (SECOND, SECOND.items[0]))
    ]
    members = torch.tensor([0, 1, 5])  # tokens of the first response of each
    meters = means(item_meters(raft, packed(alone), POLICY[members], ANCHOR[members]))
    assert meters == {
        "policy/chosen_reward": pytest.approx((2 + 3) / 2),
        "policy/chosen_rose": 0.5,
        "policy/chosen_logprob": pytest.approx(-5 / 3),
    }


def test_without_an_anchor_rewards_are_log_probs() -> None:
    slic = Preference((Contrast("hinge", anchored=False), Contrast("linear", scale=-0.1, anchored=False)))
    meters = means(item_meters(slic, packed([FIRST, SECOND]), POLICY, ANCHOR))
    assert meters["policy/chosen_reward"] == pytest.approx((-2 - 3) / 2)
    assert meters["policy/bonus"] == pytest.approx(-1)
    assert meters["policy/chosen_rose"] == 0.5, "still against the reference"
