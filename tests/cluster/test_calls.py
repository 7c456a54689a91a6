"""Calls: the same answers from a Ray actor and from an object here, and words when a wait goes wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.cluster import ActorDied, DeadlineExpired, Handle, LocalRuntime, Runtime, calls, compute_env, fetch, together
from rlhf.cluster.devices import claim_threads
from rlhf.config.cluster import ClusterSettings
from rlhf.config.loader import UserError


class Worker:
    """An actor to try things on."""

    def __init__(self, base: int):
        self.base = base

    def add(self, *values: int) -> int:
        return self.base + sum(values)

    def both(self, value: int) -> tuple[int, list[int]]:
        return value, [self.base, value]

    def last(self, values: list[int]) -> int:
        return values[-1]

    def sum_behind(self, references: list[Any]) -> int:
        return sum(sum(value) for value in fetch(references))

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def refuse(self) -> None:
        raise UserError("file.pt: no")

    def die(self) -> None:
        os._exit(1)


class Doubling(Worker):
    """Adds in its own way."""

    def add(self, *values: int) -> int:
        return 2 * super().add(*values)


class Slow:
    """Never answers before it is woken."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()

    async def wait(self) -> None:
        await self.woken.wait()

    async def wake(self) -> None:
        self.woken.set()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.engine)])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return LocalRuntime() if request.param == "local" else request.getfixturevalue("scratch_runtime")


def test_calls_and_references(runtime: Runtime, run: Callable) -> None:
    worker = runtime.start("worker", Worker)(10)

    async def use() -> None:
        assert await worker.ask(Worker.add, deadline=60)(1, 2) == 13
        head, kept = await worker.keep(Worker.both, deadline=60)(5)
        assert head == 5
        assert fetch([kept]) == [[10, 5]]
        assert await worker.ask(Worker.last, deadline=60)(kept) == 5, "a reference as an argument arrives as its value"
        assert await worker.ask(Worker.sum_behind, deadline=60)([kept, kept]) == 30

    run(use())


def test_the_actors_own_class_decides_what_a_method_does(runtime: Runtime, run: Callable) -> None:
    worker: Handle[Worker] = runtime.start("worker", Doubling)(10)
    assert run(worker.ask(Worker.add, deadline=60)(1)) == 22


def test_a_deadline_says_who_waited_for_whom(runtime: Runtime, run: Callable) -> None:
    slow = runtime.start("slow-server", Slow)()
    with pytest.raises(DeadlineExpired, match=r"the driver waited 0\.2 s for slow-server\.wait"):
        run(slow.ask(Slow.wait, deadline=0.2)())


@pytest.mark.engine
def test_a_dead_actor_is_reported_at_once(scratch_runtime: Runtime, run: Callable) -> None:
    worker = scratch_runtime.start("mortal", Worker)(0)
    assert run(worker.ask(Worker.add, deadline=60)(1)) == 1
    with pytest.raises(ActorDied, match="mortal died while the driver waited for its die"):
        run(worker.ask(Worker.die, deadline=60)())


@pytest.mark.engine
def test_an_actor_hears_more_while_it_works_on_a_thousand_calls(scratch_runtime: Runtime, run: Callable) -> None:
    """More than Ray gives an actor by itself."""
    slow = scratch_runtime.start("slow", Slow)()

    async def use() -> None:
        waiting = [asyncio.ensure_future(slow.ask(Slow.wait, deadline=240)()) for _ in range(1200)]
        await asyncio.sleep(0)
        await slow.ask(Slow.wake, deadline=240)()
        assert await asyncio.gather(*waiting) == [None] * 1200

    run(use())


@pytest.mark.engine
def test_the_environment_reaches_the_actor(scratch_runtime: Runtime, run: Callable) -> None:
    worker = scratch_runtime.start("env", Worker, env=compute_env(ClusterSettings(threads=3), 1))(0)
    assert run(worker.ask(Worker.environment, deadline=60)("OMP_NUM_THREADS")) == "3"


def test_threads_are_shared_by_the_actors_of_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine that an actor comes to, whatever the driver's has."""
    for cores, actors, threads in ((4, 1, "4"), (64, 8, "8"), (64, 1, "64"), (2, 8, "1")):
        env = compute_env(ClusterSettings(), actors)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        claim_threads(env)
        assert env["OMP_NUM_THREADS"] == threads


@pytest.mark.engine
def test_an_actor_takes_its_threads_where_it_runs(scratch_runtime: Runtime, run: Callable) -> None:
    cores = len(os.sched_getaffinity(0))
    worker = scratch_runtime.start("threads", Worker, env=compute_env(ClusterSettings(), 1))(0)
    assert run(worker.ask(Worker.environment, deadline=60)("OMP_NUM_THREADS")) == str(cores)


async def after(event: asyncio.Event | None, outcome: Any) -> Any:
    """A call that answers, or fails, when the event happens (None: at once)."""
    if event is not None:
        await event.wait()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_calls_that_need_one_another_answer_in_order(run: Callable) -> None:
    async def use() -> tuple[Any, ...]:
        event = asyncio.Event()
        asyncio.get_running_loop().call_soon(event.set)
        return await together(after(event, 1), after(None, 2))

    assert run(use()) == (1, 2)


def test_the_dead_actor_is_named_and_not_those_who_missed_it(run: Callable) -> None:
    """The survivor of a collective fails first, with words about a connection; Ray tells of the death later."""

    async def use() -> None:
        news = asyncio.Event()
        asyncio.get_running_loop().call_soon(news.set)
        lost = after(None, RuntimeError("connection closed by peer"))
        hanging = after(asyncio.Event(), None)
        await together(lost, hanging, after(news, ActorDied("policy-1 died while the driver waited for its learn")))

    with pytest.raises(ActorDied, match=r"policy-1"):
        run(use())


def test_without_a_death_the_first_error_is_raised(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DEATH_NOTICE_S", 0.0)
    with pytest.raises(ValueError, match="first"):
        run(together(after(None, ValueError("first")), after(None, 1)))

    async def with_one_that_hangs() -> None:
        await together(after(None, ValueError("first")), after(asyncio.Event(), None))

    with pytest.raises(ValueError, match="first"):
        run(with_one_that_hangs())


def test_no_call_goes_on_after_another_has_failed(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DEATH_NOTICE_S", 0.0)
    ended: list[str] = []

    async def hanging() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # what it cleans up may take a while
            ended.append("cleaned up")

    async def use() -> None:
        before = asyncio.all_tasks()
        with pytest.raises(ValueError, match="first"):
            await together(after(None, ValueError("first")), hanging())
        assert ended == ["cleaned up"]
        assert asyncio.all_tasks() == before

    run(use())


def test_a_caller_that_is_cancelled_takes_its_calls_along(run: Callable) -> None:
    """Otherwise they go on, and fail with a traceback when the run that was told to end has closed the actors."""

    async def use() -> None:
        pending = [asyncio.ensure_future(after(asyncio.Event(), None)) for _ in range(2)]
        waiting = asyncio.ensure_future(together(*pending))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert all(call.cancelled() for call in pending)

    run(use())


@pytest.mark.engine
def test_what_a_user_did_wrong_crosses_without_a_traceback(scratch_runtime: Runtime, run: Callable) -> None:
    worker = scratch_runtime.start("worker", Worker)(0)
    with pytest.raises(UserError) as caught:
        run(worker.ask(Worker.refuse, deadline=60)())
    assert str(caught.value) == "file.pt: no"
