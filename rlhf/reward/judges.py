"""What a reward server judges with: functions and models, that score one response or compare two.

A judge turns texts into raw values and failures; `scoring` and `pairwise` make outcomes of them. Functions of the user run in the
server's workplace, one at a time; requests to a model that arrive together share a batch.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from rlhf.config import Settings
from rlhf.config.reward import RewardSettings, SourceSettings
from rlhf.data.assets import resolve
from rlhf.reward.batching import Batcher
from rlhf.reward.errors import RewardError
from rlhf.reward.functions import COMPARE, SCORE, load_function
from rlhf.reward.scoring import failure
from rlhf.types import Prompt, TimedOut

Texts = tuple[str, ...]
"""One response to score, or two to compare: the first against the second."""


class Workplace:
    """Where blocking work is done, one piece at a time."""

    def __init__(self, inline: bool):
        self._inline = inline
        self._executor: ThreadPoolExecutor | None = None
        self._free = asyncio.Lock()

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. If the caller is cancelled, the thread is left to itself and the next work gets a new one."""
        if self._inline:
            return work(*args)
        async with self._free:
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="reward")
            try:
                return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)
            except asyncio.CancelledError:
                self.close()  # a thread cannot be interrupted
                raise

    def close(self) -> None:
        """Accept no more work in the present thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


class Judge(Protocol):
    """One raw value or failure for each of `items`, within `deadline_s` seconds."""

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]: ...

    def fingerprint(self) -> str | None: ...


def make_judge(source: SourceSettings, settings: Settings, workplace: Workplace, local: bool) -> Judge:
    """The judge that `source` names.

    Raises:
        RewardError: the function or the model cannot be used.
    """
    if source.kind == "function":
        return FunctionJudge(load_function(source.path, SCORE), workplace)
    if source.kind == "pairwise_function":
        return FunctionJudge(load_function(source.path, COMPARE), workplace)
    device = _device(settings, local)
    return (PairwiseModelJudge if source.compares else ModelJudge)(source, settings.reward, workplace, device)


class FunctionJudge:
    """A user's function. An `async def` judges all items at once; a plain one is called for one at a time."""

    def __init__(self, function: Callable[..., Any], workplace: Workplace):
        self._function, self._workplace = function, workplace

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        return await asyncio.gather(*(self._judge_one(prompt, texts, deadline_s) for texts in items))

    async def _judge_one(self, prompt: Prompt, texts: Texts, deadline_s: float) -> Any:
        try:
            return await asyncio.wait_for(self._call(prompt, texts), deadline_s)
        except asyncio.TimeoutError:
            return TimedOut(deadline_s)

    async def _call(self, prompt: Prompt, texts: Texts) -> Any:
        try:
            if inspect.iscoroutinefunction(self._function):
                return await self._function(prompt.text, *texts, prompt.payload)
            value = await self._workplace.run(self._function, prompt.text, *texts, prompt.payload)
            return await value if inspect.isawaitable(value) else value
        except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user: what it raises is its outcome
            return failure(error)

    def fingerprint(self) -> None:
        return None


class ModelJudge:
    """A reward model: the raw value of a response is its reward."""

    def __init__(self, source: SourceSettings, reward: RewardSettings, workplace: Workplace, device: str):
        from rlhf.reward.models import load_model

        self._model = load_model(resolve(source.path), device)
        trained_on = self._model.description.input
        if trained_on not in (None, source.input):
            raise RewardError(
                f"`reward.input` is {source.input}, but the reward model {source.path} was trained on the {trained_on}."
                f" Set `reward.input: {trained_on}`."
            )
        if trained_on is None:
            self._model.read(source.input)
        self._batcher: Batcher = Batcher(self._work, reward.batch_size, reward.max_wait_ms / 1000)
        self._workplace = workplace

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        return await _batched(self._batcher, [(prompt.text, *texts) for texts in items], deadline_s)

    async def _work(self, items: list[tuple[str, str]]) -> Sequence[float]:
        from rlhf.reward.models import Example

        return list(await self._workplace.run(self._model.score, [Example(*item) for item in items]))

    def fingerprint(self) -> str:
        return self._model.fingerprint()


class PairwiseModelJudge:
    """A pairwise preference model: the raw value is the probability that the first response beats the second."""

    def __init__(self, source: SourceSettings, reward: RewardSettings, workplace: Workplace, device: str):
        from rlhf.reward.pairwise_model import load_pairwise_model

        self._model = load_pairwise_model(resolve(source.path), device)
        self._batcher: Batcher = Batcher(self._work, reward.batch_size, reward.max_wait_ms / 1000)
        self._workplace = workplace

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        read = [self._model.encode(prompt.text, *texts) for texts in items]
        short = [ids for ids in read if isinstance(ids, list)]
        values = iter(await _batched(self._batcher, short, deadline_s))
        return [next(values) if isinstance(ids, list) else ids for ids in read]

    async def _work(self, items: list[list[int]]) -> Sequence[float]:
        return list(await self._workplace.run(self._model.probabilities, items))

    def fingerprint(self) -> str:
        return self._model.fingerprint()


async def _batched(batcher: Batcher, items: Sequence[Any], deadline_s: float) -> list[Any]:
    """The batcher's results, or one failure for all."""
    try:
        return await asyncio.wait_for(batcher.submit(items), deadline_s)
    except asyncio.TimeoutError:
        return [TimedOut(deadline_s)] * len(items)
    except RuntimeError as error:  # torch's errors, out of memory among them: the next batch may pass
        return [failure(error)] * len(items)


def _device(settings: Settings, local: bool) -> str:
    """Where a model judges; a server of its own also takes its share of the cores."""
    import torch

    device = settings.cluster.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise RewardError(
            "`cluster.device` is cuda, but the reward server sees no GPU. Set it to cpu or auto, or give it a GPU."
        )
    if not local:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(settings.cluster.threads or max(1, cores // settings.reward.servers))
    return device
