"""The judges of `kind: model` and `pairwise_model`: a reward model, or a preference model, in the server's workplace.

Owns where it computes and how requests that arrive together share a batch. What it reads and computes is in `rlhf.reward.models`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.cluster.devices import own_share
from rlhf.config import Settings
from rlhf.config.reward import RewardSettings, SourceSettings
from rlhf.data.model_folder import find_model
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.batching import BATCH_TOKENS_CPU, BATCH_TOKENS_GPU, Batcher, Limits
from rlhf.reward.judges.judge import Texts
from rlhf.reward.judges.workplace import Workplace
from rlhf.reward.reading import Example, Tokens
from rlhf.reward.scoring import failure
from rlhf.types import Prompt, TimedOut

if TYPE_CHECKING:
    from rlhf.reward.models import RewardModel

BATCH_TOKENS_CPU_PADDED = 384
"""Where texts are padded, a larger batch only pads more."""


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


def judging_device(settings: Settings, local: bool) -> str:
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
