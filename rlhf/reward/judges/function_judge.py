"""The judge of `kind: function` and `pairwise_function`: a function of the user's, called in the server's workplace.

Owns how it is called, within a deadline, and that whatever it raises is the outcome of what it was called for.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from rlhf.config.user_code import ends_the_run, shown, told
from rlhf.reward.functions import asked_with, takes_all
from rlhf.reward.judges.judge import Texts
from rlhf.reward.judges.workplace import Workplace
from rlhf.types import Failed, Prompt, TimedOut


class FunctionJudge:
    """A user's function. An `async def` judges all items at once; a plain one is called for one at a time, or for a list of all.

    Whatever it raises, of any class, is the outcome of the response (or pair) that it was called for; of all where it is called for all.
    """

    def __init__(self, function: Callable[..., Any], workplace: Workplace):
        self._function, self._workplace = function, workplace
        self._at_once = takes_all(function)

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        if not self._at_once:
            return await asyncio.gather(*(self._judge_one(prompt, texts, deadline_s) for texts in items))
        texts = [item[0] if len(item) == 1 else item for item in items]
        values = await self._judge_one(prompt, (texts,), deadline_s)
        if isinstance(values, Failed | TimedOut):
            return [values] * len(items)
        if len(values) != len(items):
            return [Failed(f"the function returned {len(values)} values for {len(items)}")] * len(items)
        return values

    async def _judge_one(self, prompt: Prompt, asked: Sequence[Any], deadline_s: float) -> Any:
        call = asyncio.ensure_future(self._call(prompt, asked))
        try:
            # Not `wait_for`: it waits for a function that does not want to be cancelled, and cannot tell a cancelled call from
            # a function that raised CancelledError.
            done, _ = await asyncio.wait({call}, timeout=deadline_s)
            return call.result() if done else TimedOut(deadline_s)
        except asyncio.CancelledError as error:
            if not call.cancelled():
                raise
            return Failed(told(error, self._function))
        finally:
            call.cancel()

    async def _call(self, prompt: Prompt, asked: Sequence[Any]) -> Any:
        """The function's value, a list where it judges all at once; or its failure. Of what the function raises, only a CancelledError
        comes out, for it may be a true one."""
        arguments = (asked_with(self._function, prompt), *asked, prompt.payload)
        if inspect.iscoroutinefunction(self._function):
            value = self._function(*arguments)
        else:
            value = await self._workplace.run(self._called, *arguments)
        if not inspect.isawaitable(value):
            return value
        try:
            return self._complete(await value)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # code of the user: what it raises is its outcome
            if ends_the_run(error):
                raise
            return Failed(told(error, self._function))

    def _called(self, *arguments: Any) -> Any:
        """What a plain function returns, or its failure. Raises nothing of the function's: a future cannot hold a StopIteration, so
        that nobody would hear of it, and takes a CancelledError for its own."""
        try:
            return self._complete(self._function(*arguments))
        except BaseException as error:  # code of the user: what it raises is its outcome
            if ends_the_run(error):
                raise
            return Failed(told(error, self._function))

    def _complete(self, value: Any) -> Any:
        """A value read to its end: what stands for a list may be a generator, which is code of the user as well."""
        if not self._at_once or inspect.isawaitable(value):
            return value
        if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
            return Failed(f"the function returned {shown(value)}, which is not a list")
        return list(value)

    def fingerprint(self) -> None:
        return None

    def close(self) -> None:
        """Nothing is held."""
