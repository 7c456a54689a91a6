"""What staleness does to the methods, on games of three actions whose ends are known: `Ahead` of each method says it in words.

The policy of k optimizer steps before writes what a step learns from; all expectations are exact. The numbers here are those of
docs/algorithms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.algorithms.tabular import CYCLE, REFERENCE, World, declared, equilibrium
from tests.algorithms.test_learning import LIKELY_SECOND, REWARDS, R, log_ratio

BETA = 0.5
OPTIMUM = (REFERENCE + R / BETA).log_softmax(0)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference in probability."""
    return (one.exp() - other.exp()).abs().max().item()


def bare_gradient(correction: str, name: str = "reinforce_pp", **fields: Any) -> World:
    """A policy gradient with the KL in the reward and no whitening."""
    return World(declared(name, kl_coef=BETA, samples_per_prompt=2, correction=correction, **fields), REWARDS)


# Policy gradients


@pytest.mark.parametrize("staleness", [1, 4])
@pytest.mark.parametrize(("name", "fields"), [("reinforce_pp", {"whiten": False}), ("rloo", {}), ("dr_grpo", {})])
def test_with_correction_a_policy_gradient_goes_the_very_same_way(
    name: str, fields: dict[str, Any], staleness: int
) -> None:
    """For a response of one token E_mu[w grad log pi A] = E_pi[grad log pi A] while no weight is clamped."""
    kl = {} if name == "dr_grpo" else {"kl_coef": BETA}
    world = World(declared(name, samples_per_prompt=2, **kl, **fields), REWARDS)
    rate = 2.0 * world.algorithm.objective.max_tokens if name == "dr_grpo" else 2.0
    for steps in (1, 3, 6, 12):
        assert distance(world.learn(steps, rate, staleness=staleness), world.learn(steps, rate)) < 1e-9
    if kl:
        assert distance(world.learn(120, rate, staleness=staleness), OPTIMUM) < 1e-6


def test_a_spread_is_that_of_the_older_policys_group() -> None:
    """With two responses the advantage is the sign of their difference: a response is compared with what the older policy writes."""
    world = World(declared("cispo", samples_per_prompt=2), REWARDS)
    assert distance(world.learn(6, 1.0, staleness=1), world.learn(6, 1.0)) > 0.005


@pytest.mark.parametrize(("staleness", "off"), [(1, 0.68), (4, 0.37)])
def test_without_correction_it_goes_astray_unless_it_is_slow(staleness: int, off: float) -> None:
    world = bare_gradient("none", whiten=False)
    assert distance(world.learn(150, 2.0), OPTIMUM) < 1e-6, "of its own responses it learns as well"
    assert distance(world.learn(150, 2.0, staleness=staleness), OPTIMUM) == pytest.approx(off, abs=0.01)
    assert distance(world.learn(6, 0.5, staleness=staleness), world.learn(6, 0.5)) > 0.02, "another way"
    assert distance(world.learn(300, 0.5, staleness=staleness), OPTIMUM) < 1e-4, "to the same point: there mu is pi"


def test_from_the_first_policys_responses_alone_only_weights_lead_to_the_optimum() -> None:
    """Staleness without end. The clamp, at 5, is above pi / mu at the optimum."""
    assert distance(bare_gradient("tis", whiten=False).learn(120, 1.0, resample=False), OPTIMUM) < 1e-4
    rested = bare_gradient("none", whiten=False).learn(120, 1.0, resample=False)
    assert distance(rested, OPTIMUM) == pytest.approx(0.18, abs=0.01)


def test_rloo_rests_at_its_optimum_whoever_wrote_the_responses() -> None:
    """There R - beta U is the same for all responses, so every difference is 0."""
    assert distance(bare_gradient("none", "rloo").learn(120, 1.0, resample=False), OPTIMUM) < 1e-6


# Contrasts


@pytest.mark.parametrize("staleness", [1, 4, 16])
def test_online_dpos_optimum_does_not_depend_on_who_wrote_the_pairs(staleness: int) -> None:
    world = World(declared("online_dpo", beta=BETA, labels="soft", pairing="random"), REWARDS)
    assert distance(world.learn(200, 4.0 / BETA**2, staleness=staleness), OPTIMUM) < 1e-5


@pytest.mark.parametrize(
    ("name", "mixture", "circling"), [("online_ipo", 0.0, 0.24), ("ipo_md", 0.125, 0.04)], ids=["online_ipo", "ipo_md"]
)
def test_a_policy_that_rests_is_at_the_equilibrium_and_a_stale_one_may_circle(
    name: str, mixture: float, circling: float
) -> None:
    fields = {"mixture": mixture} if mixture else {}

    def off(tau: float, rate: float, staleness: int, steps: int = 800) -> float:
        learned = World(declared(name, tau=tau, **fields), CYCLE).learn(steps, rate, staleness=staleness)
        return distance(learned, equilibrium(CYCLE, tau, mixture))

    assert off(1.0, 1.0, 16, steps=300) < 1e-6
    assert off(0.1, 0.1, 1) < 1e-6
    assert off(0.1, 0.1, 4) == pytest.approx(circling, abs=0.01)
    assert off(0.1, 0.02, 4) < 1e-6


def test_nash_md_which_is_refused_would_still_rest_at_the_equilibrium_of_a_small_game() -> None:
    learned = World(declared("nash_md", tau=0.3, mixture=0.25), CYCLE).learn(300, 1.0, staleness=4)
    assert distance(learned, equilibrium(CYCLE, 0.3, 0.25)) < 1e-6


@pytest.mark.parametrize("staleness", [1, 4])
def test_where_raft_and_xpo_rest_does_not_change(staleness: int) -> None:
    raft = World(declared("raft", samples_per_prompt=2, kl_weight=0.5), [7.0, 0.0])
    assert log_ratio(raft.learn(300, 2.0, LIKELY_SECOND, staleness=staleness), LIKELY_SECOND) == pytest.approx(2.0)
    xpo = World(declared("xpo", alpha=0.05, beta=0.5, labels="soft"), [1.0, 0.0])
    rested = [xpo.learn(1000, 5.0, LIKELY_SECOND, staleness=k) for k in (0, staleness)]
    assert distance(*rested) < 1e-6


def test_raft_imitates_the_best_of_an_older_policy() -> None:
    world = World(declared("raft", samples_per_prompt=3), REWARDS)
    best = [world.learn(10, 1.0, staleness=k).exp()[0].item() for k in (0, 1, 4)]
    assert best == pytest.approx([0.91, 0.89, 0.73], abs=0.005)
