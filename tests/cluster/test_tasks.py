"""Tasks that belong together end together, with the one error that says why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlhf.cluster import ActorDied
from rlhf.cluster.tasks import task_group


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)  # until the others have begun
    raise error


async def fail_when_cancelled(error: BaseException) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        raise error


def run(*errors: Any, body: BaseException | None = None) -> BaseException:
    """What comes out where the first task fails, the others as they are cancelled, and then the body."""

    async def scenario() -> None:
        async with task_group() as tasks:
            for number, error in enumerate(errors):
                tasks.create_task(fail_when_cancelled(error) if number else fail(error))
            if body is not None:
                raise body
            await asyncio.Event().wait()

    async def alone() -> BaseException:
        with pytest.raises(BaseException) as caught:
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return caught.value

    return asyncio.run(alone())


def test_the_cause_alone_is_raised() -> None:
    error = ValueError("why")
    error.__cause__ = KeyError("behind it")
    raised = run(error)
    assert raised is error and isinstance(raised.__cause__, KeyError) and raised.__suppress_context__


def test_a_dead_actor_goes_before_other_errors() -> None:
    died = ActorDied("engine")
    assert run(ValueError("first"), died) is died
    assert run(ExceptionGroup("inner", [ValueError("x"), ExceptionGroup("inmost", [died])])) is died


def test_an_error_of_the_body_is_raised_like_a_tasks() -> None:
    error = ValueError("why")
    assert run(body=error) is error


def test_a_cancelled_group_is_cancelled_and_waits_for_its_tasks() -> None:
    ended = []

    async def task() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async def use() -> None:
        async with task_group() as tasks:
            tasks.create_task(task())

    async def scenario() -> None:
        using = asyncio.create_task(use())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert ended == [True]

    asyncio.run(scenario())
