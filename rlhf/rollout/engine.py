"""One rollout engine: a vLLM engine and the rules under which its answers count.

Runs as a Ray actor, or in the driver's process in debug mode. Owns one vLLM engine, the version of its weights and whether they are whole,
also while they are exchanged under running requests. Knows nothing of other engines, of the loop, or of who sends the weights. Called by
`RolloutPool`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import numpy as np

from rlhf.config.settings import Settings
from rlhf.engines.async_engine import AsyncEngine
from rlhf.engines.engine import Engine, Sampled
from rlhf.engines.in_process import InProcessEngine
from rlhf.engines.lora import peft_config
from rlhf.engines.sampling import Sampling
from rlhf.engines.start import start_engine
from rlhf.rollout.spec import rollout_spec
from rlhf.transfer import Backend, TransferFailed, TransferSession
from rlhf.transfer.versions import Attestation, Checksums, StaleWeights
from rlhf.types import DATASET_VERSION, Completion, CompletionInfo, FinishReason, ModelSlot, Prompt, Shipment


class BadResponse(RuntimeError):
    """An engine returned a response that must not be trained on."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself when it is ready.

    Attributes:
        workers: vLLM worker processes, each of which receives weights.
        pid: of the engine's process on `host`.
        log: file that the process writes to, on its own host; None when it is the driver's process.
        held: see `rlhf.transfer.versions.Attestation`.
    """

    index: int
    workers: int
    host: str
    pid: int
    log: str | None
    held: Checksums = field(default_factory=dict)


class RolloutEngine:
    """A vLLM engine behind the pool's questions. Constructing it costs nothing; `ready` loads the model.

    Weights loaded from the model's folder count as version 0.
    """

    def __init__(self, settings: Settings, index: int, local: bool, backend: Backend, gpu: bool, mixes: bool = False):
        """
        Args:
            local: run vLLM inside this process (debug mode).
            backend: how weights will arrive.
            gpu: whether the engine runs on GPUs.
            mixes: hold a second model, the policy's partner, and sample from mixtures of both.
        """
        self._settings = settings
        self._index = index
        self._local = local
        self._backend = backend
        self._gpu = gpu
        self._mixes = mixes
        self._adapter = peft_config(settings.policy.lora)
        self._started: Engine | None = None
        self._version = 0
        self._broken: set[ModelSlot] = set()  # whose last transfer has not ended well
        self._failures = 0  # transfers that have not ended well, so far
        self._asked = 0  # prompts that are being answered
        self._settled = asyncio.Event()  # no weights are arriving
        self._settled.set()
        self._session: TransferSession | None = None
        self._delivered = asyncio.Event()
        self._delivery: tuple[Shipment, str] | None = None

    @property
    def _engine(self) -> Engine:
        assert self._started is not None, "`ready` comes first"
        return self._started

    async def ready(self) -> EngineInfo:
        """Load the model. Returns when the engine can answer.

        Raises:
            CannotMix: the engine is to mix, and vLLM cannot run two such models as one.
            ValueError: vLLM refuses the model or the settings.
        """
        from rlhf.data.model_folder import find_model
        from rlhf.data.prompts import load_tokenizer
        from rlhf.data.rendering import renderer

        settings, local = self._settings, self._local
        model = find_model(settings.policy.model, "`policy.model`")
        end = renderer(load_tokenizer(model), settings.data).end
        spec = rollout_spec(settings, model, backend=self._backend, gpu=self._gpu, local=local, mixes=self._mixes)
        self._started = start_engine(spec, in_process=local, stops=[] if end is None else [end])
        await self._engine.set_version(0)
        log = None if self._local else os.readlink("/proc/self/fd/2")
        workers = self._settings.rollout.tensor_parallel_size
        return EngineInfo(self._index, workers, socket.gethostname(), os.getpid(), log, await self._held())

    async def sample(
        self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False
    ) -> tuple[tuple[CompletionInfo, ...], list[Completion]]:
        """Draw responses to one prompt, `sampling.n` for each of `samplings`. While weights arrive, it waits for them.

        Args:
            with_pair: append the data set's chosen and rejected response.

        Returns:
            What the driver plans with, and the completions themselves, in the same order.

        Raises:
            ValueError: the prompt is empty, or too long for the engine, or a mixture is asked of an engine without a partner.
            BadResponse: the engine returned an empty or aborted response, or a log-prob that is not a number.
            StaleWeights: the last transfer of weights failed, or one did meanwhile.
            EngineDied: vLLM's core process ended.
        """
        while not self._settled.is_set():
            await self._settled.wait()
        if self._broken:
            raise StaleWeights(f"engine {self._index} holds half-loaded weights; publish again before sampling")
        for sampling in samplings:
            self._check_length(prompt, sampling)
            if sampling.mixture and not self._mixes:
                raise ValueError(
                    f"{sampling.source} asks for a mixture, but the engines hold no partner: start the pool with mixes"
                )
        answers = await self._answers(prompt, samplings)
        completions = [
            self._completion(prompt, sampling, position, answer)
            for sampling, drawn in zip(samplings, answers, strict=True)
            for position, answer in enumerate(drawn)
        ]
        if with_pair:
            completions += _pair(prompt)
        return tuple(completion.info() for completion in completions), completions

    async def _answers(self, prompt: Prompt, samplings: Sequence[Sampling]) -> list[list[Sampled]]:
        failures = self._failures
        self._asked += 1
        try:
            answers = await asyncio.gather(*(self._engine.generate(prompt, sampling) for sampling in samplings))
        finally:
            self._asked -= 1
        if self._failures != failures:
            raise StaleWeights(
                f"a transfer of weights to engine {self._index} failed while it answered prompt {prompt.id}"
            )
        return answers

    def _check_length(self, prompt: Prompt, sampling: Sampling) -> None:
        data, rollout = self._settings.data, self._settings.rollout
        limit = data.max_prompt_tokens + rollout.max_tokens
        n = len(prompt.token_ids)
        if n == 0:
            raise ValueError(f"prompt {prompt.id} has no tokens")
        if n + sampling.max_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id} has {n} tokens and asks for up to {sampling.max_tokens} more, but the engines "
                f"hold {limit} (data.max_prompt_tokens = {data.max_prompt_tokens} plus rollout.max_tokens = "
                f"{rollout.max_tokens}): raise data.max_prompt_tokens, or set data.too_long to drop"
            )

    def _completion(self, prompt: Prompt, sampling: Sampling, position: int, answer: Sampled) -> Completion:
        where = f"response {position} ({sampling.source}) of prompt {prompt.id} from engine {self._index}"
        if answer.finish_reason not in get_args(FinishReason):
            raise BadResponse(f"{where} ended with '{answer.finish_reason}' instead of 'stop' or 'length'")
        if len(answer.token_ids) == 0:
            raise BadResponse(f"{where} is empty: not even an end-of-sequence token was sampled")
        if len(answer.logprobs) != len(answer.token_ids):
            raise BadResponse(f"{where} has {len(answer.token_ids)} tokens but {len(answer.logprobs)} log-probs")
        if not np.isfinite(answer.logprobs).all():
            first = int(np.flatnonzero(~np.isfinite(answer.logprobs))[0])
            raise BadResponse(
                f"{where}: the log-prob of token {first} is {answer.logprobs[first]}. The policy's weights or the "
                "engine's precision are broken: look for a loss or gradient norm that is not finite, or try "
                "rollout.dtype=fp32"
            )
        if not answer.spans:
            raise BadResponse(f"{where} does not say which version of the weights wrote it")
        by_policy = sampling.mixture == 0 and sampling.temperature > 0
        spans = tuple(replace(span, by_policy=by_policy) for span in answer.spans)
        finish_reason = cast(FinishReason, answer.finish_reason)
        return Completion(prompt.id, answer.token_ids, answer.logprobs, spans, finish_reason, sampling.source)

    async def join_transfer(self, session: TransferSession, rank_offset: int) -> None:
        """Join the session with ranks `rank_offset` and following; blocks until all ranks have joined.

        Raises:
            ValueError: the session's back end is not the one this engine was started with, or its epoch is over.
        """
        from rlhf.transfer import local

        if session.backend != self._backend:
            raise ValueError(
                f"engine {self._index} was started for weights by {self._backend}, the session is {session.backend}"
            )
        if self._session is not None and session.epoch <= self._session.epoch:
            raise ValueError(
                f"engine {self._index} joined the weight-transfer session of epoch {self._session.epoch}: that of epoch "
                f"{session.epoch} is over"
            )
        self._leave()
        self._session = session
        if session.backend == "local":
            self._delivered.clear()  # what an earlier session may have left
            local.register(session, self._deliver)
            return
        await self._engine.join_transfer(session, rank_offset)

    def _leave(self) -> None:
        """Forget the session of before; sockets and groups are closed by the workers as they join another."""
        from rlhf.transfer import local

        if self._session is not None and self._session.backend == "local":
            local.unregister(self._session)

    async def receive_weights(self, shipment: Shipment) -> Attestation:
        """Take the weights that the session's sender sends meanwhile. Running requests go on with them afterwards, or finish first
        (`rollout.in_flight`); what is cached of the old ones is forgotten.

        If the transfer fails, the engine refuses to sample until one succeeds for this slot, and all its requests end.

        Args:
            shipment: a policy's version is what completions from now on are marked with. The other slot keeps its weights.

        Raises:
            TransferFailed: the transfer broke off, or the weights do not fill the model.
        """
        slot = shipment.slot
        if slot == "partner" and not self._mixes:
            raise ValueError("weights were sent for the partner, but the engines hold none: start the pool with mixes")
        self._settled.clear()
        try:
            if self._backend == "local":
                fingerprint = await self._take_delivery(shipment)
            else:
                fingerprint = await self._receive_through_workers(shipment)
        finally:
            self._settled.set()
        if slot == "policy":
            self._version = shipment.version
        return Attestation(self._index, self._version, fingerprint, await self._held())

    def _slots(self) -> tuple[ModelSlot, ...]:
        return get_args(ModelSlot) if self._mixes else ("policy",)

    async def _held(self) -> dict[ModelSlot, tuple[str, ...]]:
        slots = self._slots() if self._mixes else ()  # alone there is no other slot to keep
        return {slot: await self._engine.held(slot) for slot in slots if slot not in self._broken}

    async def _take_delivery(self, shipment: Shipment) -> str:
        """What the sender has put into the engine itself (back end `local`)."""
        await self._delivered.wait()
        self._delivered.clear()
        if self._delivery is None:
            raise TransferFailed("the weights could not be loaded; the sender's own error says why")
        sent, fingerprint = self._delivery
        if sent.slot != shipment.slot:
            self._broken |= {sent.slot, shipment.slot}
            self._failures += 1
            raise TransferFailed(
                f"the driver announced weights for the {shipment.slot}, but the sender sent them for the {sent.slot}"
            )
        return fingerprint

    async def _receive_through_workers(self, shipment: Shipment) -> str:
        self._require_adapted()
        engine = cast(AsyncEngine, self._engine)
        await engine.pause(keep=self._keeps)
        try:
            with self._loading(shipment.slot):
                fingerprints = await engine.receive_weights(shipment, self._adapter)
                if len(fingerprints) != 1:
                    raise TransferFailed(
                        f"the workers of engine {self._index} received different weights: {sorted(fingerprints)}"
                    )
                if shipment.slot == "policy":
                    await engine.set_version(shipment.version)
                if self._adapter is not None:
                    engine.use_adapter()
        except BaseException:
            # vLLM cannot run a model that is half-loaded. Of several workers one may have failed unheard, which vLLM takes for the
            # answer to this call: what failed first is what is raised.
            await asyncio.gather(engine.abort(), return_exceptions=True)
            raise
        finally:
            await engine.resume()
        return fingerprints.pop()

    @contextmanager
    def _loading(self, slot: ModelSlot) -> Iterator[None]:
        """While this slot's weights are exchanged. If that fails, they are broken, and what is being written does not count; both are known
        before any request ends."""
        self._broken.add(slot)
        try:
            yield
        except BaseException:
            self._failures += 1
            raise
        self._broken.discard(slot)

    @property
    def _keeps(self) -> bool:
        return self._settings.rollout.in_flight == "keep"

    def _require_adapted(self) -> None:
        """Make sure that no running request would go on without the adapter that arrives: it would be marked with a version that did not
        write it."""
        if self._adapter is not None and not self._engine.uses_adapter and self._asked:
            raise TransferFailed(
                f"the first adapter came to engine {self._index} while it answered {self._asked} prompts with the base model alone: "
                "publish it before anything is sampled"
            )

    def _deliver(self, weights: Iterable[tuple[str, Any]], shipment: Shipment) -> str:
        """Called by the sender, in its own stack (back end `local`), before or after `receive_weights`. The weights count from here on."""
        engine = cast(InProcessEngine, self._engine)
        self._delivery = None
        try:
            self._require_adapted()
            with self._loading(shipment.slot):
                fingerprint = engine.load(weights, shipment, self._adapter, keep=self._keeps)
            self._delivery = (shipment, fingerprint)
        finally:
            self._delivered.set()  # also after an error: `receive_weights` must not wait for what will not come
        return fingerprint

    async def offload(self) -> None:
        """Give the GPU's memory to others until `reload`. At `rollout.sleep_level` 2 the weights are lost."""
        level = self._settings.rollout.sleep_level
        if level == 2:
            self._broken |= set(self._slots())
        await self._engine.sleep(level)

    async def reload(self) -> None:
        """Take the memory back. The weights are as they were, unless they were dropped; cached prefixes are gone."""
        await self._engine.wake()

    def close(self) -> None:
        """End vLLM and its processes. Calling it again does nothing."""
        self._leave()
        if self._started is not None:
            self._started.close()
            self._started = None


def _pair(prompt: Prompt) -> list[Completion]:
    """The data set's chosen and rejected response."""
    if prompt.pair is None:
        raise ValueError(
            f"prompt {prompt.id} has no `chosen` and `rejected` response, but the algorithm learns from them"
        )
    return [
        Completion.of_one_version(
            prompt.id,
            np.asarray(ids, dtype=np.int32),
            np.full(len(ids), np.nan, dtype=np.float32),
            DATASET_VERSION,
            "stop",
            source=source,
            by_policy=False,
        )
        for source, ids in zip(("chosen", "rejected"), prompt.pair, strict=True)
    ]
