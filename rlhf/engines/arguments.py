"""What vLLM is told when an engine starts: the one place, for the rollout's engines and for an LLM judge's.

Each of them says in an `EngineSpec` what it needs; how that is said to vLLM is decided here. Written for vLLM 0.32; imports it only for
an engine that mixes or takes adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.engines.environment import executor
from rlhf.engines.lora import adapter_arguments
from rlhf.engines.plugin import ENGINE_NAMES, register
from rlhf.engines.shared_process import torch_as_it_was
from rlhf.transfer import Backend

_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "auto": "auto"}


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine.

    Attributes:
        model: folder or hub name, resolved.
        dtype: what it computes in; `auto` is the checkpoint's own precision, except that vLLM rounds fp32.
        devices: how many hold one copy of the model (tensor parallelism).
        gpu: they are GPUs.
        max_model_len: prompt and response together, in tokens.
        max_num_seqs: responses that are written at once, at the most.
        gpu_memory: share of each GPU's memory, from 0 to 1. Without GPUs it means nothing.
        cpu_cache_bytes: size of the key-value cache without GPUs. With them it means nothing.
        seed: the engine's own, for requests without one.
        eager: without CUDA graphs.
        max_batched_tokens: of one forward; None: vLLM's choice.
        prefix_caching: whether prompts that begin alike share their cache; None: vLLM's choice.
        seeded: requests bring a seed each.
        sleeps: the engine gives back its GPU's memory now and then.
        backend: how new weights arrive; None: they never do.
        lora_rank: of the LoRA adapters that arrive in place of weights; None: whole weights arrive.
        mixes: the engine holds two models and samples from mixtures of them.
    """

    model: str
    dtype: Literal["bf16", "fp32", "auto"]
    devices: int
    gpu: bool
    max_model_len: int
    max_num_seqs: int
    gpu_memory: float
    cpu_cache_bytes: int
    seed: int = 0
    eager: bool = False
    max_batched_tokens: int | None = None
    prefix_caching: bool | None = None
    seeded: bool = False
    sleeps: bool = False
    backend: Backend | None = None
    lora_rank: int | None = None
    mixes: bool = False


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """vLLM's engine arguments.

    Raises:
        CannotMix: vLLM cannot run two such models as one.
        UserError: the engine is to mix, and is to be sent adapters.
    """
    arguments = {
        "model": spec.model,
        "dtype": _DTYPES[spec.dtype],
        "max_model_len": spec.max_model_len,
        "tensor_parallel_size": spec.devices,
        "distributed_executor_backend": executor(spec.devices),
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_batched_tokens,
        "enforce_eager": spec.eager or not spec.gpu,
        "gpu_memory_utilization": spec.gpu_memory,
        "kv_cache_memory_bytes": None if spec.gpu else spec.cpu_cache_bytes,
        "enable_sleep_mode": spec.sleeps,
        "enable_prefix_caching": spec.prefix_caching,
        # Log-probs must be those of the distribution sampled from, temperature, truncation and ruled-out tokens included.
        "logprobs_mode": "processed_logprobs",
        "seed": spec.seed,
        # Requests of one priority come first come, first served, as in vLLM's default policy.
        "scheduling_policy": "priority",
        "disable_log_stats": True,
    }
    if spec.seeded:
        # A prompt prefilled in parts makes vLLM 0.32 rewind the request's own generator, which torch cannot do on CPU.
        arguments["enable_chunked_prefill"] = spec.gpu
    if spec.backend is not None:
        arguments["weight_transfer_config"] = {"backend": ENGINE_NAMES[spec.backend]}
        arguments["worker_extension_cls"] = "rlhf.engines.receivers.AttestingWorker"
    if spec.lora_rank is not None:
        arguments |= adapter_arguments(spec.lora_rank, spec.mixes)
    if spec.mixes:
        arguments |= _mixture_arguments(arguments)
    return arguments


def _mixture_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What an engine that mixes needs besides these."""
    from rlhf.engines.mixture import mixture_overrides
    from rlhf.engines.mixture_processors import processor_name

    register()
    arguments = arguments | {"hf_overrides": mixture_overrides(arguments["model"])}
    with torch_as_it_was():
        return arguments | {"logits_processors": [processor_name(arguments)]}
