"""Calling a builder that may be the user's, and telling items that have no gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf.algorithms import Algorithm, Contrast, PolicyGradient, Preference, Source
from rlhf.algorithms.advantages import advantages, whiten
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.building import build, teaches
from rlhf.algorithms.policy_gradient import aggregate, normaliser, policy_loss
from rlhf.types import TrainingItem
from tests.helpers import make_feedback, make_rollout

ROLLOUT, FEEDBACK, RNG = make_rollout([[1], [2, 3]]), make_feedback([0.0, 1.0]), random.Random(0)
PAIR = TrainingItem((1, 0), (1.0, -1.0))


def built(builder: Any) -> Any:
    algorithm = Algorithm("own", (Source("policy", 2),), builder, Preference((Contrast(), Contrast("linear"))))
    return build(algorithm, ROLLOUT, FEEDBACK, RNG)


def misspelt(rollout: Any, feedback: Any, rng: Any) -> Any:
    return {}["anwser"]


def quits(rollout: Any, feedback: Any, rng: Any) -> Any:
    raise SystemExit(3)


@pytest.mark.parametrize(("builder", "words"), [(misspelt, "KeyError: 'anwser' ("), (quits, "SystemExit: 3 (")])
def test_what_a_builder_raises_drops_the_prompt_and_tells_the_line(builder: Any, words: str) -> None:
    dropped = built(builder)
    assert dropped.reason == "build_failed" and dropped.detail.startswith(words)
    assert "tests/algorithms/test_building.py:" in dropped.detail and f"in {builder.__name__}: " in dropped.detail


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "returned None, which is neither"),
        ([PAIR], "neither a tuple of TrainingItem nor Dropped"),
        ((PAIR, 1), "neither a tuple"),
        ((), "no items"),
        ((replace(PAIR, weight=0.0),), "every item has the weight 0"),
        ((replace(PAIR, members=(2, 0)),), "not among the 2 responses"),
        ((replace(PAIR, members=(-1, 0)),), "not among the 2 responses"),
        ((replace(PAIR, members=()),), "not among the 2 responses"),
        ((replace(PAIR, coefficients=(1.0,)),), "not one coefficient per member"),
        ((replace(PAIR, term=2),), "a term that the objective does not have (it has 2)"),
        ((replace(PAIR, target=float("nan")),), "a number that is not finite"),
        ((replace(PAIR, weight=float("inf")),), "a number that is not finite"),
    ],
)
def test_what_cannot_be_learned_from_is_told(value: Any, words: str) -> None:
    dropped = built(lambda *_: value)
    assert dropped.reason == "build_failed" and words in dropped.detail


def test_what_can_is_passed_on() -> None:
    assert built(lambda *_: (PAIR, replace(PAIR, term=1))) == (PAIR, replace(PAIR, term=1))
    assert built(lambda *_: Dropped("a reason of mine")) == Dropped("a reason of mine")


PLAIN = PolicyGradient(baseline="mean")
OBJECTIVES = [
    PLAIN,
    replace(PLAIN, baseline="mean_std"),
    replace(PLAIN, baseline="leave_one_out"),
    replace(PLAIN, baseline="none"),
    replace(PLAIN, whiten=True),
    replace(PLAIN, entropy_coef=0.1),
    replace(PLAIN, kl_placement="loss", kl_estimator="k3", kl_coef=0.1),
    replace(PLAIN, kl_placement="loss", kl_estimator="k3", kl_coef=0.0),
    replace(PLAIN, kl_placement="reward", kl_coef=0.1),
    replace(PLAIN, reward_clip=1.0),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: f"{one.baseline}-{one.kl_placement}-{one.kl_coef}")
@pytest.mark.parametrize("rewards", [(0.7, 0.7, 0.7), (0.7, 0.7, 0.2), (3.0, 4.0, 5.0)], ids=str)
def test_items_teach_exactly_if_they_have_a_gradient(objective: PolicyGradient, rewards: tuple[float, ...]) -> None:
    """The gradient of the loss itself, of this group beside another one with other rewards (which whitening brings in)."""
    items = tuple(TrainingItem((i,), (1.0,), target=reward) for i, reward in enumerate(rewards))
    assert teaches(objective, items) == (group_gradient(objective, rewards) > 1e-9)


def group_gradient(objective: PolicyGradient, rewards: tuple[float, ...]) -> float:
    """Largest gradient on the log-probs of a group of three responses of two tokens each; a second group learns beside it."""
    torch.manual_seed(0)
    response, group = torch.arange(6).repeat_interleave(2), torch.arange(2).repeat_interleave(3)
    old = -torch.rand(12, dtype=torch.float64)
    reference = old - torch.rand(12, dtype=torch.float64)
    logprobs = old.clone().requires_grad_()
    both = torch.tensor([*rewards, 0.9, 0.1, 0.1], dtype=torch.float64)
    estimate = advantages(
        objective, both, response, group, kl_coef=objective.kl_coef, logratio=old - reference
    ).advantages
    if objective.whiten:  # over groups of several lengths, whose advantages do not add up to 0
        (estimate,) = whiten([estimate + torch.tensor([0.0] * 6 + [0.3] * 6)], lambda sums: sums)
    loss = policy_loss(
        objective,
        logprobs,
        old,
        estimate,
        response,
        kl_coef=objective.kl_coef,
        reference=reference,
        entropy=-logprobs.exp() * logprobs,
    ).loss
    (aggregate(objective, loss, response) / normaliser(objective, n_responses=6, n_tokens=12)).backward()
    return float(logprobs.grad[:6].abs().max())


def test_pairs_always_teach() -> None:
    assert teaches(Preference((Contrast(),)), (PAIR,))
