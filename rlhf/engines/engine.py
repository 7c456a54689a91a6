"""A started vLLM engine, and what may be asked of it. Written for vLLM 0.32; when vLLM changes, this room changes and no other.

Owns how a question becomes a request and an answer is read, and the order of the workers' calls in a weight transfer. How requests reach
the model is the business of `AsyncEngine` (`async_engine`, child processes, for actors) and `InProcessEngine` (`in_process`, for debug
mode), which answer with the same tokens. Does not know whether its weights are the ones that somebody expects.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf.engines.lora import adapter_request
from rlhf.engines.sampling import MIXTURE_ARGUMENT, Sampling
from rlhf.transfer import TransferSession
from rlhf.types import ModelSlot, Prompt, Shipment, Span

ORDINARY, URGENT = 0, -1
"""Priorities of requests, as vLLM counts them."""


class EngineDied(RuntimeError):
    """vLLM's core process is gone; the engine answers no more."""


@dataclass(frozen=True)
class Sampled:
    """One response as vLLM returns it: token ids int32 [n], log-probs float32 [n], why it ended, and which weights wrote which tokens
    (`Span.by_policy` and `Span.learned` are not vLLM's to know)."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str | None
    spans: tuple[Span, ...]


class Engine(ABC):
    """A loaded model that answers. Made by `rlhf.engines.start.start_engine`.

    Args:
        stops: tokens that end a response beside those that vLLM knows itself.
    """

    def __init__(self, stops: Sequence[int] = ()):
        self._stops = stops
        self._adapter: Any = None
        self._numbers = itertools.count()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Sampled]:
        """All `sampling.n` responses of one prompt, in order.

        Raises:
            EngineDied: the engine is gone.
        """
        params = sampling_params(sampling, sampling.request_seed(prompt.id), self._stops)
        answer = await self._answer(list(prompt.token_ids), params, URGENT if sampling.urgent else ORDINARY)
        return read_responses(answer)

    async def choose(self, token_ids: Sequence[int], choices: Sequence[int]) -> list[float]:
        """Log-probs of the next token's being each of `choices`, given that it is one of them.

        Raises:
            EngineDied: the engine is gone.
        """
        answer = await self._answer(list(token_ids), choice_params(choices), ORDINARY)
        return [answer.outputs[0].logprobs[0][token].logprob for token in choices]

    @abstractmethod
    async def _answer(self, token_ids: list[int], params: Any, priority: int) -> Any:
        """vLLM's `RequestOutput` for vLLM's `SamplingParams`, once it is whole. The lowest priority is scheduled first."""

    @abstractmethod
    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method on every vLLM worker; one result each.

        Raises:
            TransferFailed: a worker raised; its own words are in the message.
            EngineDied: the engine is gone.
        """

    async def join_transfer(self, session: TransferSession, rank_offset: int) -> None:
        """Let the workers join the session with ranks `rank_offset` and following; blocks until all ranks have joined."""
        init = {"session": asdict(session), "rank_offset": rank_offset}
        await self.workers("init_weight_transfer_engine", init_info=init)

    async def receive_weights(self, shipment: Shipment, adapter: dict[str, Any] | None) -> set[str]:
        """Let the workers take the weights that the session's sender sends meanwhile. Between `pause` and `resume`.

        Args:
            adapter: the weights are a LoRA adapter with this configuration (`rlhf.engines.lora.peft_config`).

        Returns:
            Fingerprints of what the workers received: one, if all is well.

        Raises:
            TransferFailed: the transfer broke off, or the weights do not fill the model.
        """
        announcement = {
            "names": [spec.name for spec in shipment.specs],
            "dtypes": [spec.dtype for spec in shipment.specs],
            "shapes": [list(spec.shape) for spec in shipment.specs],
        }
        if adapter is not None:
            await self.workers("receive_adapter", update_info=announcement, config=adapter)
        else:
            await self.workers("aim", slot=shipment.slot)
            await self.workers("start_weight_update")
            await self.workers("update_weights", update_info=announcement)
            await self.workers("finish_weight_update")
        return set(await self.workers("attest"))

    async def held(self, slot: ModelSlot) -> tuple[str, ...]:
        """Checksum of the weights that this slot of the model holds, of each worker (`rlhf.engines.slots.checksum`)."""
        return tuple(await self.workers("held", slot=slot))

    async def weight_digest(self) -> str:
        """16 hexadecimal digits for the weights of all workers, as vLLM names and hashes them."""
        pairs = sorted(pair for worker in await self.workers("compute_weight_checksums") for pair in worker.items())
        return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]

    @property
    def uses_adapter(self) -> bool:
        """Whether requests run with the LoRA adapter that the workers hold, or with the base alone."""
        return self._adapter is not None

    def use_adapter(self) -> None:
        """Let requests from now on run with the LoRA adapter that the workers hold. Those that have begun with it use whichever the
        workers hold; those that have begun without stay without."""
        self._adapter = adapter_request()

    @abstractmethod
    async def set_version(self, version: int) -> None:
        """What completions from now on are marked with."""

    @abstractmethod
    async def sleep(self, level: int) -> None:
        """Give back GPU memory: the cache is dropped; weights go to host memory (level 1) or are dropped too (level 2). Running requests
        stop where they are until `wake`. Nothing happens on CPU."""

    @abstractmethod
    async def wake(self) -> None:
        """Undo `sleep`."""

    @abstractmethod
    def close(self) -> None:
        """End the engine and its child processes."""


def sampling_params(sampling: Sampling, request_seed: int, stops: Sequence[int]) -> Any:
    """vLLM's parameters for these responses. `stops`: see `Engine`; they count unless ends are ignored."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=request_seed,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=[] if sampling.ignore_eos else list(stops),
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={MIXTURE_ARGUMENT: sampling.mixture} if sampling.mixture else None,
    )


def choice_params(choices: Sequence[int]) -> Any:
    """vLLM's parameters for one token out of these. With all others ruled out, the log-probs are those of the choice between them."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=1.0,
        seed=None,
        logprobs=len(choices),
        allowed_token_ids=list(choices),
        detokenize=False,
    )


def read_responses(output: Any) -> list[Sampled]:
    """The responses in one of vLLM's `RequestOutput`s."""
    return [
        Sampled(
            token_ids=np.asarray(one.token_ids, dtype=np.int32),
            logprobs=np.asarray(one.logprobs.logprobs, dtype=np.float32),
            finish_reason=one.finish_reason,
            # None where vLLM has no version to tell; the spans are in order and cover all tokens otherwise.
            spans=tuple(Span(span.start, span.end, int(span.version)) for span in one.weight_versions or ()),
        )
        for one in output.outputs
    ]
