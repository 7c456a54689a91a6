"""Tasks that belong together: when one fails the others are cancelled and awaited, and the caller gets the one error that says why.

For calls of which none needs another to answer. Calls that do (collectives) are awaited with `together`, which gives a dead
actor time to be found out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from rlhf.cluster.calls import ActorDied


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An `asyncio.TaskGroup` that raises its cause instead of an `ExceptionGroup`, of which a user would read nothing but the name.

    Raises:
        Whatever a task or the body raises: `ActorDied` if there is one, else the first error.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        cause = _cause(group)
        raise cause from cause.__cause__  # not "while handling" the group


def _cause(group: BaseExceptionGroup) -> BaseException:
    errors = list(_leaves(group))
    return next((error for error in errors if isinstance(error, ActorDied)), errors[0])


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
