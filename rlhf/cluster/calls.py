"""Calling an actor: the same verbs whether it is a Ray actor or an object in this process.

`handle.ask(Class.method, deadline=s)(arguments)` is the method's result; `handle.keep(...)` is the first of two results and a reference
to the second, which then never passes through the caller; `fetch` turns references into values where they are needed. A call names
its method by the function itself, so readers, editors and mypy find it and check its arguments. Only the function's name travels: the
actor's own class decides what it does, as with any method. `method_of` is the only place that looks a method up by its name.

Owns: deadlines, the errors of a call, references. Does not know: what any actor does, or where it runs.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from rlhf.config.loader import UserError

Actor = TypeVar("Actor", covariant=True)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Other = TypeVar("Other")
Head = TypeVar("Head")
Payload = TypeVar("Payload")
Value = TypeVar("Value", covariant=True)


class DeadlineExpired(TimeoutError):
    """A remote wait took longer than its deadline."""


class ActorDied(RuntimeError):
    """The process behind a handle is gone."""


class Ref(Generic[Value]):
    """A reference to a value that is somewhere else; as an argument of a call it arrives as the value itself. Ray's `ObjectRef` counts as
    one, which only mypy is told (`RayHandle`)."""


@dataclass(frozen=True)
class LocalRef(Ref[Value]):
    """A reference to a value in this process."""

    value: Value


def fetch(references: Sequence[Ref[Result]]) -> list[Result]:
    """The values behind references made by `Handle.keep`, in order. To be called where the values are used."""
    local = [reference.value for reference in references if isinstance(reference, LocalRef)]
    if len(local) == len(references):
        return local
    import ray

    remote: list[Any] = list(references)  # ObjectRefs (see `Ref`)
    return ray.get(remote)


def method_of(actor: Any, method: Callable[..., Any]) -> Any:
    """The actor's own method of this name: of the object's class or, behind a Ray handle, of the class over there."""
    return getattr(actor, method.__name__)


class Handle(ABC, Generic[Actor]):
    """An actor as its callers see it. Nothing happens before the result is awaited.

    Attributes:
        name: for messages, such as policy-0.
    """

    name: str

    @overload
    def ask(
        self, method: Callable[Concatenate[Actor, Arguments], Coroutine[Any, Any, Result]], *, deadline: float
    ) -> Callable[Arguments, Coroutine[Any, Any, Result]]: ...

    @overload
    def ask(
        self, method: Callable[Concatenate[Actor, Arguments], Result], *, deadline: float
    ) -> Callable[Arguments, Coroutine[Any, Any, Result]]: ...

    def ask(self, method: Callable[..., Any], *, deadline: float) -> Callable[..., Coroutine[Any, Any, Any]]:
        """A function that calls this method of the actor; awaited, it gives the method's result.

        Args:
            deadline: seconds.

        Raises (when awaited):
            DeadlineExpired: no result within the deadline.
            ActorDied: the actor's process has ended.
        """

        async def asked(*args: Any, **kwargs: Any) -> Any:
            return await self._result(method, args, kwargs, deadline)

        return asked

    @overload
    def keep(
        self,
        method: Callable[Concatenate[Actor, Arguments], Coroutine[Any, Any, tuple[Head, Payload]]],
        *,
        deadline: float,
    ) -> Callable[Arguments, Coroutine[Any, Any, tuple[Head, Ref[Payload]]]]: ...

    @overload
    def keep(
        self, method: Callable[Concatenate[Actor, Arguments], tuple[Head, Payload]], *, deadline: float
    ) -> Callable[Arguments, Coroutine[Any, Any, tuple[Head, Ref[Payload]]]]: ...

    def keep(self, method: Callable[..., Any], *, deadline: float) -> Callable[..., Coroutine[Any, Any, Any]]:
        """As `ask`, for a method that returns two results: the first one, and a reference to the second."""

        async def asked(*args: Any, **kwargs: Any) -> Any:
            return await self._kept(method, args, kwargs, deadline)

        return asked

    @abstractmethod
    async def _result(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float
    ) -> Any: ...

    @abstractmethod
    async def _kept(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float
    ) -> tuple[Any, Any]: ...

    def _expired(self, method: Callable[..., Any], deadline: float) -> DeadlineExpired:
        return DeadlineExpired(f"the driver waited {deadline:g} s for {self.name}.{method.__name__}")


class RayHandle(Handle[Actor]):
    """A Ray actor."""

    def __init__(self, name: str, actor: Any):
        self.name = name
        self.actor = actor

    async def _result(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float
    ) -> Any:
        return await self._wait(method_of(self.actor, method).remote(*args, **kwargs), method, deadline)

    async def _kept(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float
    ) -> tuple[Any, Any]:
        head, payload = method_of(self.actor, method).options(num_returns=2).remote(*args, **kwargs)
        return await self._wait(head, method, deadline), payload

    async def _wait(self, reference: Any, method: Callable[..., Any], deadline: float) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), deadline)
        except TimeoutError:
            raise self._expired(method, deadline) from None
        except RayActorError as error:
            waited = f"{self.name} died while the driver waited for its {method.__name__}"
            raise ActorDied(f"{waited}: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # without the actor's traceback, which Ray makes its text
                raise error.cause from error
            raise


class LocalHandle(Handle[Actor]):
    """An object in this process. Plain methods run to their end at once, as a breakpoint wants it."""

    def __init__(self, name: str, target: Actor):
        self.name = name
        self.target = target

    async def _result(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float
    ) -> Any:
        values = {name: _value(arg) for name, arg in kwargs.items()}
        result = method_of(self.target, method)(*map(_value, args), **values)
        if not inspect.isawaitable(result):
            return result
        try:
            return await asyncio.wait_for(result, deadline)
        except TimeoutError:
            raise self._expired(method, deadline) from None

    async def _kept(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float
    ) -> tuple[Any, Any]:
        head, payload = await self._result(method, args, kwargs, deadline)
        return head, LocalRef(payload)


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, LocalRef) else argument


DEATH_NOTICE_S = 30.0
"""How long Ray's health checks take, at most, to tell that a node has crashed."""


@overload
async def together(first: Awaitable[Result], second: Awaitable[Other], /) -> tuple[Result, Other]: ...


@overload
async def together(*calls: Awaitable[Result]) -> tuple[Result, ...]: ...


async def together(*calls: Awaitable[Any]) -> tuple[Any, ...]:
    """Results, in order, of calls to actors that need one another to answer.

    When an actor dies, those who were in a collective with it often fail first, with words that do not name it. So after a
    failure the other calls get `DEATH_NOTICE_S` more, and the error of a dead actor goes before all others. However this ends, also
    when the caller is cancelled, no call goes on: those that are left are cancelled and awaited.

    Raises:
        Whatever a call raises: `ActorDied` if there is one, else the first error.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        errors = await _first_errors(tasks)
    finally:
        for task in tasks:
            task.cancel()  # which does nothing to one that is done
        await asyncio.gather(*tasks, return_exceptions=True)
    if errors:
        raise next((error for error in errors if isinstance(error, ActorDied)), errors[0])
    return tuple(task.result() for task in tasks)


async def _first_errors(tasks: Sequence[asyncio.Future[Any]]) -> list[BaseException]:
    """Waits until all are done, or one failed because an actor died, or `DEATH_NOTICE_S` after another failure."""
    clock = asyncio.get_running_loop().time
    errors: list[BaseException] = []
    waiting, end = set(tasks), None
    while waiting and not any(isinstance(error, ActorDied) for error in errors):
        timeout = None if end is None else max(0.0, end - clock())
        done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
        errors += [error for task in tasks if task in done and (error := task.exception()) is not None]
        if errors and end is None:
            end = clock() + DEATH_NOTICE_S
    return errors
