"""Where the methods come to rest, on a game whose equilibrium is known, through the package's builders and losses.

The game is cyclic: each of three actions beats the next. Its regularised Nash equilibrium, pi proportional to
ref exp(P(. beats pi) / tau), is computed beside by iterating that equation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.algorithms.tabular import CYCLE, World, declared, equilibrium, residual

NASH = [
    ("online_ipo", 0.0, {}),
    ("ipo_md", 0.25, {"mixture": 0.25}),
    ("nash_md", 0.25, {"mixture": 0.25}),
    ("nash_md", 0.0, {"mixture": 0.0}),
    ("nash_ema", 0.0, {"opponent_decay": 0.9}),
]


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize(("name", "mixture", "fields"), NASH, ids=[f"{name}-{mixture}" for name, mixture, _ in NASH])
def test_nash_methods_reach_the_regularised_equilibrium(
    name: str, mixture: float, fields: dict[str, Any], tau: float
) -> None:
    learned = World(declared(name, tau=tau, **fields), CYCLE).learn(steps=600, rate=0.5)
    assert residual(learned, CYCLE, tau, mixture) < 1e-6
    assert torch.allclose(learned.exp(), equilibrium(CYCLE, tau, mixture).exp(), atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_online_dpo_rests_elsewhere(tau: float) -> None:
    world = World(declared("online_dpo", beta=tau, labels="soft", pairing="random"), CYCLE)
    learned, further = world.learn(steps=400, rate=4.0), world.learn(steps=600, rate=4.0)
    assert torch.allclose(learned, further, atol=1e-4), "it has come to rest"
    assert residual(learned, CYCLE, tau) > 0.05


def test_nash_md_and_ipo_md_agree_and_their_mixture_is_the_equilibrium_of_a_weaker_game() -> None:
    """pi*_m is the Nash equilibrium at temperature tau / (1 - m)."""
    tau, m = 0.3, 0.25
    ours = World(declared("ipo_md", tau=tau, mixture=m), CYCLE).learn(600, 0.5)
    other = World(declared("nash_md", tau=tau, mixture=m), CYCLE).learn(600, 0.5)
    assert torch.allclose(ours, other, atol=1e-6)
    start = equilibrium(CYCLE, 1e9)  # the reference itself
    mixed = ((1 - m) * ours + m * start).log_softmax(0)
    assert residual(mixed, CYCLE, tau / (1 - m)) < 1e-6
    assert residual(ours, CYCLE, tau) > 1e-3, "unlike self-play's"


def test_ipo_md_without_mixture_is_online_ipo() -> None:
    plain, mixing = declared("online_ipo"), declared("ipo_md", mixture=0.0)
    assert (mixing.build.func, mixing.build.keywords) == (plain.build.func, plain.build.keywords)
    assert (mixing.objective, mixing.reference) == (plain.objective, plain.reference)
    assert not mixing.mixes
    assert torch.equal(World(mixing, CYCLE).learn(50, 0.5), World(plain, CYCLE).learn(50, 0.5))


@pytest.mark.parametrize(("tau", "first"), [(1.0, 0.549834), (0.1, 0.880797)])
@pytest.mark.parametrize("name", ["online_ipo", "ipo_md"])
def test_two_actions(name: str, tau: float, first: float) -> None:
    """Uniform reference, the first wins with probability .7: pi_1 = s((p - 1/2) / tau)."""
    world = World(declared(name, tau=tau), np.array([[0.5, 0.7], [0.3, 0.5]]))
    learned = world.learn(400, 0.5, start=torch.zeros(2, dtype=torch.float64).log_softmax(0))
    assert learned.exp()[0].item() == pytest.approx(first, abs=1e-6)


def test_all_pairs_of_more_responses_find_the_same_two_action_optimum() -> None:
    world = World(
        declared("online_ipo", tau=0.5, pairing="all", samples_per_prompt=3), np.array([[0.5, 0.7], [0.3, 0.5]])
    )
    learned = world.learn(400, 0.5, start=torch.zeros(2, dtype=torch.float64).log_softmax(0))
    assert learned.exp()[0].item() == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-6)


def test_the_gradient_of_online_ipo_is_that_of_self_play() -> None:
    """Proposition 5.1: both are E[grad log pi(y) (P(y beats pi) - 1/2 - tau U(y))] up to a factor, here 4 / tau.

    The square gives one 2, and y and y' contribute alike: another.
    """
    tau = 0.4
    policy = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def gradient(name: str, **fields: Any) -> torch.Tensor:
        world = World(declared(name, tau=tau, **fields), CYCLE)
        logits = policy.clone().requires_grad_(True)
        now, start = logits.log_softmax(0), equilibrium(CYCLE, 1e9)
        (result,) = torch.autograd.grad(world.loss(now, start, world.chances(now.detach(), start)), logits)
        return result

    assert torch.allclose(gradient("online_ipo"), 4 / tau * gradient("nash_md", mixture=0.0), atol=1e-7)
