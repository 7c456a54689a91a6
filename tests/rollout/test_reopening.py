"""An engine that dies, wherever it does, costs the session for weights; the next one is without it. No engine is needed to see this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf.cluster import ActorDied, LocalHandle
from rlhf.rollout import NoEngines, RolloutPool, Sampling, StaleWeights
from rlhf.rollout.engine import EngineInfo
from rlhf.transfer import TransferSession
from rlhf.transfer.versions import Attestation
from rlhf.types import Prompt, Shipment
from tests.rollout.test_sharing import make

PROMPT, SAMPLING = Prompt("p", (1, 2), "two"), Sampling(1, 4)


class Engine:
    """Holds nothing and answers with nothing; dies in the method that it is told."""

    def __init__(self, index: int):
        self.index, self.dies_in = index, ""
        self.joined: list[tuple[int, int]] = []

    def _live(self, method: str) -> None:
        if self.dies_in == method:
            self.dies_in = "always"
        if self.dies_in == "always":
            raise ActorDied(f"rollout-{self.index} died while the driver waited for its {method}")

    async def join_transfer(self, session: TransferSession, offset: int) -> None:
        self._live("join_transfer")
        self.joined.append((session.epoch, offset))

    async def receive_weights(self, shipment: Shipment) -> Attestation:
        self._live("receive_weights")
        return Attestation(self.index, shipment.version, "f")

    async def sample(self, prompt: Prompt, samplings: list[Sampling], with_pair: bool) -> tuple[tuple, list]:
        self._live("sample")
        return (), []


@pytest.fixture
def engines() -> list[Engine]:
    return [Engine(index) for index in range(3)]


@pytest.fixture
def pool(engines: list[Engine]) -> RolloutPool:
    handles: list[Any] = [LocalHandle(f"rollout-{engine.index}", engine) for engine in engines]
    infos = [EngineInfo(engine.index, 2, "alpha", 100 + engine.index, "/logs/one") for engine in engines]
    return RolloutPool(make(engines=3), "gloo", handles, infos)


async def publish(pool: RolloutPool, version: int, connects: bool = True) -> None:
    if connects:
        await pool.connect(pool.new_session("127.0.0.1", 1))
    shipment = Shipment(version, "policy", ())
    await pool.receive(shipment)
    pool.accept(shipment, "f")


@pytest.mark.parametrize("method", ["join_transfer", "receive_weights", "sample"])
def test_weights_are_sent_again_without_the_dead(method: str, pool: Any, engines: list[Engine], run: Callable) -> None:
    run(publish(pool, 1))
    engines[0].dies_in = method
    if method == "sample":
        assert run(pool.sample(PROMPT, [SAMPLING])).prompt == PROMPT, "another engine answers"
    else:
        with pytest.raises(ActorDied):
            run(publish(pool, 2))
    if method == "receive_weights":
        with pytest.raises(StaleWeights, match="not yet confirmed"):
            run(pool.sample(PROMPT, [SAMPLING]))
    with pytest.raises(
        StaleWeights, match=r"\[1, 2\] are alive.*rollout-0 \(process 100 on alpha\) died: .*/logs/one\."
    ):
        run(publish(pool, 2, connects=False))
    assert (pool.engines, pool.workers, pool.missing) == (2, 4, ("policy",))
    run(publish(pool, 2))
    assert pool.missing == ()
    assert run(pool.sample(PROMPT, [SAMPLING])).prompt == PROMPT
    epochs = [epoch for epoch, _ in engines[1].joined]
    assert epochs == sorted(set(epochs)), "each session has a larger epoch"
    assert [engine.joined[-1][1] for engine in engines[1:]] == [1, 3], "ranks close up"
    assert list(run(pool.probe(PROMPT, [SAMPLING]))) == [1, 2]


def test_the_last_death_is_told_with_all_before_it(pool: Any, engines: list[Engine], run: Callable) -> None:
    for engine in engines:
        engine.dies_in = "sample"
    with pytest.raises(NoEngines, match="prompt p lost two engines in a row. rollout-0 .* rollout-1"):
        run(pool.sample(PROMPT, [SAMPLING]))
    with pytest.raises(NoEngines, match="no rollout engine is left. rollout-0 .* rollout-1 .* rollout-2"):
        run(pool.sample(PROMPT, [SAMPLING]))
