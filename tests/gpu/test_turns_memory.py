"""What a policy gives back while it is offloaded, in CUDA memory. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf.cluster import LocalRuntime
from rlhf.policy import PolicyGroup
from tests.helpers import rank_inside
from tests.policy.test_group import PPO, context, declare, make_assignments

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_offloaded_policy_keeps_only_its_weights(tiny_settings: Callable, run: Callable, stage: int) -> None:
    settings = tiny_settings(policy={"dtype": "bf16", "zero_stage": stage}, cluster={"device": "cuda"})

    async def use() -> tuple[int, int, int, int]:
        group = await PolicyGroup.start(LocalRuntime(), settings, declare(PPO), 1)
        await group.learn(make_assignments(PPO, False), context(PPO, 1, equal=False))
        rank = rank_inside(group)
        weights = sum(
            p.numel() * p.element_size() for t in rank.learner.trainers.values() for p in t.engine.module.parameters()
        )
        loaded = torch.cuda.memory_allocated()
        await group.offload()
        offloaded = torch.cuda.memory_allocated()
        await group.reload()
        again = torch.cuda.memory_allocated()
        await group.close()
        return weights, loaded, offloaded, again

    weights, loaded, offloaded, again = run(use())
    assert loaded - offloaded > 2 * weights, "bf16 states are at least twelve bytes for each two of weights"
    assert again == pytest.approx(loaded, rel=0.02)
