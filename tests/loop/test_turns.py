"""Policy and engines in turns on the same devices: nothing that a run computes may depend on it.

A CPU has nothing to give back, so here the turns are forced: who sleeps, is offloaded, is reloaded and sends again is the same as on
a GPU, and an engine that has dropped its weights refuses to answer until they are sent again. `tests/gpu` measures the memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.loop import starting
from rlhf.policy import PolicyGroup
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout import pool as pool_module
from rlhf.rollout.pool import RolloutPool
from tests.loop.test_methods import train

pytestmark = pytest.mark.engine
# Not `cpu`, where a sleep level is refused as unused.
OPTIONS = ["loop.eval_every=1", "checkpoint.every=1", "checkpoint.export=true", "cluster.device=auto"]
NAMES = ("reward/mean", "policy/loss", "policy/grad_norm", "rollout/logprob")


@pytest.mark.parametrize("method", ["nash_ema", "ppo"])
def test_a_run_in_turns_equals_one_without(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With evaluations, checkpoints and an export between the steps, a second model in the engines, and a critic."""
    expected = train(method, tmp_path / "apart", *OPTIONS)
    calls: list[str] = []
    for cls, names in (
        (PolicyGroup, ("offload", "reload")),
        (RolloutPool, ("offload", "reload")),
        (RewardPool, ("offload", "reload")),
    ):
        for name in names:
            monkeypatch.setattr(cls, name, _watched(getattr(cls, name), f"{cls.__name__}.{name}", calls))
    for cls in (RolloutPool, RewardPool):
        start = _watched(cls.start.__func__, f"{cls.__name__}.start", calls)
        monkeypatch.setattr(cls, "start", classmethod(start))
    monkeypatch.setattr(starting, "takes_turns", lambda settings, debug: True)
    monkeypatch.setattr(starting, "shared_rewards", lambda settings, debug: True)
    monkeypatch.setattr(pool_module, "shared_engines", lambda settings, debug: frozenset({0}))
    for level in (1, 2):
        calls.clear()
        steps = train(method, tmp_path / f"level-{level}", *OPTIONS, f"rollout.sleep_level={level}")
        for one, other in zip(steps, expected, strict=True):
            for name in NAMES:
                assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), (one["step"], name)
        started = ["PolicyGroup.offload", "RewardPool.start", "RolloutPool.start"]
        assert calls[:3] == started, "an engine starts when policy and reward models take what they will have beside it"
        turn = ["RolloutPool.offload", "RewardPool.offload", "PolicyGroup.reload"]
        turn += ["PolicyGroup.offload", "RolloutPool.reload", "RewardPool.reload"]
        assert len(calls) > 6 * len(steps)
        assert calls[3:] == turn * (len(calls) // 6), "only the policy has the devices while it is loaded"


def _watched(method: Any, name: str, calls: list[str]) -> Any:
    async def watch(self: Any, *args: Any) -> Any:
        calls.append(name)
        return await method(self, *args)

    return watch
