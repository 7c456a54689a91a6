"""The contrast kernel, from token log-probs to losses: known values, gradients of independent formulas, symmetries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.contrast import Contrast, Preference, link_loss, preference_loss, response_sums

LOG2 = math.log(2)
DPO = Contrast("logistic", scale=0.1)


@dataclass
class Items:
    """A batch of items on responses whose tokens lie one after the other."""

    response: torch.Tensor
    coefficients: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    term: torch.Tensor


def items(
    lengths: Sequence[int],
    coefficients: Sequence[Sequence[float]] = ((1.0, -1.0),),
    target: Sequence[float] | None = None,
    weight: Sequence[float] | None = None,
    term: Sequence[int] | None = None,
) -> Items:
    n = len(coefficients)
    return Items(
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        torch.tensor(coefficients, dtype=torch.float64).reshape(n, len(lengths)),
        torch.tensor(target or [1.0] * n, dtype=torch.float64),
        torch.tensor(weight or [1.0] * n, dtype=torch.float64),
        torch.tensor(term or [0] * n),
    )


def tokens(sums: Sequence[float], lengths: Sequence[int]) -> torch.Tensor:
    """Log-probs of tokens that add up to these sums per response, unevenly."""
    parts = []
    for total, length in zip(sums, lengths, strict=True):
        share = torch.arange(1, length + 1, dtype=torch.float64)
        parts.append(total * share / share.sum())
    return torch.cat(parts)


LENGTHS = (5, 8)
POLICY, ANCHOR = tokens((-10, -12), LENGTHS), tokens((-11, -11.5), LENGTHS)  # U_w = 1, U_l = -1/2, h = 3/2


def loss(
    *terms: Contrast, batch: Items | None = None, policy: torch.Tensor = POLICY, anchor: torch.Tensor = ANCHOR
) -> float:
    return preference_loss(Preference(terms), batch or items(LENGTHS), policy, anchor).sum().item()


@pytest.mark.parametrize(
    ("term", "target", "value"),
    [
        (DPO, 1.0, 0.620957),
        (DPO, 0.9, 0.635957),  # conservative DPO, eps .1
        (Contrast("robust", scale=0.1, flip_rate=0.1), 1.0, 0.602207),
        (Contrast("square", scale=0.1), 1.0, 12.25),  # IPO, tau .1
        (Contrast("square", scale=1.0), 1.0, 1.0),  # IPO, tau 1
        (Contrast("square", scale=0.1, reduce="mean"), 1.0, 22.443906),
        (Contrast("hinge", scale=0.1), 1.0, 0.85),  # RSO
        (Contrast("hinge", margin=4.0, anchored=False), 1.0, 2.0),  # SLiC: 4 + 10 - 12
        (Contrast("logistic", scale=2.0, offset=0.5, reduce="mean", anchored=False), 1.0, 2.126928),  # SimPO, gamma 1
        (Contrast("logistic", scale=0.1, length_coef=0.05), 1.0, 0.693147),  # R-DPO: .1 x 1.5 + .05 (5 - 8) = 0
        (Contrast("logistic", scale=0.1, length_coef=0.1), 1.0, 0.770958),  # -log s(-.15)
        (Contrast("logistic", scale=0.1, anchored=False), 1.0, 0.598138),  # CPO's preference
        (DPO, 1 / (1 + math.exp(-1.0)), 0.661298),  # DNO, r = (1, 0), eta .1
        (DPO, 1 / (1 + math.exp(-0.5)), 0.677588),  # DNO, r = (.8, .3)
    ],
)
def test_known_values(term: Contrast, target: float, value: float) -> None:
    assert loss(term, batch=items(LENGTHS, target=[target])) == pytest.approx(value, abs=1e-6)


def test_known_values_of_losses_with_a_second_term() -> None:
    both = items(LENGTHS, [[1, -1], [1, 0]], term=[0, 1])
    selm = (Contrast("logistic", scale=0.01), Contrast("linear", scale=1e-3 * 0.01))
    assert loss(*selm, batch=both) == pytest.approx(0.685685, abs=1e-6)  # y_gen is y_w
    rejected = items(LENGTHS, [[1, -1], [0, 1]], term=[0, 1])
    xpo = (DPO, Contrast("linear", scale=1e-5, anchored=False))
    assert loss(*xpo, batch=rejected) == pytest.approx(0.620837, abs=1e-6)  # the reference's response is y_l
    slic = (Contrast("hinge", margin=4.0, anchored=False), Contrast("linear", scale=-0.1, anchored=False))
    assert loss(*slic, batch=both) == pytest.approx(2.0 + 0.1 * 10)


@pytest.mark.parametrize(("win_rates", "value"), [((1.0, 0.0), 249250.625), ((0.8, 0.2), 89550.625)])
def test_points_under_the_square_link_are_sppo(win_rates: tuple[float, float], value: float) -> None:
    points = items(LENGTHS, [[1, 0], [0, 1]], target=win_rates, weight=[0.5, 0.5])
    assert loss(Contrast("square", scale=1e-3), batch=points) == pytest.approx(value)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_policy_equal_to_reference(p: float) -> None:
    """The analytic constant of every loss where all log-ratios are 0, and DPO's and IPO's zero gradient there for p = 1/2."""
    batch = items(LENGTHS, target=[p])
    policy = ANCHOR.clone().requires_grad_(True)
    for term, value in [
        (DPO, LOG2),
        (Contrast("robust", scale=0.1, flip_rate=0.2), LOG2),
        (Contrast("hinge", scale=0.1), 1.0),
        *((Contrast("square", scale=tau), (p - 0.5) ** 2 / tau**2) for tau in (0.1, 1.0)),
    ]:
        losses = preference_loss(Preference((term,)), batch, policy, ANCHOR)
        assert losses.item() == pytest.approx(value), term
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        if term.link != "hinge":
            assert (gradient.abs().max() < 1e-12) == (p == 0.5), term
    bonus = items(LENGTHS, [[1, -1], [0, 1]], target=[p, 1], term=[0, 1])
    assert loss(DPO, Contrast("linear", scale=0.3), batch=bonus, policy=ANCHOR) == pytest.approx(LOG2)  # SELM
    unanchored = loss(DPO, Contrast("linear", scale=0.3, anchored=False), batch=bonus, policy=ANCHOR)
    assert unanchored == pytest.approx(LOG2 + 0.3 * -11.5)  # XPO


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_at_its_start_and_at_its_minimum(tau: float) -> None:
    term, one = Contrast("square", scale=tau), torch.ones(1, dtype=torch.float64)
    start = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = link_loss(term, start, one)
    value.sum().backward()
    assert value.item() == pytest.approx(1 / (4 * tau**2))
    assert start.grad.item() == pytest.approx(-1 / tau)
    assert link_loss(term, one / (2 * tau), one).item() == 0


@given(h=st.floats(-20, 20), p=st.floats(0, 1), tau=st.floats(0.1, 2))
def test_the_square_link_is_the_two_term_loss_less_a_constant(h: float, p: float, tau: float) -> None:
    made = link_loss(Contrast("square", scale=tau), torch.tensor([h]).double(), torch.tensor([p]).double()).item()
    two_terms = p * (h - 1 / (2 * tau)) ** 2 + (1 - p) * (h + 1 / (2 * tau)) ** 2
    assert made == pytest.approx(two_terms - (0.25 - (p - 0.5) ** 2) / tau**2, rel=1e-6, abs=1e-4)


def by_hand(policy: torch.Tensor, p: float) -> dict[str, torch.Tensor]:
    """The losses of chosen = the first 5 tokens, rejected = the last 8, written out from their papers."""
    lp_w, lp_l = policy[:5].sum(), policy[5:].sum()
    u_w, u_l = lp_w + 11, lp_l + 11.5
    h = u_w - u_l
    clean, flipped = torch.log1p(torch.exp(-0.1 * h)), torch.log1p(torch.exp(0.1 * h))
    return {
        "dpo": p * clean + (1 - p) * flipped,
        "robust": (0.9 * clean - 0.1 * flipped) / 0.8,
        "rdpo": -p * torch.nn.functional.logsigmoid(0.1 * h - 0.09)
        - (1 - p) * torch.nn.functional.logsigmoid(0.09 - 0.1 * h),
        "simpo": torch.log1p(torch.exp(-(2 * (lp_w / 5 - lp_l / 8) - 1))),
        "hinge": torch.clamp(1 - 0.1 * h, min=0),
        "ipo": p * (h - 1 / 0.4) ** 2 + (1 - p) * (h + 1 / 0.4) ** 2,
        "ipo_mean": (u_w / 5 - u_l / 8 - (p - 0.5) / 0.2) ** 2,
        "selm": p * clean + (1 - p) * flipped + 0.3 * 0.1 * (lp_l + 11.5),
        "xpo": p * clean + (1 - p) * flipped + 0.3 * lp_l,
        "slic": torch.clamp(4 - lp_w + lp_l, min=0) - 0.2 * lp_w,
    }


@pytest.mark.parametrize(
    ("name", "p", "terms", "second"),
    [
        ("dpo", 0.8, (DPO,), None),
        ("robust", 1.0, (Contrast("robust", scale=0.1, flip_rate=0.1),), None),
        ("rdpo", 0.8, (Contrast("logistic", scale=0.1, length_coef=0.03),), None),
        ("simpo", 1.0, (Contrast("logistic", scale=2.0, offset=0.5, reduce="mean", anchored=False),), None),
        ("hinge", 1.0, (Contrast("hinge", scale=0.1),), None),
        ("ipo", 0.8, (Contrast("square", scale=0.2),), None),
        ("ipo_mean", 0.8, (Contrast("square", scale=0.2, reduce="mean"),), None),
        ("selm", 1.0, (DPO, Contrast("linear", scale=0.03)), (0, 1)),
        ("xpo", 1.0, (DPO, Contrast("linear", scale=0.3, anchored=False)), (0, 1)),
        (
            "slic",
            1.0,
            (Contrast("hinge", margin=4.0, anchored=False), Contrast("linear", scale=-0.2, anchored=False)),
            (1, 0),
        ),
    ],
)
def test_gradients_equal_those_of_the_formulas(
    name: str, p: float, terms: tuple[Contrast, ...], second: tuple[int, int] | None
) -> None:
    policy = POLICY.clone().requires_grad_(True)
    extra = {} if second is None else {"coefficients": [[1, -1], second], "term": [0, 1]}
    batch = items(LENGTHS, target=[p] if second is None else [p, 1.0], **extra)
    (ours,) = torch.autograd.grad(preference_loss(Preference(terms), batch, policy, ANCHOR).sum(), policy)
    (expected,) = torch.autograd.grad(by_hand(policy, p)[name], policy)
    assert torch.allclose(ours, expected, atol=1e-12)
    if name != "ipo_mean":  # p = .8 aims at h = 1.5, and the mean is at .26: below it as the others are
        assert ours[0] < 0 < ours[-1], "chosen up, rejected down"


@given(h=st.floats(-20, 20), p=st.floats(0, 1), beta=st.floats(0.01, 2))
def test_gradient_of_dpo_is_minus_beta_times_surprise(h: float, p: float, beta: float) -> None:
    """dL/dh = -beta (p - s(beta h)), so it vanishes at h = 0 for p = 1/2."""
    contrast = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    link_loss(Contrast("logistic", scale=beta), contrast, torch.tensor([p], dtype=torch.float64)).sum().backward()
    expected = -beta * (p - 1 / (1 + math.exp(-beta * h)))
    assert contrast.grad.item() == pytest.approx(expected, abs=1e-9)


def test_the_bonus_pushes_a_third_response_down_by_its_factor() -> None:
    """dL/dLP(y_gen) = +alpha beta where y_gen is in no pair."""
    lengths = (5, 8, 3)
    policy = tokens((-10, -12, -4), lengths).requires_grad_(True)
    batch = items(lengths, [[1, -1, 0], [0, 0, 1]], term=[0, 1])
    objective = Preference((DPO, Contrast("linear", scale=0.02)))
    preference_loss(objective, batch, policy, torch.zeros(16, dtype=torch.float64)).sum().backward()
    assert torch.allclose(policy.grad[13:], torch.full((3,), 0.02, dtype=torch.float64))


def test_the_robust_loss_is_unbiased_under_flips() -> None:
    """E over flips at rate eps of the robust loss is the clean DPO loss."""
    robust = Contrast("robust", scale=0.1, flip_rate=0.2)
    mean = 0.8 * loss(robust) + 0.2 * loss(robust, batch=items(LENGTHS, [[-1, 1]]))
    assert mean == pytest.approx(loss(DPO), abs=1e-9)


LINKS = [
    DPO,
    Contrast("robust", scale=0.3, flip_rate=0.2),
    Contrast("square", scale=0.5),
    Contrast("hinge", scale=0.3, margin=2.0),
]
probabilities = st.floats(0, 1)
shifts = st.floats(-5, 5)


@pytest.mark.parametrize("term", LINKS, ids=lambda term: term.link)
@given(shift=shifts, p=probabilities)
def test_swapping_the_pair_and_the_label_changes_nothing(term: Contrast, shift: float, p: float) -> None:
    policy = POLICY + shift * torch.linspace(-1, 1, 13).double()
    ours = loss(term, batch=items(LENGTHS, target=[p]), policy=policy)
    swapped = loss(term, batch=items(LENGTHS, [[-1, 1]], target=[1 - p]), policy=policy)
    assert ours == pytest.approx(swapped, abs=1e-9)


@pytest.mark.parametrize("term", LINKS, ids=lambda term: term.link)
@given(shift=st.floats(-50, 50))
def test_a_constant_on_policy_and_reference_of_a_response_cancels(term: Contrast, shift: float) -> None:
    moved = torch.cat([torch.full((5,), shift), torch.zeros(8)]).double()
    assert loss(term, policy=POLICY + moved, anchor=ANCHOR + moved) == pytest.approx(loss(term), abs=1e-7)


@given(times=st.integers(1, 5))
def test_mean_scores_do_not_depend_on_the_length(times: int) -> None:
    """Every token repeated: the mean stays, the sum grows."""
    longer = {
        "batch": items([n * times for n in LENGTHS]),
        "policy": POLICY.repeat_interleave(times),
        "anchor": ANCHOR.repeat_interleave(times),
    }
    term = Contrast("logistic", scale=0.1, reduce="mean")
    assert loss(term, **longer) == pytest.approx(loss(term), abs=1e-9)
    assert (loss(DPO, **longer) == pytest.approx(loss(DPO), abs=1e-9)) == (times == 1)


MIXED = items(
    (2, 3, 1, 4),
    [[1, -1, 0, 0], [0, 0, 1, -1], [1, 0, 0, 0], [0, -1, 1, 0]],
    target=[1.0, 0.7, 1.0, 0.2],
    weight=[1.0, 0.5, 2.0, 0.5],
    term=[0, 0, 1, 0],
)
TWO_TERMS = Preference((DPO, Contrast("linear", scale=0.2, anchored=False)))
values = st.lists(st.floats(-6, 0), min_size=10, max_size=10).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(policy=values, anchor=values, order=st.permutations(range(4)))
def test_the_order_of_items_and_responses_changes_nothing(
    policy: torch.Tensor, anchor: torch.Tensor, order: list[int]
) -> None:
    whole = preference_loss(TWO_TERMS, MIXED, policy, anchor)
    shuffled = replace(
        MIXED, **{name: getattr(MIXED, name)[order] for name in ("coefficients", "target", "weight", "term")}
    )
    assert torch.allclose(preference_loss(TWO_TERMS, shuffled, policy, anchor), whole[order])
    place = torch.tensor(order).argsort()  # response i becomes response place[i]
    moved = replace(MIXED, response=place[MIXED.response], coefficients=MIXED.coefficients[:, order])
    assert torch.allclose(preference_loss(TWO_TERMS, moved, policy, anchor), whole)


@given(policy=values, anchor=values, cut=st.integers(0, 4))
def test_a_batch_is_the_sum_of_its_parts(policy: torch.Tensor, anchor: torch.Tensor, cut: int) -> None:
    """Also where a part has no item at all: it still takes part in the backward pass, with a gradient of zero."""

    def part(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = policy.clone().requires_grad_(True)
        batch = replace(
            MIXED, **{name: getattr(MIXED, name)[rows] for name in ("coefficients", "target", "weight", "term")}
        )
        total = preference_loss(TWO_TERMS, batch, leaf, anchor).sum()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    (whole, gradient), first, second = part(slice(None)), part(slice(cut)), part(slice(cut, None))
    assert torch.allclose(first[0] + second[0], whole)
    assert torch.allclose(first[1] + second[1], gradient)


def test_weight_zero_contributes_neither_loss_nor_gradient() -> None:
    policy = torch.full((10,), -1.0, dtype=torch.float64, requires_grad=True)
    losses = preference_loss(
        TWO_TERMS, replace(MIXED, weight=torch.tensor([1.0, 0, 0, 0])), policy, torch.zeros(10).double()
    )
    losses.sum().backward()
    assert losses[1:].tolist() == [0, 0, 0]
    assert policy.grad[5:].tolist() == [0] * 5
    assert policy.grad[0] < 0 < policy.grad[4]


def test_sums_and_means_per_response() -> None:
    of = torch.tensor([0, 0, 2, 2, 2])
    numbers = torch.tensor([1.0, 3.0, 1.0, 2.0, 6.0])
    assert response_sums(numbers, of, 3, "sum").tolist() == [4, 0, 9]
    assert response_sums(numbers, of, 3, "mean").tolist() == [2, 0, 3]


def test_an_unknown_link_is_refused() -> None:
    with pytest.raises(ValueError, match="known: logistic"):
        link_loss(Contrast("cubic"), torch.zeros(1), torch.zeros(1))  # type: ignore[arg-type]
