"""Frozen models and their update rules, on real DeepSpeed: what the reference becomes, and that nothing else changes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algorithms import Algorithm, Contrast, Preference, Source
from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed, Previous, UpdateRule, due, equals_policy
from rlhf.policy import InvariantBroken
from rlhf.policy.rank import PolicyRank
from rlhf.training.deepspeed_zero3 import local_shards
from rlhf.training.model import probe_rows
from rlhf.training.packing import idle

STAGES = (0, 1, 3)


def algorithm(reference: UpdateRule, partner: UpdateRule | None = None) -> Algorithm:
    objective = Preference((Contrast("logistic", scale=0.1),))
    return Algorithm("test", (Source("policy", 2),), lambda *_: (), objective, reference, partner)


def test_when_rules_act() -> None:
    assert [due(Previous(every=3), step) for step in range(1, 7)] == [False, False, True, False, False, True]
    assert [due(Extrapolated(every=2, alpha=0.3), step) for step in range(1, 5)] == [False, True, False, True]
    assert all(due(Ema(0.9), step) for step in range(1, 4))
    assert not any(due(Fixed(), step) for step in range(1, 4))


def test_when_reference_and_policy_must_agree() -> None:
    assert all(equals_policy(rule, 1) for rule in (Fixed(), Previous(2), Ema(0.9), Extrapolated(2, 0.3)))
    assert [equals_policy(Previous(2), step) for step in range(1, 6)] == [True, False, True, False, True]
    assert not any(equals_policy(rule, 2) for rule in (Fixed(), Ema(0.9)))


@pytest.fixture
def rank(tiny_settings: Callable) -> Callable:
    def start(rule: UpdateRule, partner: UpdateRule | None = None, **policy: Any) -> PolicyRank:
        settings = tiny_settings(policy={"learning_rate": 1e-3} | policy)
        made = PolicyRank(0, settings, algorithm(rule, partner), total_updates=10)
        made.setup(*made.address())
        return made

    return start


def weights(module: torch.nn.Module) -> torch.Tensor:
    """All of this rank's weights as one vector."""
    return torch.cat([shard.detach().float().flatten() for shard in local_shards(module)])


def fill(rank: PolicyRank, value: float) -> None:
    """Make every weight of the policy `value`."""
    rank.policy.set_masters(torch.full_like(master, value) for master in rank.policy.masters())


@pytest.mark.engine
@pytest.mark.parametrize("stage", STAGES)
def test_previous_takes_the_policy_over_at_the_end_of_a_round(rank: Callable, stage: int) -> None:
    one = rank(Previous(every=2), zero_stage=stage)
    start = weights(one.reference.model)
    fill(one, 0.25)
    assert one.follow(1) == {"reference": False, "partner": False}
    assert torch.equal(weights(one.reference.model), start)
    assert one.follow(2) == {"reference": True, "partner": True}
    assert torch.equal(weights(one.reference.model), weights(one.policy.engine.module))
    fill(one, 0.5)
    one.check_anchors()
    assert weights(one.reference.model).unique().tolist() == [0.25], "a copy, not the policy itself"


@pytest.mark.engine
def test_ema_averages_in_fp32_even_for_bf16_weights(rank: Callable) -> None:
    """One step of 1/1000 is far below the spacing of bf16, a thousand of them are not."""
    one = rank(Fixed(), partner=Ema(0.999), dtype="bf16")
    fill(one, 1.0)
    start = weights(one.partner.model).mean().item()
    assert one.follow(1) == {"reference": False, "partner": True}
    for _ in range(2, 1001):
        for average, new in zip(one.partner._memory, local_shards(one.policy.engine.module), strict=True):
            average.lerp_(new.float(), 1 - 0.999)
    one.follow(1001)
    expected = 1.0 - (1.0 - start) * 0.999**1001
    assert weights(one.partner.model).mean().item() == pytest.approx(expected, abs=3e-3)
    assert torch.equal(weights(one.reference.model).mean(), torch.tensor(start)), "the reference is another model"


@pytest.mark.engine
@pytest.mark.parametrize("stage", STAGES)
def test_extrapolation_moves_policy_and_reference(rank: Callable, stage: int) -> None:
    """Iterates 1, then 2: with alpha 1 both become 3; the first round has nothing to move on from."""
    one = rank(Extrapolated(every=1, alpha=1.0), zero_stage=stage)
    fill(one, 1.0)
    one.follow(1)
    assert weights(one.policy.engine.module).unique().tolist() == [1.0]
    fill(one, 2.0)
    one.follow(2)
    assert weights(one.policy.engine.module).unique().tolist() == [3.0]
    assert weights(one.reference.model).unique().tolist() == [3.0]
    logprobs, _ = one.policy.forward(idle(one.device))
    one.policy.backward(0 * logprobs.sum())
    one.policy.step()
    assert weights(one.policy.engine.module).unique().tolist() == [3.0], "the optimizer goes on from the moved weights"


@pytest.mark.engine
def test_without_alpha_extrapolation_is_the_previous_iterate(rank: Callable) -> None:
    one = rank(Extrapolated(every=1, alpha=0.0))
    for value in (1.0, 2.0):
        fill(one, value)
        one.follow(1)
        assert weights(one.reference.model).unique().tolist() == [value]
        assert weights(one.policy.engine.module).unique().tolist() == [value]


def rounds(rank: Callable, rule: UpdateRule, **policy: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's master weights, as one vector, before and after eight rounds of one optimizer step each."""
    one = rank(rule, **policy)
    row, _ = probe_rows(100, one.device)
    start = torch.cat([master.detach().flatten().clone() for master in one.policy.masters()])
    for step in range(1, 9):
        one.policy.backward(one.policy.forward(row)[0].sum())
        one.policy.step()
        one.follow(step)
        assert torch.equal(one.reference.logprobs(row), one.policy.forward(row)[0].detach()), "whole copies included"
    return start, torch.cat([master.detach().flatten() for master in one.policy.masters()])


@pytest.mark.engine
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_extrapolation_of_bf16_weights_moves_as_far_as_that_of_fp32(rank: Callable, stage: int) -> None:
    """A step of 1e-5 is below the spacing of most bf16 weights: the fp32 masters must keep it from round to round."""
    start, end = rounds(rank, Extrapolated(1, 0.3), zero_stage=stage, learning_rate=1e-5, dtype="bf16")
    exact_start, exact_end = rounds(rank, Extrapolated(1, 0.3), zero_stage=stage, learning_rate=1e-5, dtype="fp32")
    assert (end - start).norm().item() == pytest.approx((exact_end - exact_start).norm().item(), rel=0.15)


@pytest.mark.engine
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_without_alpha_bf16_weights_learn_as_with_the_previous_iterate(rank: Callable, stage: int) -> None:
    one, other = (
        rounds(rank, rule, zero_stage=stage, learning_rate=1e-5, dtype="bf16")[1]
        for rule in (Extrapolated(1, 0.0), Previous(1))
    )
    assert torch.equal(one, other)


@pytest.mark.engine
def test_an_anchor_that_changes_by_itself_is_found(rank: Callable) -> None:
    one = rank(Fixed())
    one.check_anchors()
    next(local_shards(one.reference.model)).data[0] += 1e-3
    with pytest.raises(InvariantBroken, match="reference changed by themselves"):
        one.check_anchors()


@pytest.mark.engine
@pytest.mark.parametrize("rule", [Previous(1), Ema(0.9), Extrapolated(1, 0.5)])
def test_a_restored_anchor_goes_on_as_if_nothing_had_happened(rank: Callable, rule: UpdateRule, tmp_path: Path) -> None:
    def three_steps(interrupted: bool) -> torch.Tensor:
        one = rank(rule)
        for step, value in enumerate((0.5, 1.0, 4.0), start=1):
            if interrupted and step == 3:
                one.save(str(tmp_path), "two")
                one = rank(rule)
                one.load(str(tmp_path), "two")
            fill(one, value)
            one.follow(step)
        return weights(one.reference.model)

    assert torch.equal(three_steps(False), three_steps(True))
