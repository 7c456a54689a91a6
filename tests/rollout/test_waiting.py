"""Requests and answers while weights are under way: they wait for the publication's end, and count only if it ends well. No vLLM is needed
to see this."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from rlhf.cluster import DeadlineExpired, LocalHandle, together
from rlhf.config import Settings
from rlhf.engines.engine import Engine, Sampled
from rlhf.rollout import RolloutPool, Sampling, StaleWeights
from rlhf.rollout.engine import EngineInfo, RolloutEngine
from rlhf.transfer import TransferFailed, TransferSession
from rlhf.transfer.versions import Attestation
from rlhf.types import CompletionInfo, Prompt, Shipment, Span
from tests.rollout.test_sharing import make

PROMPT, SAMPLING = Prompt("p", (1, 2), "two"), Sampling(1, 4)


def shipment(version: int) -> Shipment:
    return Shipment(version, "policy", ())


async def turn() -> None:
    """Let all others go as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Writer:
    """An engine that writes its first token with the weights that it holds when it is asked, and its second with those that it holds when
    it may go on."""

    def __init__(self) -> None:
        self.version, self.asked = 0, 0
        self.goes_on, self.arrives = asyncio.Event(), asyncio.Event()
        self.goes_on.set()
        self.arrives.set()
        self.attests = "f"

    async def join_transfer(self, session: TransferSession, offset: int) -> None: ...

    async def receive_weights(self, sent: Shipment) -> Attestation:
        await self.arrives.wait()
        if self.attests == "nothing":
            raise TransferFailed("broke off")
        self.version = sent.version
        return Attestation(0, sent.version, self.attests)

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool) -> tuple[tuple, list]:
        self.asked += 1
        first = self.version
        await self.goes_on.wait()
        spans = (Span(0, 2, first),) if first == self.version else (Span(0, 1, first), Span(1, 2, self.version))
        return (CompletionInfo(spans, "", 0.0, "stop"),), []


class World:
    """A pool of one such engine, and its publications."""

    def __init__(self, deadline: float = 600.0) -> None:
        self.engine = Writer()
        handles: list[Any] = [LocalHandle("rollout-0", self.engine)]
        self.pool = RolloutPool(
            make(publish_deadline_s=deadline), "gloo", handles, [EngineInfo(0, 1, "alpha", 1, None)]
        )

    async def connect(self) -> None:
        await self.pool.connect(self.pool.new_session("127.0.0.1", 1))

    async def publish(self, version: int) -> None:
        await self.pool.receive(shipment(version))
        self.pool.accept(shipment(version), "f")

    def sample(self) -> asyncio.Task:
        return asyncio.ensure_future(self.pool.sample(PROMPT, [SAMPLING]))

    def probe(self) -> asyncio.Task:
        return asyncio.ensure_future(self.pool.probe(PROMPT, [SAMPLING]))


Story = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture
def told(run: Callable) -> Callable[[Story], None]:
    """Runs a story with a world whose engine has taken version 1."""

    def tell(story: Story) -> None:
        async def start() -> None:
            world = World()
            await world.connect()
            await world.publish(1)
            await story(world)

        run(start())

    return tell


def test_requests_wait_from_receive_to_accept(told: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.engine.arrives.clear()
        receiving = asyncio.ensure_future(world.pool.receive(shipment(2)))
        await turn()
        requests = [world.sample(), world.probe()]
        await turn()
        world.engine.arrives.set()
        await receiving
        await turn()
        assert world.engine.asked == 0, "also between the arrival and its confirmation"
        world.pool.accept(shipment(2), "f")
        rollout, probed = await asyncio.gather(*requests)
        assert rollout.infos[0].versions == probed[0].infos[0].versions == (2,)

    told(story)


def test_a_request_under_way_goes_on_with_the_new_weights(told: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.engine.goes_on.clear()
        asked = world.sample()
        await turn()
        await world.publish(2)
        await world.publish(3)
        world.engine.goes_on.set()
        assert (await asked).infos[0].spans == (Span(0, 1, 1), Span(1, 2, 3))

    told(story)


def test_an_answer_waits_until_the_weights_that_wrote_it_are_accepted(told: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.engine.goes_on.clear()
        asked = world.sample()
        await turn()
        await world.pool.receive(shipment(2))
        world.engine.goes_on.set()
        await turn()
        assert not asked.done()
        world.pool.accept(shipment(2), "f")
        assert (await asked).infos[0].versions == (1, 2)

    told(story)


@pytest.mark.parametrize("trouble", ["at the engine", "not what was sent", "cancelled", "sent anew"])
def test_when_a_publication_fails_nobody_waits_and_nothing_counts(told: Callable[[Story], None], trouble: str) -> None:
    async def story(world: World) -> None:
        world.engine.goes_on.clear()
        under_way = world.sample()
        await turn()
        world.engine.arrives.clear()
        receiving = asyncio.ensure_future(world.pool.receive(shipment(2)))
        await turn()
        waiting = [world.sample(), world.probe()]
        await turn()
        if trouble == "cancelled":
            receiving.cancel()
        else:
            world.engine.attests = "nothing" if trouble == "at the engine" else "something else"
        world.engine.arrives.set()
        (failure,) = await asyncio.gather(receiving, return_exceptions=True)
        if trouble == "not what was sent":
            with pytest.raises(StaleWeights, match="the engines attest"):
                world.pool.accept(shipment(2), "f")
        elif trouble == "sent anew":  # and nobody said a word of the shipment before
            await world.connect()
        else:
            assert isinstance(failure, asyncio.CancelledError if trouble == "cancelled" else TransferFailed)
        for request in waiting:
            with pytest.raises(StaleWeights, match="pool.accept has not yet confirmed"):
                await request
        world.engine.attests = "f"
        await world.connect()
        await world.publish(2)
        world.engine.goes_on.set()
        with pytest.raises(StaleWeights, match="weights that were sent meanwhile were not accepted"):
            await under_way
        assert (await world.sample()).infos[0].versions == (2,)

    told(story)


def test_one_who_waits_can_be_cancelled(told: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.pool.receive(shipment(2))
        waiting, other = world.sample(), world.sample()
        await turn()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        world.pool.accept(shipment(2), "f")
        assert (await other).infos[0].versions == (2,)

    told(story)


def test_a_publication_without_an_end_is_not_waited_for_permanently(run: Callable) -> None:
    async def story() -> None:
        world = World(deadline=0.1)
        await world.connect()
        await world.pool.receive(shipment(1))
        with pytest.raises(DeadlineExpired, match=r"waited 0\.1 s for weights .* pool\.accept has not confirmed"):
            await world.sample()

    run(story())


def test_a_probe_is_of_the_present_weights_alone(told: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.engine.goes_on.clear()
        probed = world.probe()
        await turn()
        await world.publish(2)
        world.engine.goes_on.set()
        with pytest.raises(StaleWeights, match="sent while the engines answered a probe with prompt p"):
            await probed

    told(story)


class Vllm(Engine):
    """An engine whose requests end when they are told to, and whose transfers do what they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.ends, self.arrives, self.calls = asyncio.Event(), asyncio.Event(), []
        self.fingerprints: set[str] = {"f"}

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Sampled]:
        self.calls.append("generate")
        await self.ends.wait()
        return [Sampled(np.arange(1, dtype=np.int32), np.full(1, -1.0, np.float32), "stop", (Span(0, 1, 0),))]

    async def receive_weights(self, sent: Shipment, adapter: dict[str, Any] | None) -> set[str]:
        await self.arrives.wait()
        return set(self.fingerprints)

    async def pause(self, *, keep: bool) -> None:
        self.calls.append("keep" if keep else "wait")

    async def abort(self) -> None:
        self.calls.append("abort")

    async def resume(self) -> None:
        self.calls.append("resume")
        self.ends.set()  # what was kept has nothing else to wait for
        await turn()

    async def set_version(self, version: int) -> None:
        self.calls.append(f"version {version}")

    async def _answer(self, token_ids: list[int], params: Any, priority: int) -> Any: ...

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        return []

    async def sleep(self, level: int) -> None: ...

    async def wake(self) -> None: ...

    def close(self) -> None: ...


def engine(**sections: dict[str, Any]) -> tuple[RolloutEngine, Vllm]:
    tree: dict[str, dict[str, Any]] = {
        "data": {"prompts": "p"},
        "policy": {"model": "m"},
        "reward": {"path": "m:f", "kind": "function"},
    }
    settings = Settings.model_validate({name: tree.get(name, {}) | sections.get(name, {}) for name in tree | sections})
    made, vllm = RolloutEngine(settings, 0, False, "gloo", False), Vllm()
    made._started = vllm
    return made, vllm


@pytest.mark.parametrize("in_flight", ["keep", "wait"])
def test_an_engine_takes_weights_between_pause_and_resume(run: Callable, in_flight: str) -> None:
    async def story() -> None:
        made, vllm = engine(rollout={"in_flight": in_flight})
        receiving = asyncio.ensure_future(made.receive_weights(shipment(1)))
        await turn()
        late = asyncio.ensure_future(made.sample(PROMPT, [SAMPLING]))
        await turn()
        assert vllm.calls == [in_flight], "a request that comes meanwhile is held back"
        vllm.arrives.set()
        await together(receiving, late)
        assert vllm.calls == [in_flight, "version 1", "resume", "generate"]

    run(story())


@pytest.mark.parametrize("fingerprints", [set(), {"f", "g"}])
def test_what_ran_while_a_transfer_failed_does_not_count(run: Callable, fingerprints: set[str]) -> None:
    async def story() -> None:
        made, vllm = engine()
        running = asyncio.ensure_future(made.sample(PROMPT, [SAMPLING]))
        await turn()
        vllm.fingerprints = fingerprints
        vllm.arrives.set()
        with pytest.raises(TransferFailed, match="received different weights"):
            await made.receive_weights(shipment(1))
        assert vllm.calls == ["generate", "keep", "abort", "resume"]
        with pytest.raises(StaleWeights, match="failed while it answered prompt p"):
            await running
        with pytest.raises(StaleWeights, match="half-loaded weights"):
            await made.sample(PROMPT, [SAMPLING])
        vllm.fingerprints = {"f"}
        await made.receive_weights(shipment(1))
        await made.sample(PROMPT, [SAMPLING])

    run(story())


def test_the_first_adapter_must_come_before_anything_is_sampled(run: Callable) -> None:
    async def story() -> None:
        made, vllm = engine(policy={"lora": {"rank": 4, "publish": "adapter"}})
        running = asyncio.ensure_future(made.sample(PROMPT, [SAMPLING]))
        await turn()
        vllm.arrives.set()
        with pytest.raises(TransferFailed, match="1 prompts with the base model alone: publish it before"):
            await made.receive_weights(shipment(1))
        vllm.ends.set()
        await running
        vllm.ends.clear()
        await made.receive_weights(shipment(1))
        running = asyncio.ensure_future(made.sample(PROMPT, [SAMPLING]))
        await made.receive_weights(shipment(2))
        await running
        assert vllm.uses_adapter

    run(story())
