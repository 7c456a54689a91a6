"""Advantages and losses of the policy-gradient kernel: known values, independent formulas, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.advantages import advantages, discounted_sums, gae, group_advantages, token_rewards, whiten
from rlhf.algorithms.kl import AdaptiveKl, kl_estimate
from rlhf.algorithms.policy_gradient import (
    Critic,
    PolicyGradient,
    aggregate,
    importance_correction,
    normaliser,
    policy_loss,
    value_loss,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


def random(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# KL


def test_estimators_at_known_points() -> None:
    lr = f64(0.5, -0.5)
    assert torch.allclose(kl_estimate(lr, "k1"), lr)
    assert torch.allclose(kl_estimate(lr, "k2"), f64(0.125, 0.125))
    assert torch.allclose(kl_estimate(lr, "k3"), f64(0.106531, 0.148721), atol=1e-6)


def table() -> tuple[torch.Tensor, torch.Tensor]:
    return f64(0.3, -1.0, 0.8).requires_grad_(True), f64(0.5, 0.2, -0.4).log_softmax(0)


def test_values_have_the_mean_of_the_kl_but_only_k2_has_its_gradient() -> None:
    """Expectations over the policy are sums with its detached probabilities: what sampling from it gives on average."""
    logits, reference = table()
    logprobs = logits.log_softmax(0)
    probabilities = logprobs.exp()
    reverse = (probabilities * (logprobs - reference)).sum()
    forward = (reference.exp() * (reference - logprobs)).sum()

    def expected(estimator: Any) -> torch.Tensor:
        return (probabilities.detach() * kl_estimate(logprobs - reference, estimator)).sum()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    assert expected("k1").item() == pytest.approx(reverse.item())
    assert expected("k3").item() == pytest.approx(reverse.item())
    assert expected("k2").item() != pytest.approx(reverse.item(), rel=0.01)
    assert torch.allclose(gradient(expected("k1")), f64(0, 0, 0), atol=1e-12)
    assert torch.allclose(gradient(expected("k2")), gradient(reverse))
    assert torch.allclose(gradient(expected("k3")), gradient(forward))


def test_k1_in_the_reward_has_the_gradient_of_the_kl() -> None:
    logits, reference = table()
    logprobs = logits.log_softmax(0)
    objective = PolicyGradient(kl_placement="reward", clip_low=None, clip_high=None)
    each = torch.arange(3)
    ratio = (logprobs - reference).detach()
    estimate = advantages(objective, f64(0, 0, 0), each, each, kl_coef=0.7, logratio=ratio)
    losses = policy_loss(objective, logprobs, logprobs.detach(), estimate.advantages, each).loss
    (mine,) = torch.autograd.grad((logprobs.detach().exp() * losses).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(0.7 * (logprobs.exp() * (logprobs - reference)).sum(), logits)
    assert torch.allclose(mine, exact)


def test_the_adaptive_coefficient() -> None:
    """Ziegler et al.: KL 9 at target 6 is more than 20% too much."""
    kl = AdaptiveKl(0.1, 6.0, 10_000)
    kl.update(9.0, 256)
    assert kl.coef == pytest.approx(0.1 * 1.00512)
    kl.update(0.0, 256)
    assert kl.coef == pytest.approx(0.1 * 1.00512 * (1 - 0.00512))
    kl.update(6.6, 1000)
    assert kl.coef == pytest.approx(0.1 * 1.00512 * (1 - 0.00512) * 1.01)
    constant = AdaptiveKl(0.1, None, 10_000)
    constant.update(9.0, 256)
    assert constant.coef == 0.1


@given(
    steps=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**7)), min_size=1, max_size=30),
    target=st.floats(1e-3, 1e3),
    horizon=st.integers(1, 10**5),
)
def test_the_adaptive_coefficient_stays_positive_and_moves_by_a_fifth_at_most(
    steps: list[tuple[float, int]], target: float, horizon: int
) -> None:
    kl = AdaptiveKl(0.1, target, horizon)
    for measured, n_responses in steps:
        before = kl.coef
        kl.update(measured, n_responses)
        assert 0.8 * before * (1 - 1e-9) <= kl.coef <= 1.2 * before * (1 + 1e-9)
        assert (kl.coef - before) * (measured - target) >= 0, "up while the KL is above its target, down below"


# CISPO


def test_cispo_weighs_the_log_prob_with_the_clipped_ratio_and_cuts_no_gradient_off() -> None:
    """Ratios e, 1 and 1/e at bounds [.5, 2], A = 1.5: weights 2, 1 and .5, where the clipped loss of the first has no gradient."""
    old, response = f64(-2.0, -1.0, -0.5), torch.arange(3)
    logprobs = (old + f64(1.0, 0.0, -1.0)).requires_grad_(True)
    advantage = f64(1.5, 1.5, 1.5)
    bounds: dict[str, Any] = {"clip_low": 0.5, "clip_high": 1.0}
    made = policy_loss(PolicyGradient(surrogate="cispo", **bounds), logprobs, old, advantage, response)
    assert torch.allclose(made.loss, -f64(2.0, 1.0, 0.5) * 1.5 * logprobs)
    assert torch.allclose(torch.autograd.grad(made.loss.sum(), logprobs)[0], -1.5 * f64(2.0, 1.0, 0.5))
    assert made.clipped.tolist() == [True, False, True]
    clipped = policy_loss(PolicyGradient(**bounds), logprobs, old, advantage, response)
    assert torch.autograd.grad(clipped.loss.sum(), logprobs)[0][0] == 0


# Masked tokens


def test_whitening_looks_at_learned_tokens_only() -> None:
    part, learned = f64(1.0, 3.0, 100.0), torch.tensor([True, True, False])
    (white,) = whiten([part], learned=[learned])
    assert torch.allclose(white[:2], whiten([part[:2]])[0])


# Baselines


def test_baselines_of_a_group() -> None:
    rewards, group = f64(1, 0, 0, 1, 0.5), torch.zeros(5, dtype=torch.int64)
    assert torch.equal(group_advantages(rewards, group, "none"), rewards)
    assert torch.allclose(group_advantages(rewards, group, "mean"), f64(0.5, -0.5, -0.5, 0.5, 0))
    assert torch.allclose(group_advantages(rewards, group, "leave_one_out"), f64(0.625, -0.625, -0.625, 0.625, 0))
    assert torch.allclose(group_advantages(rewards, group, "mean_std"), f64(1, -1, -1, 1, 0), atol=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "mean_std"])
@given(reward=st.floats(-100, 100, width=32), size=st.integers(1, 9))
def test_equal_rewards_and_lone_responses_give_exactly_zero(baseline: Any, reward: float, size: int) -> None:
    rewards, group = torch.full((size + 2,), reward), torch.tensor([1] * size + [0, 2])
    assert (group_advantages(rewards, group, baseline) == 0).all()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "mean_std"])
@given(
    groups=st.lists(st.lists(st.integers(-40, 40), min_size=2, max_size=6), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_group_baselines_against_plain_arithmetic_in_any_order(
    baseline: Any, groups: list[list[int]], order: Any
) -> None:
    expected, flat = [], [(number, index) for number, group in enumerate(groups) for index in range(len(group))]
    order.shuffle(flat)
    for number, index in flat:
        group = [reward / 4 for reward in groups[number]]
        mean = sum(group) / len(group)
        if baseline == "leave_one_out":
            others = group[:index] + group[index + 1 :]
            expected.append(group[index] - sum(others) / len(others))
        else:
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
            expected.append((group[index] - mean) / (std + 1e-6 if baseline == "mean_std" else 1))
    rewards = f64(*(groups[number][index] / 4 for number, index in flat))
    got = group_advantages(rewards, torch.tensor([number for number, _ in flat]), baseline)
    assert torch.allclose(got, f64(*expected), atol=1e-9)


def test_rewards_are_clipped_before_the_baseline() -> None:
    each = torch.arange(2)
    objective = PolicyGradient(baseline="mean", reward_clip=10.0)
    estimate = advantages(objective, f64(100, 0), each, torch.zeros(2, dtype=torch.int64), kl_coef=0.0)
    assert estimate.advantages.tolist() == [5, -5], "clipped after it, the advantages would be 10 and -10"


# From rewards to advantages


def test_the_reward_comes_with_the_last_token_and_the_kl_with_each() -> None:
    assert token_rewards(f64(2, 3), rows([3, 1]), None).tolist() == [0, 0, 2, 3]
    assert token_rewards(f64(2, 3), rows([3, 1]), f64(1, 2, 3, 4)).tolist() == [-1, -2, -1, -1]


def test_kl_before_the_baseline_is_the_sequence_kl_inside_the_reward() -> None:
    """Classical RLOO: two responses of one prompt, three and one tokens."""
    response, group, ratio = rows([3, 1]), torch.zeros(2, dtype=torch.int64), f64(0.1, 0.2, 0.3, -0.4)
    arguments: dict[str, Any] = {"kl_coef": 0.5, "logratio": ratio}
    before = PolicyGradient(baseline="leave_one_out", kl_placement="reward", kl_before_baseline=True)
    first, second = 2 - 0.5 * 0.6, 1 + 0.5 * 0.4
    a = first - second
    got = advantages(before, f64(2, 1), response, group, **arguments).advantages
    assert torch.allclose(got, f64(a, a, a, -a))
    after = PolicyGradient(baseline="leave_one_out", kl_placement="reward")
    got = advantages(after, f64(2, 1), response, group, **arguments).advantages
    assert torch.allclose(got, f64(1 - 0.3, 1 - 0.25, 1 - 0.15, -1 + 0.2))


def test_nash_md_weighs_each_token_with_the_kl_to_go() -> None:
    """Munos et al. 2023: (p - 1/2) - tau sum_{s >= t} lr_s."""
    objective = PolicyGradient(
        kl_placement="reward", clip_low=None, clip_high=None, aggregation="seq_mean_token_sum", correction="none"
    )
    ratio, response = f64(0.3, -0.2, 0.5, 1.0), rows([3, 1])
    got = advantages(objective, f64(0.9 - 0.5, 0.2 - 0.5), response, torch.arange(2), kl_coef=0.1, logratio=ratio)
    assert torch.allclose(got.advantages, f64(0.4 - 0.06, 0.4 - 0.03, 0.4 - 0.05, -0.3 - 0.1))


@pytest.mark.parametrize(("lam", "expected"), [(1.0, (0.5, 0.4, 0.3)), (0.95, (0.46575, 0.385, 0.3))])
def test_generalised_advantage_estimation_at_known_values(lam: float, expected: tuple[float, ...]) -> None:
    objective = PolicyGradient(critic=Critic(None, 0.0, 0, None, lam))
    values = f64(0.5, 0.6, 0.7)
    got = advantages(objective, f64(1), rows([3]), torch.zeros(1, dtype=torch.int64), kl_coef=0.0, values=values)
    assert torch.allclose(got.advantages, f64(*expected))
    assert torch.allclose(got.returns, f64(*expected) + values)


@given(lengths=LENGTHS, gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.5, 1.0]))
def test_gae_against_its_recursion(lengths: list[int], gamma: float, lam: float) -> None:
    rewards, values = random(sum(lengths)), random(sum(lengths), seed=1)
    expected, stop = [], 0
    for length in lengths:
        start, stop = stop, stop + length
        advantage, following, backwards = 0.0, 0.0, []
        for t in reversed(range(start, stop)):
            advantage = rewards[t].item() + gamma * following - values[t].item() + gamma * lam * advantage
            following = values[t].item()
            backwards.append(advantage)
        expected += backwards[::-1]
    assert torch.allclose(gae(rewards, values, rows(lengths), gamma, lam), f64(*expected))


@given(lengths=LENGTHS, discount=st.sampled_from([1.0, 0.99, 0.5]))
def test_discounted_sums_against_their_definition(lengths: list[int], discount: float) -> None:
    values, response = random(sum(lengths)), rows(lengths)
    expected = [
        sum(discount ** (s - t) * values[s].item() for s in range(t, len(values)) if response[s] == response[t])
        for t in range(len(values))
    ]
    assert torch.allclose(discounted_sums(values, response, discount), f64(*expected))


def test_what_is_missing_is_named() -> None:
    each = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="logratio"):
        advantages(PolicyGradient(kl_placement="reward"), f64(1), each, each, kl_coef=0.1)
    with pytest.raises(ValueError, match="values"):
        advantages(PolicyGradient(critic=Critic(None, 0.0, 0, None, 1.0)), f64(1), each, each, kl_coef=0.0)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(PolicyGradient(kl_placement="loss", kl_estimator="k2"), f64(-1), f64(-1), f64(1), each)
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(PolicyGradient(entropy_coef=0.1), f64(-1), f64(-1), f64(1), each)


@given(lengths=LENGTHS)
def test_whitening_is_over_all_parts_together(lengths: list[int]) -> None:
    values = 3 * random(sum(lengths) + 2) + 5
    (whole,) = whiten([values])
    assert torch.allclose(torch.cat(whiten(list(values.split([*lengths, 2])))), whole)
    assert whole.mean().item() == pytest.approx(0, abs=1e-9)
    assert whole.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whitening_asks_for_the_sums_of_all_ranks_even_without_a_part_of_its_own() -> None:
    other = torch.tensor([4.0, 10.0, 30.0], dtype=torch.float64)  # four tokens elsewhere: sum 10, sum of squares 30
    asked = []

    def total(sums: torch.Tensor) -> torch.Tensor:
        asked.append(sums)
        return sums + other

    assert whiten([], total) == []
    (part,) = whiten([f64(0.0)], total)
    assert len(asked) == 2
    mean, variance = 10 / 5, 30 / 5 - (10 / 5) ** 2
    assert part.item() == pytest.approx(-mean / math.sqrt(variance + 1e-8))


# Losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [(1.5, 1, -1.2, True), (1.5, -1, 1.5, False), (0.5, 1, -0.5, False), (0.5, -1, 0.8, True)],
)
def test_the_clipped_loss_at_known_values(ratio: float, advantage: float, expected: float, clipped: bool) -> None:
    got = policy_loss(PolicyGradient(), f64(math.log(ratio)), f64(0), f64(advantage), rows([1]))
    assert got.loss.item() == pytest.approx(expected)
    assert got.clipped.item() == clipped
    assert got.ratio.item() == pytest.approx(ratio)


def test_dual_clip_clip_higher_and_no_clip() -> None:
    def loss(ratio: float, advantage: float, **choices: Any) -> float:
        got = policy_loss(PolicyGradient(**choices), f64(math.log(ratio)), f64(0), f64(advantage), rows([1]))
        return got.loss.item()

    assert loss(5, -1, dual_clip=3.0) == pytest.approx(3)
    assert loss(2.5, -1, dual_clip=3.0) == pytest.approx(2.5)
    assert loss(5, 1, dual_clip=3.0) == pytest.approx(-1.2), "only negative advantages are bounded"
    assert loss(1.25, 1, clip_high=0.28) == pytest.approx(-1.25)
    assert loss(1.5, 1, clip_high=0.28) == pytest.approx(-1.28)
    assert loss(1.5, 1, clip_low=None, clip_high=None) == pytest.approx(-1.5)
    assert loss(0.5, -1, clip_low=None, clip_high=None) == pytest.approx(0.5)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_at_the_old_policy_the_gradient_is_that_of_the_plain_policy_gradient(ratio: Any, clip: float | None) -> None:
    lengths = [3, 1, 4]
    old, a = random(8), random(3, seed=1)[rows(lengths)]
    logprobs = old.clone().requires_grad_(True)
    objective = PolicyGradient(ratio=ratio, clip_low=clip, clip_high=clip)
    losses = policy_loss(objective, logprobs, old, a, rows(lengths)).loss
    assert torch.allclose(losses, -a), "the ratio is 1"
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert torch.allclose(gradient, -a)


def test_the_ratio_of_a_response_is_the_geometric_mean() -> None:
    got = policy_loss(PolicyGradient(ratio="sequence"), f64(0.3, 0.1, -1.0), f64(0, 0, 0), f64(1, 1, -1), rows([2, 1]))
    assert torch.allclose(got.ratio, torch.tensor([0.2, 0.2, -1.0], dtype=torch.float64).exp())


def test_kl_and_entropy_join_the_loss_beside_the_corrected_policy_term() -> None:
    objective = PolicyGradient(kl_placement="loss", kl_estimator="k2", entropy_coef=0.1)
    got = policy_loss(
        objective, f64(-1.0), f64(-1.0), f64(2.0), rows([1]),
        kl_coef=0.5, reference=f64(-1.5), entropy=f64(0.7), weights=f64(3.0),
    )  # fmt: skip
    assert got.loss.item() == pytest.approx(-2 * 3 + 0.5 * 0.125 - 0.1 * 0.7)


def test_the_value_loss_follows_no_further_than_its_clip() -> None:
    assert value_loss(f64(0.9), f64(0.5), f64(0), 0.2).item() == pytest.approx(0.405)
    assert value_loss(f64(0.9), f64(0.5), f64(2), 0.2).item() == pytest.approx(0.5 * 1.3**2)
    assert value_loss(f64(0.9), f64(0.5), f64(2), None).item() == pytest.approx(0.5 * 1.1**2)


def test_aggregation_modes() -> None:
    losses, response = f64(1, 2, 3, 10), rows([3, 1])
    expected = {
        "token_mean": 16 / 4,
        "seq_mean_token_mean": (2 + 10) / 2,
        "seq_mean_token_sum": 16 / 2,
        "seq_mean_token_sum_norm": 16 / (2 * 8),
    }
    for aggregation, value in expected.items():
        objective = PolicyGradient(aggregation=aggregation, max_tokens=8)  # type: ignore[arg-type]
        total = aggregate(objective, losses, response).item()
        assert total / normaliser(objective, n_responses=2, n_tokens=4) == pytest.approx(value)


@pytest.mark.parametrize(
    "aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
)
@given(lengths=LENGTHS, data=st.data())
def test_parts_add_up_to_the_whole(aggregation: Any, lengths: list[int], data: Any) -> None:
    """Responses in any two micro-batches."""
    objective = PolicyGradient(aggregation=aggregation, max_tokens=10)
    losses = random(sum(lengths))
    at = data.draw(st.integers(0, len(lengths)))
    first, second = losses.split([sum(lengths[:at]), sum(lengths[at:])])
    parts = aggregate(objective, first, rows(lengths[:at])) + aggregate(objective, second, rows(lengths[at:]))
    assert parts.item() == pytest.approx(aggregate(objective, losses, rows(lengths)).item())
    divisors = [
        normaliser(objective, n_responses=len(part), n_tokens=sum(part))
        for part in (lengths[:at], lengths[at:], lengths)
    ]
    assert divisors[0] + divisors[1] == divisors[2]


# Importance correction


def test_corrections_at_known_values() -> None:
    """w = 7, 1, 0.1 in one response and 2 in another; bounds [0.5, 5]."""
    old, behaviour, response = f64(7, 1, 0.1, 2).log(), f64(0, 0, 0, 0), rows([3, 1])

    altered: list[list[bool]] = []

    def weights(correction: Any, **bounds: float) -> list[float]:
        got = importance_correction(PolicyGradient(correction=correction, **bounds), old, behaviour, response)
        assert torch.allclose(got.ratio, f64(7, 1, 0.1, 2)), "the mismatch is reported whatever is done about it"
        altered.append(got.altered.tolist())
        return got.weights.tolist()

    assert weights("none") == [1, 1, 1, 1]
    assert weights("tis") == pytest.approx([5, 1, 0.5, 2])
    assert weights("icepop") == pytest.approx([0, 1, 0, 2])
    assert weights("sequence_mask") == [1, 1, 1, 1], "the geometric mean of the first is 0.7^(1/3) = 0.89"
    assert weights("sequence_mask", correction_low=0.95) == [0, 0, 0, 1]
    assert weights("sequence_mask", correction_high=1.5) == [1, 1, 1, 0]
    no, outside = [False] * 4, [True, False, True, False]
    assert altered == [no, outside, outside, no, [True, True, True, False], [False, False, False, True]]


@pytest.mark.parametrize("correction", ["none", "tis", "icepop", "sequence_mask"])
def test_without_a_gap_a_correction_changes_nothing(correction: Any) -> None:
    old = random(6)
    got = importance_correction(PolicyGradient(correction=correction), old, old.clone(), rows([4, 2]))
    assert got.weights.tolist() == [1] * 6
    assert not got.altered.any()


def test_a_wild_token_gives_a_large_number_and_not_infinity() -> None:
    got = policy_loss(PolicyGradient(), f64(1000.0), f64(0), f64(-1), rows([1]))
    assert got.loss.item() == pytest.approx(math.exp(20))
