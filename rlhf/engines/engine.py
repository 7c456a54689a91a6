"""One vLLM engine, in child processes or in this one. Written for vLLM 0.32; when vLLM changes, this room changes and no other.

Two engines behind one interface: `AsyncEngine` (vLLM's `AsyncLLM`, whose core and workers are child processes) for Ray
actors, and `InProcessEngine` (vLLM's `LLMEngine` in this very process, stepped by a task of the event loop) for debug
mode, where a breakpoint inside the model works. Both answer with the same tokens.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlhf.cluster.devices import takes_turns
from rlhf.config.settings import Settings
from rlhf.engines.environment import executor
from rlhf.engines.lora import adapter_arguments, adapter_request
from rlhf.engines.sampling import MIXTURE_ARGUMENT, Sampling
from rlhf.engines.shared_process import default_group_kept, torch_as_it_was
from rlhf.transfer import TransferFailed
from rlhf.types import ModelSlot, Prompt

_request_numbers = itertools.count()
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class EngineDied(RuntimeError):
    """vLLM's core process is gone; the engine answers no more."""


@dataclass(frozen=True)
class Sampled:
    """One response as vLLM returns it: token ids int32 [n], log-probs float32 [n], and where it stopped."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str | None
    weight_version: int


class VllmEngine(Protocol):
    """What `RolloutEngine` needs of vLLM."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Sampled]:
        """All `sampling.n` responses of one prompt, in order.

        Raises:
            EngineDied: the engine is gone.
        """
        ...

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method on every vLLM worker; one result each.

        Raises:
            TransferFailed: a worker raised; its own words are in the message.
            EngineDied: the engine is gone.
        """
        ...

    async def pause(self) -> None:
        """Let running requests finish under the present weights, hold new ones back, and forget cached prefixes."""
        ...

    async def resume(self) -> None:
        """Go on with the requests that were held back."""
        ...

    async def set_version(self, version: int) -> None:
        """What completions from now on are marked with."""
        ...

    def use_adapter(self) -> None:
        """Let requests from now on run with the LoRA adapter that the workers hold."""
        ...

    async def sleep(self, level: int) -> None:
        """Give back GPU memory: the cache is dropped; weights go to host memory (level 1) or are dropped too (level 2).
        Nothing happens on CPU."""
        ...

    async def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """End the engine and its child processes."""
        ...


def engine_arguments(
    settings: Settings, model: str, engine_name: str, gpu: bool, local: bool, mixes: bool = False
) -> dict[str, Any]:
    """vLLM's engine arguments.

    Args:
        model: folder or hub name, resolved.
        engine_name: vLLM's name of the weight-transfer back end (`rlhf.transfer.plugin.ENGINE_NAMES`).
        gpu: whether the engine runs on GPUs.
        local: debug mode, in which engine and policy share a device in turns.
        mixes: the engine holds two models and samples from mixtures of them.

    Raises:
        CannotMix: vLLM cannot run two such models as one.
        UserError: the engine is to mix, and is to be sent adapters.
    """
    rollout = settings.rollout
    dtype = settings.policy.dtype if rollout.dtype == "policy" else rollout.dtype
    arguments = {
        "model": model,
        "dtype": _DTYPES[dtype],
        "max_model_len": settings.data.max_prompt_tokens + rollout.max_tokens,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": executor(rollout.tensor_parallel_size),
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager or not gpu,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if gpu else int(rollout.cpu_kv_cache_gb * 2**30),
        "enable_sleep_mode": gpu and takes_turns(settings, local),
        "enable_prefix_caching": True,
        # A prompt prefilled in parts makes vLLM rewind the request's own generator, which torch cannot do on CPU.
        "enable_chunked_prefill": gpu,
        # Behaviour log-probs must be those of the distribution sampled from, temperature and truncation included.
        "logprobs_mode": "processed_logprobs",
        "seed": settings.run.seed,
        "disable_log_stats": True,
        "weight_transfer_config": {"backend": engine_name},
        "worker_extension_cls": "rlhf.engines.receivers.AttestingWorker",
    }
    arguments |= adapter_arguments(settings, mixes)
    if mixes:
        from rlhf.engines.mixture import mixture_overrides
        from rlhf.engines.mixture_processors import processor_name
        from rlhf.transfer.plugin import register

        register()
        arguments["hf_overrides"] = mixture_overrides(model)
        with torch_as_it_was():
            arguments["logits_processors"] = [processor_name(arguments)]
    return arguments


def start_engine(arguments: dict[str, Any], in_process: bool, stops: Sequence[int] = ()) -> VllmEngine:
    """Load the model and start the engine; takes tens of seconds.

    Args:
        stops: tokens that end a response beside those of tokenizer and generation configuration, which vLLM knows itself.

    Raises:
        ValueError: vLLM refuses the arguments (a `max_model_len` beyond the model's positions, too little memory, ...).
    """
    from rlhf.transfer.plugin import register

    register()  # vLLM's own call of the entry point comes too late for checks in this process, and twice does no harm
    return InProcessEngine(arguments, stops) if in_process else AsyncEngine(arguments, stops)


def _sampling_params(sampling: Sampling, request_seed: int, stops: Sequence[int]) -> Any:
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


def _read(output: Any) -> list[Sampled]:
    return [
        Sampled(
            token_ids=np.asarray(one.token_ids, dtype=np.int32),
            logprobs=np.asarray(one.logprobs.logprobs, dtype=np.float32),
            finish_reason=one.finish_reason,
            weight_version=_version(one.weight_versions),
        )
        for one in output.outputs
    ]


def _version(spans: Any) -> int:
    versions = {span.version for span in spans or ()}
    if len(versions) != 1:
        raise RuntimeError(
            f"a response was written by the weight versions {sorted(versions)}, but exactly one is possible here"
        )
    return int(versions.pop())


class AsyncEngine:
    """`AsyncLLM`: continuous batching in child processes."""

    def __init__(self, arguments: dict[str, Any], stops: Sequence[int]):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._stops = stops
        self._adapter: Any = None

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Sampled]:
        from vllm.v1.engine.exceptions import EngineDeadError

        params = _sampling_params(sampling, sampling.request_seed(prompt.id), self._stops)
        tokens = {"prompt_token_ids": list(prompt.token_ids)}
        try:
            request = str(next(_request_numbers))
            async for output in self._llm.generate(tokens, params, request, lora_request=self._adapter):
                final = output
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's core process ended: {error}") from error
        return _read(final)

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        call = self._llm.collective_rpc(method, kwargs=arguments)
        # Not a try statement: vLLM reports a worker's error as the bare class Exception, with the cause in its text.
        result: Any = (await asyncio.gather(call, return_exceptions=True))[0]
        if isinstance(result, EngineDeadError):
            raise EngineDied(f"vLLM's core process ended: {result}") from result
        if isinstance(result, BaseException):
            raise TransferFailed(str(result)) from result
        return result

    async def pause(self) -> None:
        await self._llm.pause_generation(mode="wait", clear_cache=True)

    async def resume(self) -> None:
        await self._llm.resume_generation()

    async def set_version(self, version: int) -> None:
        await self._llm.update_weight_version(str(version))

    def use_adapter(self) -> None:
        self._adapter = adapter_request()

    async def sleep(self, level: int) -> None:
        if self._llm.vllm_config.model_config.enable_sleep_mode:
            await self._llm.sleep(level=level)

    async def wake(self) -> None:
        if self._llm.vllm_config.model_config.enable_sleep_mode:
            await self._llm.wake_up()

    def close(self) -> None:
        self._llm.shutdown()


class InProcessEngine:
    """`LLMEngine` in this process. Requests awaited together are batched, as in `AsyncEngine`."""

    def __init__(self, arguments: dict[str, Any], stops: Sequence[int]):
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        with torch_as_it_was():
            self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._stops = stops
        self._adapter: Any = None
        self._waiting: dict[str, asyncio.Future] = {}
        self._stepper: asyncio.Task | None = None
        self._gate = asyncio.Event()
        self._gate.set()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Sampled]:
        await self._gate.wait()
        request_id = str(next(_request_numbers))
        params = _sampling_params(sampling, sampling.request_seed(prompt.id), self._stops)
        tokens = {"prompt_token_ids": list(prompt.token_ids)}
        self._llm.add_request(request_id, tokens, params, lora_request=self._adapter)
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._step_until_idle())
            self._stepper.add_done_callback(self._pass_on_failure)
        try:
            return await future
        finally:
            if self._waiting.pop(request_id, None) is not None and not future.done():
                self._llm.abort_request([request_id])

    async def _step_until_idle(self) -> None:
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                future = self._waiting.get(output.request_id)
                if output.finished and future is not None and not future.done():
                    future.set_result(_read(output))
            await asyncio.sleep(0)  # requests that others are about to make join the next step

    def _pass_on_failure(self, stepper: asyncio.Task) -> None:
        """An error inside the model belongs to those who wait for its answer."""
        failure = None if stepper.cancelled() else stepper.exception()
        for future in self._waiting.values():
            if failure is not None and not future.done():
                future.set_exception(failure)

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        return self._llm.collective_rpc(method, kwargs=arguments)

    def load(self, weights: Iterable[tuple[str, Any]], slot: ModelSlot, adapter: dict[str, Any] | None = None) -> str:
        """Load new weights into one slot, now. Returns their fingerprint. Needs an idle engine: call it between
        requests.

        Args:
            adapter: the weights are a LoRA adapter with this configuration (`rlhf.engines.lora.peft_config`).
        """
        if self._llm.has_unfinished_requests():
            raise RuntimeError(
                "weights were sent while requests were running: publish after all responses have arrived"
            )
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not forget its cached prefixes, which belong to the old weights")
        if adapter is not None:
            self._llm.collective_rpc("receive_adapter", kwargs={"update_info": {"weights": weights}, "config": adapter})
        else:
            self._llm.collective_rpc("aim", kwargs={"slot": slot})
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", kwargs={"update_info": {"weights": weights}})
            self._llm.collective_rpc("finish_weight_update")
        return self._llm.collective_rpc("attest")[0]

    async def pause(self) -> None:
        self._gate.clear()
        if self._stepper is not None:
            await self._stepper

    async def resume(self) -> None:
        self._gate.set()

    async def set_version(self, version: int) -> None:
        self._llm.set_weight_version(str(version))

    def use_adapter(self) -> None:
        self._adapter = adapter_request()

    async def sleep(self, level: int) -> None:
        if self._llm.model_config.enable_sleep_mode:
            self._llm.sleep(level=level)

    async def wake(self) -> None:
        if self._llm.model_config.enable_sleep_mode:
            self._llm.wake_up()

    def close(self) -> None:
        with default_group_kept():
            self._llm.engine_core.shutdown()
