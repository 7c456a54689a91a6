"""What a rollout engine is to be, from the settings: its `EngineSpec` and the environment of its processes."""

from __future__ import annotations

import os

from rlhf.cluster.devices import takes_turns, threads_env
from rlhf.config.settings import Settings
from rlhf.engines.arguments import EngineSpec
from rlhf.engines.environment import engine_environment
from rlhf.engines.lora import sends_adapters
from rlhf.transfer import Backend


def rollout_spec(
    settings: Settings, model: str, *, backend: Backend, gpu: bool, local: bool, mixes: bool = False
) -> EngineSpec:
    """The engine that samples.

    Args:
        model: folder or hub name, resolved.
        backend: how new weights will arrive.
        gpu: whether the engine runs on GPUs.
        local: debug mode, in which engine and policy share a device in turns.
        mixes: it holds two models and samples from mixtures of them.
    """
    rollout, lora = settings.rollout, settings.policy.lora
    return EngineSpec(
        model=model,
        dtype=settings.policy.dtype if rollout.dtype == "policy" else rollout.dtype,
        devices=rollout.tensor_parallel_size,
        gpu=gpu,
        max_model_len=settings.data.max_prompt_tokens + rollout.max_tokens,
        max_num_seqs=rollout.max_num_seqs,
        gpu_memory=rollout.gpu_memory_utilization,
        cpu_cache_bytes=int(rollout.cpu_kv_cache_gb * 2**30),
        seed=settings.run.seed,
        eager=rollout.enforce_eager,
        prefix_caching=True,
        seeded=True,
        sleeps=gpu and takes_turns(settings, local),
        backend=backend,
        lora_rank=lora.rank if sends_adapters(lora) else None,
        mixes=mixes,
    )


def rollout_environment(settings: Settings, local: bool) -> dict[str, str]:
    """Environment variables that a rollout engine's processes need before their first import.

    In debug mode they go into the driver's own environment, so only those that concern vLLM alone are set.
    """
    env = engine_environment(settings.cluster, 1 if local else settings.rollout.tensor_parallel_size, local)
    if local:
        return env
    env |= threads_env(settings.cluster, settings.rollout.engines)
    if not _is_hub_name(settings.policy.model):
        env["HF_HUB_OFFLINE"] = "1"
    return env


def _is_hub_name(model: str) -> bool:
    return not model.startswith("asset:") and not os.path.isdir(model)
