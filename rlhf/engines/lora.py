"""Engines that keep the base model and are sent the policy's LoRA adapter (`policy.lora.publish: adapter`).

Owns: what vLLM is told about adapters when it starts and in each request. The matrices arrive in memory (`rlhf.engines.adapter_inbox`); no
file is ever read, although vLLM's requests want a path.
"""

from __future__ import annotations

from typing import Any, get_args

from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings

ADAPTER_ID = 1
"""vLLM's number for the policy's LoRA adapter."""


def sends_adapters(lora: LoraSettings) -> bool:
    """Whether the engines are sent adapters, not whole weights."""
    return lora.publish == "adapter"


def adapter_arguments(rank: int, mixes: bool) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter of this rank.

    Raises:
        UserError: the engine is to mix, which it can only do with merged weights.
    """
    if mixes:
        raise UserError(
            "policy.lora.publish: the algorithm samples from a mixture of two models, and engines that hold two take merged weights only. "
            "Set policy.lora.publish=merged."
        )
    from vllm.config.lora import MaxLoRARanks

    # vLLM allows for a few ranks only; it pads a smaller adapter with zeros.
    padded = min(size for size in get_args(MaxLoRARanks) if size >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": padded}


def peft_config(lora: LoraSettings) -> dict[str, Any] | None:
    """What the workers must know of the adapters that arrive, in peft's names; None if whole weights are sent."""
    if not sends_adapters(lora):
        return None
    return {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.target_modules}


def adapter_request() -> Any:
    """vLLM's mark on a request that runs with the adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", ADAPTER_ID, "received-in-memory")
