"""What a reward server judges with: functions and models, that score one response or compare two.

A judge turns texts into raw values and failures; `scoring` and `pairwise` make outcomes of them. Functions of the user run in the
server's workplace, one at a time; requests to a model that arrive together share a batch.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.cluster.devices import own_share
from rlhf.config import Settings
from rlhf.config.reward import RewardSettings, SourceSettings
from rlhf.config.reward_checks import CACHED
from rlhf.config.user_code import ends_the_run, shown, told
from rlhf.data.model_folder import find_model
from rlhf.reward.errors import RewardError
from rlhf.reward.functions import COMPARE, SCORE, asked_with, load_function, takes_all
from rlhf.reward.judges.batching import Batcher, Limits
from rlhf.reward.judges.cache import CachedJudge
from rlhf.reward.judges.remote import RemoteJudge
from rlhf.reward.reading import Example, Tokens
from rlhf.reward.scoring import failure
from rlhf.types import Failed, Prompt, TimedOut

if TYPE_CHECKING:
    import torch

    from rlhf.reward.models import RewardModel
    from rlhf.training.offloading import Offloading

BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 1024, 16384
BATCH_TOKENS_CPU_PADDED = 384
"""Where texts are padded, a larger batch only pads more."""

Texts = tuple[str, ...]
"""One response to score, or two to compare: the first against the second."""


class Workplace:
    """Where blocking work is done, one piece at a time, with the models that lie there."""

    def __init__(self, inline: bool):
        self._inline = inline
        self._models: list[torch.nn.Module] = []
        self._offloaded: Offloading | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._free = asyncio.Lock()

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. If the caller is cancelled, the thread is left to itself and the next work gets a new one. A StopIteration
        of the work comes as a RuntimeError, as it would from any coroutine."""
        if self._inline:
            return work(*args)
        async with self._free:
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="reward")
            try:
                return await asyncio.get_running_loop().run_in_executor(self._executor, _finished, work, args)
            except asyncio.CancelledError:
                self.close()  # a thread cannot be interrupted
                raise

    def hold(self, model: torch.nn.Module) -> None:
        """Let `offload` move the model's weights."""
        self._models.append(model)

    async def offload(self) -> None:
        """Move the weights to host memory, after the work that is under way. Until `reload` no model judges."""
        if self._models and self._offloaded is None:
            await self.run(self._offload)

    def _offload(self) -> None:
        from rlhf.training.offloading import Offloading

        tensors = [tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        self._offloaded = Offloading()
        self._offloaded.offload(tensors, tensors[0].device)

    async def reload(self) -> None:
        """Undo `offload`."""
        if self._offloaded is not None:
            await self.run(self._offloaded.reload)
            self._offloaded = None

    async def run_model(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)` with one of the models. Raises RuntimeError while they are offloaded."""

        def with_model() -> Any:
            if self._offloaded is not None:
                raise RuntimeError("the reward model lies in host memory, because the policy has its GPU")
            return work(*args)

        return await self.run(with_model)

    def close(self) -> None:
        """Accept no more work in the present thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _finished(work: Callable[..., Any], args: Sequence[Any]) -> Any:
    """`work(*args)`, without the one error that no future can hold: whoever waits for it would wait in vain."""
    try:
        return work(*args)
    except StopIteration as error:
        raise RuntimeError("the work raised StopIteration") from error


class Judge(Protocol):
    """One raw value or failure for each of `items`, within `deadline_s` seconds."""

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]: ...

    def fingerprint(self) -> str | None:
        """Hash of what judges; None where nothing tells whether it has changed."""
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...


async def make_judge(source: SourceSettings, settings: Settings, workplace: Workplace, local: bool) -> Judge:
    """The judge that `source` names, ready to judge.

    Raises:
        RewardError: the function or the model cannot be used.
    """
    judge = await _make(source, settings, workplace, local)
    if settings.reward.cache and source.kind in CACHED:
        return CachedJudge(judge, settings.reward.cache)
    return judge


async def _make(source: SourceSettings, settings: Settings, workplace: Workplace, local: bool) -> Judge:
    if source.kind == "function":
        return FunctionJudge(load_function(source.named, SCORE), workplace)
    if source.kind == "several":
        from rlhf.reward.judges.ensemble import Ensemble

        members = [await make_judge(member, settings, workplace, local) for member in settings.reward.members]
        return await Ensemble.start(settings.reward, members, settings.cluster.startup_s)
    if source.kind == "pairwise_function":
        return FunctionJudge(load_function(source.named, COMPARE), workplace)
    if source.kind in ("remote", "pairwise_remote"):
        return await RemoteJudge.start(source)
    if source.kind == "verifier":
        from rlhf.reward.verifiers.judge import VerifierJudge

        return await VerifierJudge.start(source.named, settings)
    if source.kind == "llm_judge":
        from rlhf.reward.judges.llm_judge import make_llm_judge

        return await make_llm_judge(source, settings, local)
    device = _device(settings, local)
    return (PairwiseModelJudge if source.compares else ModelJudge)(source, settings.reward, workplace, device)


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


class ModelJudge:
    """A reward model: the raw value of a response is its reward."""

    def __init__(self, source: SourceSettings, reward: RewardSettings, workplace: Workplace, device: str):
        from rlhf.reward.models import load_model

        self._model = load_model(find_model(source.named, "`reward.path`"), device, source.input)
        self._batcher = _make_batcher(self._work, reward, self._model)
        self._workplace = workplace
        workplace.hold(self._model.module)

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        # Here and not in the batch's thread, so that the next batch is read while the model works on this one.
        read = self._model.encode([Example(prompt.conversation, *texts) for texts in items])
        fitting = [one.ids for one in read if isinstance(one, Tokens)]
        values = iter(await _batched(self._batcher, fitting, deadline_s))
        return [next(values) if isinstance(one, Tokens) else one for one in read]

    async def _work(self, ids: list[list[int]]) -> Sequence[float]:
        return list(await self._workplace.run_model(self._model.score_batch, ids))

    def fingerprint(self) -> str:
        return self._model.fingerprint()

    def close(self) -> None:
        """Nothing is held but memory."""


class PairwiseModelJudge:
    """A pairwise preference model: the raw value is the probability that the first response beats the second."""

    def __init__(self, source: SourceSettings, reward: RewardSettings, workplace: Workplace, device: str):
        from rlhf.reward.pairwise_model import load_pairwise_model

        self._model = load_pairwise_model(find_model(source.named, "`reward.path`"), device)
        self._batcher = _make_batcher(self._work, reward, self._model.model)
        self._workplace = workplace
        workplace.hold(self._model.model.module)

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        reading = self._model.read(prompt.conversation, [(first, second) for first, second in items])
        return reading.answers(await _batched(self._batcher, reading.ids, deadline_s))

    async def _work(self, ids: list[list[int]]) -> Sequence[Any]:
        return list(await self._workplace.run_model(self._model.outputs, ids))

    def fingerprint(self) -> str:
        return self._model.fingerprint()

    def close(self) -> None:
        """Nothing is held but memory."""


def _make_batcher(
    work: Callable[[list[Any]], Awaitable[Sequence[Any]]], reward: RewardSettings, model: RewardModel
) -> Batcher:
    """For the batches of a model, which computes no padding from here on if it can."""
    from rlhf.reward.unpadded import without_padding

    padding = not without_padding(model)
    on_cpu = BATCH_TOKENS_CPU_PADDED if padding else BATCH_TOKENS_CPU
    tokens = reward.batch_tokens or (on_cpu if model.device == "cpu" else BATCH_TOKENS_GPU)
    return Batcher(work, Limits(reward.batch_size, tokens, reward.max_wait_ms / 1000, padding))


async def _batched(batcher: Batcher, ids: Sequence[list[int]], deadline_s: float) -> list[Any]:
    """The batcher's results for token ids, or one failure for all."""
    try:
        return await asyncio.wait_for(batcher.submit(ids, [len(row) for row in ids]), deadline_s)
    except TimeoutError:
        return [TimedOut(deadline_s)] * len(ids)
    except RuntimeError as error:  # torch's errors, out of memory among them: the next batch may pass
        return [failure(error)] * len(ids)


def _device(settings: Settings, local: bool) -> str:
    """Where a model judges; a server of its own also takes its share of the cores."""
    import torch

    device = settings.cluster.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        device = "cpu"  # a run whose reward model shares the policy's GPU, here without a policy
    elif device == "cuda" and not torch.cuda.is_available():
        raise RewardError(
            "`cluster.device` is cuda, but the reward server sees no GPU. Set it to cpu or auto, or give it a GPU."
        )
    if not local:
        torch.set_num_threads(settings.cluster.threads or own_share(os.environ, settings.reward.servers))
    return device
