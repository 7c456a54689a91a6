"""The direct methods reach optima that are known without them, in a world of two or three actions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from rlhf.algorithms.anchors import Fixed, Previous
from rlhf.algorithms.contrast import preference_loss
from rlhf.types import Assignment
from tests.algorithms.tabular import REFERENCE, World, answered, declared, packed, scored_by

REWARDS = [1.0, 0.2, -0.5]
R = torch.tensor(REWARDS, dtype=torch.float64)
LIKELY_FIRST = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
LIKELY_SECOND = torch.tensor([0.4, 0.6], dtype=torch.float64).log()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def root(falls_through: Callable[[float], float]) -> float:
    """Where a function crosses 0, by bisection of [-60, 60]."""
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        if (falls_through(middle) > 0) == (falls_through(low) > 0):
            low = middle
        else:
            high = middle
    return low


def log_ratio(policy: torch.Tensor, reference: torch.Tensor) -> float:
    """h = U(first) - U(second)."""
    return ((policy - reference)[0] - (policy - reference)[1]).item()


# DPO


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("pairing", ["random", "all"])
def test_online_dpo_with_soft_labels_reaches_the_regularised_optimum(pairing: str, beta: float) -> None:
    """With p = s(r_i - r_j) the loss is least where beta h = r_i - r_j: pi* is proportional to ref exp(r / beta)."""
    world = World(declared("online_dpo", beta=beta, labels="soft", pairing=pairing), REWARDS)
    optimum = (REFERENCE + R / beta).log_softmax(0)
    assert torch.allclose(world.learn(300, 4.0 / beta**2).exp(), optimum.exp(), atol=1e-5)


def test_online_dpo_with_hard_labels_puts_the_mass_on_the_best_action() -> None:
    world = World(declared("online_dpo", beta=0.1, samples_per_prompt=4), REWARDS)
    assert world.learn(400, 20.0).exp()[0].item() > 0.95


def test_the_robust_loss_sees_through_flips() -> None:
    """On labels smoothed at its own rate the logistic loss rests where s(beta h) = 1 - eps; the robust one wants certainty."""
    smooth = declared("iterative_dpo", beta=1.0, pairs="dataset", label_smoothing=0.2)
    robust = declared("iterative_dpo", beta=1.0, pairs="dataset", label_smoothing=0.2, loss="robust")
    rested = World(smooth, REWARDS[:2]).learn(500, 2.0, start=LIKELY_SECOND)
    assert log_ratio(rested, LIKELY_SECOND) == pytest.approx(math.log(0.8 / 0.2), abs=1e-5)
    assert log_ratio(World(robust, REWARDS[:2]).learn(500, 2.0, start=LIKELY_SECOND), LIKELY_SECOND) > 5


def test_the_hinge_with_a_reference_lets_a_pair_be_once_it_is_one_over_beta_apart() -> None:
    """Its value at pi = ref is 1; the gradient ends where beta h = 1, whatever the rewards are."""
    world = World(declared("online_dpo", loss="hinge", beta=0.5), [1.0, 0.0])
    start = world.loss(LIKELY_SECOND, LIKELY_SECOND, torch.ones(2, dtype=torch.float64) / 2)
    assert start.item() == pytest.approx(1.0)
    learned = world.learn(2000, 0.05, start=LIKELY_SECOND)
    assert log_ratio(learned, LIKELY_SECOND) == pytest.approx(1 / 0.5, abs=0.05)


def test_r_dpo_reaches_the_optimum_of_the_reward_less_the_price_of_length() -> None:
    """pi* is proportional to ref exp((r - alpha n) / beta): a response of three tokens against one of a single token."""
    alpha, beta = 0.3, 0.5
    algorithm = declared("rdpo", beta=beta, length_coef=alpha, labels="soft")
    long, short = [1, 2, 3], [4]
    rollout, rng = answered([long, short]), random.Random(0)
    made = packed([Assignment(rollout, algorithm.build(rollout, scored_by([1.0, 0.2], [0, 1]), rng))])
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the long one against the short one
    reference = torch.tensor([-0.5, -0.5, -0.5, -1.5], dtype=torch.float64)
    for _ in range(500):
        pair = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
        logprobs = torch.cat([pair[0].repeat(3) / 3, pair[1:]])
        (slope,) = torch.autograd.grad(preference_loss(algorithm.objective, made, logprobs, reference).sum(), logit)
        with torch.no_grad():
            logit -= 5 * slope
    h = (pair[0] - reference[:3].sum() - pair[1] + reference[3]).item()
    assert h == pytest.approx((1.0 - 0.2 - alpha * (3 - 1)) / beta, abs=1e-5)


def test_simpo_rests_where_its_margin_is_met() -> None:
    """With labels smoothed at .1: beta (difference of mean log-probs) - gamma = log(.9 / .1); no reference holds it."""
    algorithm = declared("simpo", beta=0.5, gamma=0.4, label_smoothing=0.1, samples_per_prompt=2)
    learned = World(algorithm, [1.0, 0.0]).learn(1000, 20.0, start=LIKELY_SECOND)
    assert 0.5 * (learned[0] - learned[1]).item() - 0.4 == pytest.approx(math.log(0.9 / 0.1), abs=1e-3)
    assert algorithm.objective.terms[0].offset == 0.8
    equal = World(declared("simpo", gamma=1.5), [1.0, 0.0])
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    start = equal.loss(halves, halves, torch.ones(len(equal.answers), dtype=torch.float64) / len(equal.answers))
    assert start.item() == pytest.approx(math.log1p(math.exp(1.5))), "-log s(-gamma)"


# Iterative DPO


def test_rounds_of_iterative_dpo_go_on_where_a_fixed_reference_stays() -> None:
    """A round ends at pi_old exp(r / beta), so T rounds give pi_0 exp(T r / beta); with the reference fixed all rounds end alike."""
    beta, rounds = 2.0, 3
    moving = declared("iterative_dpo", beta=beta, labels="soft", pairing="random", samples_per_prompt=2)
    assert moving.reference == Previous(1)
    fixed = declared(
        "iterative_dpo", beta=beta, labels="soft", pairing="random", samples_per_prompt=2, reference="fixed"
    )
    assert fixed.reference == Fixed()
    iterate, anchored = REFERENCE, REFERENCE
    for number in range(1, rounds + 1):
        iterate = World(moving, REWARDS).learn(200, 1.0, start=iterate, resample=False)
        assert torch.allclose(iterate.exp(), (REFERENCE + number * R / beta).softmax(0), atol=1e-5)
        anchored = World(fixed, REWARDS).learn(200, 1.0, start=anchored, reference=REFERENCE, resample=False)
        assert torch.allclose(anchored.exp(), (REFERENCE + R / beta).softmax(0), atol=1e-5)


def test_iterative_dpo_on_a_data_sets_pairs_needs_no_samples() -> None:
    algorithm = declared("iterative_dpo", beta=0.5, pairs="dataset", label_smoothing=0.1)
    assert (algorithm.sources, algorithm.judged, algorithm.dataset_pairs) == ((), False, True)
    learned = World(algorithm, REWARDS, pair=(1, 2)).learn(500, 8.0)
    u = learned - REFERENCE
    assert (u[1] - u[2]).item() == pytest.approx(math.log(0.9 / 0.1) / 0.5, abs=1e-5)


# Exploration


@pytest.mark.parametrize(("start", "generated"), [(LIKELY_SECOND, 1), (LIKELY_FIRST, 0)], ids=["rejected", "chosen"])
@pytest.mark.parametrize("bonus_scale", ["alpha_beta", "alpha"])
def test_selm_reaches_the_optimum_of_its_loss(start: torch.Tensor, generated: int, bonus_scale: str) -> None:
    """Stationary in h: -beta (p - s(beta h)) + c dLP(y_gen)/dh = 0 with c = alpha beta (or alpha), y_gen being the greedy answer."""
    alpha, beta, p = 0.1, 0.5, sigmoid(1.0)
    factor = alpha * beta if bonus_scale == "alpha_beta" else alpha
    algorithm = declared("selm", alpha=alpha, beta=beta, labels="soft", bonus_scale=bonus_scale)
    learned = World(algorithm, [1.0, 0.0]).learn(400, 5.0, start=start, resample=False)

    def slope(h: float) -> float:
        first = sigmoid(h + (start[0] - start[1]).item())
        rise = -first if generated == 1 else 1 - first
        return -beta * (p - sigmoid(beta * h)) + factor * rise

    assert log_ratio(learned, start) == pytest.approx(root(slope), abs=1e-4)


def test_xpo_reaches_the_optimum_of_its_loss() -> None:
    """Expected over y ~ pi and y~ ~ ref, where they differ; the bonus falls on y~."""
    alpha, beta, p = 0.05, 0.5, sigmoid(1.0)
    learned = World(declared("xpo", alpha=alpha, beta=beta, labels="soft"), [1.0, 0.0]).learn(
        3000, 5.0, start=LIKELY_SECOND
    )

    def slope(h: float) -> float:
        first = sigmoid(h + (LIKELY_SECOND[0] - LIKELY_SECOND[1]).item())
        second_by_reference, first_by_reference = first * 0.6, (1 - first) * 0.4
        preference = (second_by_reference + first_by_reference) * -beta * (p - sigmoid(beta * h))
        return preference + alpha * (second_by_reference * -first + first_by_reference * (1 - first))

    assert log_ratio(learned, LIKELY_SECOND) == pytest.approx(root(slope), abs=1e-4)


@pytest.mark.parametrize("name", ["selm", "xpo"])
def test_the_bonus_lowers_the_log_prob_of_what_the_reference_writes(name: str) -> None:
    """The reference's likeliest answer is the second action, neither the best nor the worst; more bonus, less of it."""
    second = [
        World(declared(name, alpha=alpha, beta=0.5, labels="soft"), REWARDS, pair=(0, 2))
        .learn(200, 5.0, resample=False)[1]
        .item()
        for alpha in (0.0, 0.05, 0.1)
    ]
    assert second[0] - 0.05 > second[1] > second[2] + 0.05


@pytest.mark.parametrize("name", ["selm", "xpo"])
def test_without_bonus_it_is_dpo_on_the_same_pairs(name: str) -> None:
    bare, dpo = declared(name, alpha=0.0, beta=0.5), declared("online_dpo", beta=0.5)
    assert bare.objective == dpo.objective
    with_bonus = World(declared(name, alpha=0.1, beta=0.5), REWARDS)
    pairs = with_bonus.experience.coefficients[with_bonus.experience.term == 0]
    without = World(bare, REWARDS)
    assert without.answers == with_bonus.answers
    assert len(without.experience.coefficients) == len(pairs)


# RAFT


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_raft_rests_where_its_pull_equals_what_the_better_of_two_gains(weight: float) -> None:
    """The better of two samples is the first action with 1 - (1 - p)^2 = p + p (1 - p); the pull is weight p (1 - p) h: h = 1 / weight."""
    world = World(declared("raft", samples_per_prompt=2, kl_weight=weight), [7.0, 0.0])
    learned = world.learn(400, 1.0 / weight, start=LIKELY_SECOND)
    assert log_ratio(learned, LIKELY_SECOND) == pytest.approx(1 / weight, abs=1e-4)


def test_rafts_gradient_is_that_of_fine_tuning_on_the_best() -> None:
    world = World(declared("raft", samples_per_prompt=3), REWARDS)
    logits = REFERENCE.clone().requires_grad_(True)
    chances = world.chances(REFERENCE, REFERENCE)
    (gradient,) = torch.autograd.grad(world.loss(logits.log_softmax(0), REFERENCE, chances), logits)
    p = REFERENCE.exp()
    worse = [1 - p[0], p[2], torch.tensor(0.0)]  # actions fall in reward: chance that a response is worse than action a
    up_to = [torch.tensor(1.0), 1 - p[0], p[2]]
    best = torch.stack([high**3 - low**3 for high, low in zip(up_to, worse, strict=True)])
    assert torch.allclose(gradient, p - best, atol=1e-6), "of -sum_a best(a) log pi(a)"


def test_raft_without_pull_puts_the_mass_on_the_best_action() -> None:
    assert World(declared("raft", samples_per_prompt=4), REWARDS).learn(300, 1.0).exp()[0].item() > 0.95


# SLiC


def test_slic_without_likelihood_rests_at_its_margin() -> None:
    world = World(declared("slic", delta=1.5, likelihood_weight=0.0), [1.0, 0.0])
    learned = world.learn(400, 0.1, start=LIKELY_SECOND)
    assert (learned[0] - learned[1]).item() == pytest.approx(1.5, abs=0.1)


def test_slics_likelihood_pulls_the_chosen_response_up_beyond_the_margin() -> None:
    learned = World(declared("slic", delta=1.5, samples_per_prompt=3), REWARDS).learn(500, 4.0)
    assert learned.exp()[0].item() > 0.95
