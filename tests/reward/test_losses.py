"""The known values of algorithms.md, sections 6.4 and 8, and the losses against other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward.modules import skew_symmetric_score
from rlhf.reward.training.losses import bradley_terry, cross_entropy, min_norm_weights, ordinal

ONE, ZERO = torch.tensor([1.0]), torch.tensor([0.0])
numbers = st.floats(-3, 3)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 0.313262), ({"margin": 0.5}, 0.474077), ({"centring": 0.01}, 0.323262)]
)
def test_bradley_terry(options: dict, expected: float):
    assert bradley_terry(ONE, ZERO, **options).item() == pytest.approx(expected, abs=1e-6)


def test_bradley_terry_at_equal_rewards_is_log_2():
    assert bradley_terry(ZERO, ZERO).item() == pytest.approx(np.log(2))


def test_bradley_terry_of_a_probability_mixes_both_outcomes():
    there, back = bradley_terry(ONE, ZERO).item(), bradley_terry(ZERO, ONE).item()
    assert bradley_terry(ONE, ZERO, probability=0.7).item() == pytest.approx(0.7 * there + 0.3 * back)


def test_a_probability_is_learned_exactly():
    """The cross entropy is least where sigmoid(z) = p."""
    z = torch.zeros(1, requires_grad=True)
    logit = float(np.log(0.8 / 0.2))
    for value, sign in ((logit - 0.1, -1), (logit, 0), (logit + 0.1, 1)):
        (gradient,) = torch.autograd.grad(cross_entropy(z + value, 0.8).sum(), z)
        assert gradient.item() == pytest.approx(0, abs=1e-6) if sign == 0 else gradient.sign().item() == sign


def test_bradley_terry_pushes_the_right_way():
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    bradley_terry(chosen, rejected).sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_the_bradley_terry_model_is_a_gpm():
    """With v = [r, 1]: 1.5 for r = 2 against .5."""
    first, second = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 1.0]])
    assert skew_symmetric_score(first, second).item() == 1.5


@given(st.integers(1, 4).flatmap(lambda k: st.lists(numbers, min_size=6 * k, max_size=6 * k)))
def test_the_gpm_score_is_that_of_the_matrix(values: list[float]):
    """<R v_i, v_j> with R written out, times the gate; the other order has the other sign, and no text beats itself."""
    first, second, gate = torch.tensor(values, dtype=torch.float64).reshape(3, -1)
    gate = gate[: len(gate) // 2].abs()
    rotation = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * len(gate))
    expected = (rotation @ first * gate.repeat_interleave(2)) @ second
    score = skew_symmetric_score(first[None], second[None], gate[None])
    assert score.item() == pytest.approx(expected.item(), abs=1e-9)
    assert skew_symmetric_score(second[None], first[None], gate[None]).item() == pytest.approx(-score.item(), abs=1e-12)
    assert skew_symmetric_score(first[None], first[None]).item() == 0


@given(st.lists(numbers, min_size=2, max_size=5, unique=True))
def test_ordinal_losses_are_a_distribution(logits: list[float]):
    """exp(-loss) over the levels sums to 1, and P(level > k) adds up to sigmoid(z_k)."""
    z = torch.tensor(sorted(logits, reverse=True), dtype=torch.float64)
    if (z.diff() > -1e-6).any():
        return
    levels = torch.arange(len(z) + 1)
    p = torch.exp(-ordinal(z.expand(len(levels), -1), levels))
    assert p.sum().item() == pytest.approx(1)
    above = p.flip(0).cumsum(0).flip(0)[1:]
    assert torch.allclose(above, torch.sigmoid(z), atol=1e-9)


def test_ordinal_of_two_levels_is_the_logistic_loss():
    z = torch.tensor([[0.3], [0.3]])
    expected = [-np.log(1 / (1 + np.exp(0.3))), -np.log(1 / (1 + np.exp(-0.3)))]
    assert ordinal(z, torch.tensor([0, 1])).tolist() == pytest.approx(expected, rel=1e-5)


def test_ordinal_far_out_is_finite():
    z = torch.tensor([[60.0, 59.0]], requires_grad=True)
    loss = ordinal(z, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(60) and torch.isfinite(z.grad).all()


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=4))
def test_min_norm_weights_make_a_common_descent_direction(rows: list[tuple]):
    """The shortest combination d of the gradients has <g, d> >= |d|^2 for each of them (the projection's optimality)."""
    gradients = torch.tensor(rows, dtype=torch.float64)
    weights = min_norm_weights(gradients)
    assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1)
    direction = weights @ gradients
    assert ((gradients @ direction) >= direction @ direction - 1e-3).all()


def test_min_norm_weights_of_two_are_in_closed_form():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = (b @ (b - a)) / ((a - b) @ (a - b))  # Sener and Koltun 2018, equation 5
    assert min_norm_weights(torch.stack([a, b]))[0].item() == pytest.approx(expected.item())
    assert min_norm_weights(torch.stack([a, a / 2])).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 0.0])
def test_min_norm_weights_of_two_unit_gradients_are_halves_however_close_they_are(apart: float):
    """|w a + (1 - w) b| is shortest at 1/2 if |a| = |b|: in fp32, and next to each other, rounding must not say otherwise."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        first, change = torch.randn(2, 32, generator=generator)
        pair = torch.nn.functional.normalize(torch.stack([first, first + apart * change]).double(), dim=1)
        assert min_norm_weights(pair).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]))
def test_rounding_of_fp32_gradients_does_not_move_min_norm_weights(seed: int, apart: float):
    generator = torch.Generator().manual_seed(seed)
    common, *changes = torch.randn(4, 32, generator=generator)
    gradients = torch.stack([common + apart * change for change in changes])
    rounded = gradients * (1 + 1e-6 * torch.randn(gradients.shape, generator=generator))
    exact, moved = (
        min_norm_weights(torch.nn.functional.normalize(each.double(), dim=1)) for each in (gradients, rounded)
    )
    assert moved.tolist() == pytest.approx(exact.tolist(), abs=0.02)
