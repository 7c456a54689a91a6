"""What sharing GPUs means for the pool: who sleeps. No engine is needed to ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf.cluster import LocalHandle
from rlhf.config import Settings
from rlhf.rollout.engine import EngineInfo
from rlhf.rollout.pool import RolloutPool


def make(ranks: int = 1, engines: int = 1, **cluster: Any) -> Settings:
    return Settings(
        data={"prompts": "p"},
        policy={"model": "m", "ranks": ranks},
        rollout={"engines": engines},
        reward={"path": "m:f", "kind": "function"},
        cluster={"device": "cuda"} | cluster,
    )


COLOCATED = {"placement": "colocated"}


class Sleeper:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def offload(self) -> None:
        self.calls.append("offload")

    def reload(self) -> None:
        self.calls.append("reload")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize(
    ("settings", "sleeping"),
    [
        (make(ranks=2, engines=2), []),
        (make(ranks=2, engines=2, **COLOCATED), [0, 1]),
        (make(ranks=2, engines=3, placement="mixed", colocated_engines=1), [0]),
    ],
)
def test_only_engines_that_share_sleep(settings: Settings, sleeping: list[int], run: Callable) -> None:
    engines = [Sleeper() for _ in range(settings.rollout.engines)]
    infos = [EngineInfo(i, 1, "host", 1, None) for i in range(len(engines))]
    pool = RolloutPool(settings, "gloo", [LocalHandle(f"rollout-{i}", e) for i, e in enumerate(engines)], infos)
    for call in (pool.offload, pool.reload, pool.close):
        run(call())
    for index, engine in enumerate(engines):
        assert engine.calls == (["offload", "reload", "close"] if index in sleeping else ["close"])
