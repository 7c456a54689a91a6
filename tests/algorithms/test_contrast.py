"""The contrast kernel against known values, autograd identities and symmetries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.contrast import Contrast, contrast_loss, link_loss, response_scores

PAIR = torch.tensor([[1.0, -1.0]])


def loss_of_pair(objective: Contrast, u_w: float, u_l: float, target: float) -> float:
    return contrast_loss(objective, torch.tensor([u_w, u_l]), PAIR, torch.tensor([target]), torch.ones(1)).item()


# LP_w, LP_l, RP_w, RP_l = -10, -12, -11, -11.5: U_w = 1, U_l = -0.5, h = 1.5
@pytest.mark.parametrize(
    ("objective", "target", "value"),
    [
        (Contrast("logistic", scale=0.1), 1.0, 0.620957),  # DPO
        (Contrast("logistic", scale=0.1), 0.9, 0.635957),  # conservative DPO, eps .1
        (Contrast("robust", scale=0.1, flip_rate=0.1), 1.0, 0.602207),
        (Contrast("square"), 1 / (2 * 0.1), 12.25),  # IPO, tau .1
        (Contrast("square"), 1 / (2 * 1.0), 1.0),  # IPO, tau 1
    ],
)
def test_known_values(objective: Contrast, target: float, value: float) -> None:
    assert loss_of_pair(objective, 1.0, -0.5, target) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_policy_equal_to_reference_gives_log_2(target: float) -> None:
    assert loss_of_pair(Contrast("logistic", scale=0.1), 0.0, 0.0, target) == pytest.approx(math.log(2))
    assert loss_of_pair(Contrast("robust", scale=0.1, flip_rate=0.2), 0.0, 0.0, target) == pytest.approx(math.log(2))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_other_links_at_policy_equal_to_reference(tau: float) -> None:
    assert loss_of_pair(Contrast("square"), 0.0, 0.0, 1 / (2 * tau)) == pytest.approx(1 / (4 * tau**2))
    assert loss_of_pair(Contrast("hinge", scale=0.1), 0.0, 0.0, 1.0) == 1.0
    assert loss_of_pair(Contrast("linear", scale=0.1), 0.0, 0.0, 1.0) == 0.0


def test_mean_reduction_divides_by_each_response_length() -> None:
    """U/n with n = 5 and 8: h = 1/5 + .5/8 = .2625; IPO at tau .1 gives 22.44391."""
    response = torch.tensor([0] * 5 + [1] * 8)
    logprobs = torch.cat([torch.full((5,), 1 / 5), torch.full((8,), -0.5 / 8)])
    scores = response_scores(logprobs, torch.zeros(13), response, 2, "mean")
    assert (scores[0] - scores[1]).item() == pytest.approx(0.2625)
    loss = contrast_loss(Contrast("square", reduce="mean"), scores, PAIR, torch.tensor([5.0]), torch.ones(1))
    assert loss.item() == pytest.approx(22.44391, abs=1e-4)


@given(h=st.floats(-20, 20), p=st.floats(0, 1), beta=st.floats(0.01, 2))
def test_gradient_of_dpo_is_minus_beta_times_surprise(h: float, p: float, beta: float) -> None:
    """dL/dh = -beta (p - s(beta h)), so it vanishes at h = 0 for p = 1/2."""
    contrast = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    link_loss(Contrast("logistic", scale=beta), contrast, torch.tensor([p], dtype=torch.float64)).sum().backward()
    expected = -beta * (p - 1 / (1 + math.exp(-beta * h)))
    assert contrast.grad.item() == pytest.approx(expected, abs=1e-9)


@given(u=st.tuples(st.floats(-5, 5), st.floats(-5, 5)), p=st.floats(0, 1))
def test_swapping_the_pair_and_the_label_changes_nothing(u: tuple[float, float], p: float) -> None:
    objective = Contrast("logistic", scale=0.3)
    assert loss_of_pair(objective, *u, p) == pytest.approx(loss_of_pair(objective, *reversed(u), 1 - p), abs=1e-5)


@given(shift=st.floats(-50, 50))
def test_a_constant_on_policy_and_reference_cancels(shift: float) -> None:
    logprobs, anchor = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.25])
    response = torch.tensor([0, 0, 1])
    plain = response_scores(logprobs, anchor, response, 2, "sum")
    moved = response_scores(logprobs + shift, anchor + shift, response, 2, "sum")
    assert torch.allclose(plain, moved, atol=1e-4)


def test_the_robust_loss_is_unbiased_under_flips() -> None:
    """E over flips at rate eps of the robust loss is the clean DPO loss."""
    eps, clean, robust = 0.2, Contrast("logistic", scale=0.5), Contrast("robust", scale=0.5, flip_rate=0.2)
    mean = (1 - eps) * loss_of_pair(robust, 0.7, -0.2, 1.0) + eps * loss_of_pair(robust, -0.2, 0.7, 1.0)
    assert mean == pytest.approx(loss_of_pair(clean, 0.7, -0.2, 1.0), abs=1e-6)


def test_weight_zero_contributes_neither_loss_nor_gradient() -> None:
    scores = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    coefficients = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    losses = contrast_loss(Contrast(scale=0.1), scores, coefficients, torch.ones(2), torch.tensor([1.0, 0.0]))
    losses.sum().backward()
    assert losses[1].item() == 0
    assert scores.grad[2].item() == 0
    assert scores.grad[0].item() < 0 < scores.grad[1].item()


def test_an_unknown_link_is_refused() -> None:
    with pytest.raises(ValueError, match="known: logistic"):
        link_loss(Contrast("cubic"), torch.zeros(1), torch.zeros(1))  # type: ignore[arg-type]
