"""One reward server: judges responses with a model or a user's function, in batches and within the deadline.

A plain class; in Ray it is an async actor, in debug mode an object in the driver's process. The work runs in a thread
(so that the actor keeps answering) or inline (so that a breakpoint works). Talks to: functions, models, scoring. Not
to other servers.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf.config import Settings
from rlhf.data.assets import resolve
from rlhf.reward.batching import Batcher
from rlhf.reward.errors import RewardError
from rlhf.reward.functions import load_function
from rlhf.reward.scoring import failure, outcome_of
from rlhf.types import Completion, Failed, Outcome, Prompt, TimedOut


@dataclass(frozen=True)
class ServerInfo:
    """A server that is ready.

    Attributes:
        fingerprint: hash of the reward model's weights; None for a function.
    """

    host: str
    pid: int
    fingerprint: str | None


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
    """What a server judges with: one raw value or failure per response, within `deadline_s` seconds."""

    async def judge(self, prompt: Prompt, responses: Sequence[str], deadline_s: float) -> list[Any]: ...

    def fingerprint(self) -> str | None: ...


class FunctionJudge:
    """A user's function. An `async def` judges all responses at once; a plain one is called for one at a time."""

    def __init__(self, path: str, workplace: Workplace):
        self._function = load_function(path)
        self._workplace = workplace

    async def judge(self, prompt: Prompt, responses: Sequence[str], deadline_s: float) -> list[Any]:
        return await asyncio.gather(*(self._judge_one(prompt, response, deadline_s) for response in responses))

    async def _judge_one(self, prompt: Prompt, response: str, deadline_s: float) -> Any:
        try:
            return await asyncio.wait_for(self._call(prompt, response), deadline_s)
        except asyncio.TimeoutError:
            return TimedOut(deadline_s)

    async def _call(self, prompt: Prompt, response: str) -> Any:
        try:
            if inspect.iscoroutinefunction(self._function):
                return await self._function(prompt.text, response, prompt.payload)
            value = await self._workplace.run(self._function, prompt.text, response, prompt.payload)
            return await value if inspect.isawaitable(value) else value
        except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user: what it raises is its outcome
            return failure(error)

    def fingerprint(self) -> None:
        return None


class ModelJudge:
    """A reward model; requests that arrive together share a batch."""

    def __init__(self, settings: Settings, workplace: Workplace, local: bool):
        import torch

        from rlhf.reward.models import load_model

        reward, device = settings.reward, settings.cluster.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise RewardError(
                "`cluster.device` is cuda, but the reward server sees no GPU. Set it to cpu or auto, or give it a GPU."
            )
        if not local:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(settings.cluster.threads or max(1, cores // reward.servers))
        self._model = load_model(resolve(reward.path), device)
        trained_on = self._model.description.input
        if trained_on not in (None, reward.input):
            raise RewardError(
                f"`reward.input` is {reward.input}, but the reward model {reward.path} was trained on the {trained_on}."
                f" Set `reward.input: {trained_on}`."
            )
        if trained_on is None:
            self._model.read(reward.input)
        self._batcher: Batcher = Batcher(self._work, reward.batch_size, reward.max_wait_ms / 1000)
        self._workplace = workplace

    async def judge(self, prompt: Prompt, responses: Sequence[str], deadline_s: float) -> list[Any]:
        try:
            return await asyncio.wait_for(self._batcher.submit([(prompt.text, text) for text in responses]), deadline_s)
        except asyncio.TimeoutError:
            return [TimedOut(deadline_s)] * len(responses)
        except RuntimeError as error:  # torch's errors, out of memory among them: the next batch may pass
            return [failure(error)] * len(responses)

    async def _work(self, items: list[tuple[str, str]]) -> Sequence[float]:
        from rlhf.reward.models import Example

        return list(await self._workplace.run(self._model.score, [Example(*item) for item in items]))

    def fingerprint(self) -> str:
        return self._model.fingerprint()


class RewardServer:
    """Answers `judge` with one outcome per completion, and never with an exception for a reward that failed."""

    def __init__(self, settings: Settings, index: int, local: bool):
        """Quick: the model is loaded by `ready`, whose errors the caller sees."""
        self._settings, self._index, self._local = settings, index, local
        self._workplace = Workplace(inline=local)
        self._judge: Judge | None = None
        self._tokenizer: Any = None

    async def ready(self) -> ServerInfo:
        """Load everything; answer when requests can be served.

        Raises:
            RewardError: the function or the model cannot be used.
        """
        from transformers import AutoTokenizer

        reward = self._settings.reward
        if reward.kind == "function":
            self._judge = FunctionJudge(reward.path, self._workplace)
        else:
            self._judge = ModelJudge(self._settings, self._workplace, self._local)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve(self._settings.policy.model))
        return ServerInfo(socket.gethostname(), os.getpid(), self._judge.fingerprint())

    async def judge(self, prompt: Prompt, completions: list[Completion]) -> tuple[Outcome, ...]:
        """One outcome per completion, in order."""
        reward = self._settings.reward
        responses = [self._tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True) for c in completions]
        values = await self._judge.judge(prompt, responses, reward.deadline_s)
        return tuple(
            value
            if isinstance(value, (Failed, TimedOut))
            else outcome_of(value, completion.finish_reason, reward.missing_eos_penalty)
            for value, completion in zip(values, completions, strict=True)
        )

    async def fingerprint(self) -> str | None:
        """Hash of the reward model's weights now; None for a function."""
        return self._judge.fingerprint()

    def close(self) -> None:
        """Let the worker thread go."""
        self._workplace.close()
