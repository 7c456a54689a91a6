"""Calling an actor: the same three verbs whether it is a Ray actor or an object in this process.

`call` returns a value; `call_keep` returns the first of two results and a reference to the second, which then never passes
through the caller; `fetch` turns references into values where they are needed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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
        from ray.exceptions import RayActorError

        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), deadline)
        except asyncio.TimeoutError:
            raise DeadlineExpired(f"the driver waited {deadline:g} s for {self.name}.{method}") from None
        except RayActorError as error:
            raise ActorDied(f"{self.name} died while the driver waited for its {method}: {error}") from error


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
        except asyncio.TimeoutError:
            raise DeadlineExpired(f"the driver waited {deadline:g} s for {self.name}.{method}") from None

    async def call_keep(self, method: str, *args: Any, deadline: float) -> tuple[Any, LocalRef]:
        head, payload = await self.call(method, *args, deadline=deadline)
        return head, LocalRef(payload)
