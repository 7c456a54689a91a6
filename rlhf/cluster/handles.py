"""Calling an actor: the same three verbs whether it is a Ray actor or an object in this process.

`call` returns a value; `call_keep` returns the first of two results and a reference to the second, which then never passes
through the caller; `fetch` turns references into values where they are needed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf.config.loader import UserError


class DeadlineExpired(TimeoutError):
    """A remote wait took longer than its deadline."""


class ActorDied(RuntimeError):
    """The process behind a handle is gone."""


class Handle(Protocol):
    """An actor as its callers see it."""

    name: str

    async def call(self, method: str, *args: Any, deadline: float) -> Any:
        """Result of `method(*args)`.

        Raises:
            DeadlineExpired: no result within `deadline` seconds.
            ActorDied: the actor's process has ended.
        """
        ...

    async def call_keep(self, method: str, *args: Any, deadline: float) -> tuple[Any, Any]:
        """For a method that returns two results: the first one, and a reference to the second. Raises as `call`."""
        ...


@dataclass(frozen=True)
class LocalRef:
    """A reference to a value in this process."""

    value: Any


def fetch(references: Sequence[Any]) -> list[Any]:
    """The values behind references made by `call_keep`, in order. To be called where the values are used."""
    if all(isinstance(reference, LocalRef) for reference in references):
        return [reference.value for reference in references]
    import ray

    return ray.get(list(references))


DEATH_NOTICE_S = 30.0
"""How long Ray's health checks take, at most, to tell that a node has crashed."""


async def together(*calls: Awaitable[Any]) -> list[Any]:
    """Results, in order, of calls to actors that need one another to answer.

    When an actor dies, those who were in a collective with it often fail first, with words that do not name it. So after a
    failure the other calls get `DEATH_NOTICE_S` more, and the error of a dead actor goes before all others.

    Raises:
        Whatever a call raises: `ActorDied` if there is one, else the first error.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    clock = asyncio.get_running_loop().time
    errors: list[BaseException] = []
    waiting, end = set(tasks), None
    while waiting and not any(isinstance(error, ActorDied) for error in errors):
        patience = None if end is None else max(0.0, end - clock())
        try:
            done, waiting = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # otherwise they would go on, and fail when the actors end
            for task in waiting:
                task.cancel()
            raise
        if not done:
            break
        errors += [error for task in tasks if task in done and (error := task.exception()) is not None]
        if errors and end is None:
            end = clock() + DEATH_NOTICE_S
    for task in waiting:  # nobody will ask for their errors
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
    if errors:
        raise next((error for error in errors if isinstance(error, ActorDied)), errors[0])
    return [task.result() for task in tasks]


class RayHandle:
    """A Ray actor."""

    def __init__(self, name: str, actor: Any):
        self.name = name
        self.actor = actor

    async def call(self, method: str, *args: Any, deadline: float) -> Any:
        return await self._wait(getattr(self.actor, method).remote(*args), method, deadline)

    async def call_keep(self, method: str, *args: Any, deadline: float) -> tuple[Any, Any]:
        head, payload = getattr(self.actor, method).options(num_returns=2).remote(*args)
        return await self._wait(head, method, deadline), payload

    async def _wait(self, reference: Any, method: str, deadline: float) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), deadline)
        except TimeoutError:
            raise DeadlineExpired(f"the driver waited {deadline:g} s for {self.name}.{method}") from None
        except RayActorError as error:
            raise ActorDied(f"{self.name} died while the driver waited for its {method}: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # without the actor's traceback, which Ray makes its text
                raise error.cause from error
            raise


class LocalHandle:
    """An object in this process. Plain methods run to their end at once, as a breakpoint wants it."""

    def __init__(self, name: str, target: Any):
        self.name = name
        self.target = target

    async def call(self, method: str, *args: Any, deadline: float) -> Any:
        result = getattr(self.target, method)(*(arg.value if isinstance(arg, LocalRef) else arg for arg in args))
        if not inspect.isawaitable(result):
            return result
        try:
            return await asyncio.wait_for(result, deadline)
        except TimeoutError:
            raise DeadlineExpired(f"the driver waited {deadline:g} s for {self.name}.{method}") from None

    async def call_keep(self, method: str, *args: Any, deadline: float) -> tuple[Any, LocalRef]:
        head, payload = await self.call(method, *args, deadline=deadline)
        return head, LocalRef(payload)
