"""How much memory the roles need, from the model's shape alone. Estimates, meant to be right within a fifth or so.

Pure arithmetic: knows bytes per parameter and how ZeRO divides them, not what a device has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.config.policy import PolicySettings
from rlhf.config.rollout import RolloutSettings

BYTES = {"bf16": 2, "fp32": 4}
GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """What the estimates need to know of a model. `parameters` counts tied weights once."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    context: int | None


@dataclass(frozen=True)
class PolicyMemory:
    """Bytes on one policy rank's device, and in host memory for what is offloaded."""

    policy: float
    reference: float
    gradients: float
    optimizer: float
    activations: float
    host: float

    @property
    def device(self) -> float:
        return self.policy + self.reference + self.gradients + self.optimizer + self.activations


def model_shape(config: Any) -> ModelShape:
    """The shape of the causal language model that a transformers configuration describes; no weights are made.

    Raises:
        ValueError: the configuration is not a causal language model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
    )


def policy_memory(shape: ModelShape, settings: PolicySettings) -> PolicyMemory:
    """Bytes per rank.

    bf16 training keeps fp32 master weights and, from ZeRO 1 on, accumulates gradients in fp32 beside the bf16 ones.
    Activations are about 34 bytes per token, layer and hidden unit in bf16 (attention matrices never whole), or 2 with
    gradient checkpointing plus one layer; in fp32 twice as much. The vocabulary is projected in fp32 chunks, two of
    which live at the same time.
    """
    size, stage, ranks = BYTES[settings.dtype], settings.zero_stage, settings.ranks
    mixed = settings.dtype == "bf16"
    weights = shape.parameters * size / (ranks if stage == 3 else 1)
    gradients = shape.parameters * (size + (4 if mixed and stage > 0 else 0)) / (ranks if stage >= 2 else 1)
    optimizer = shape.parameters * (8 + (4 if mixed else 0)) / (ranks if stage >= 1 else 1)
    per_layer = settings.micro_batch_tokens * shape.hidden * size
    stored = per_layer * (shape.layers + 17) if settings.gradient_checkpointing else per_layer * 17 * shape.layers
    chunks = 2 * settings.logprob_chunk_tokens * shape.vocabulary * 4
    keep_optimizer, keep_weights = settings.offload_optimizer == "none", settings.offload_parameters == "none"
    return PolicyMemory(
        policy=weights if keep_weights else 0,
        reference=weights if keep_weights else 0,
        gradients=gradients,
        optimizer=optimizer if keep_optimizer else 0,
        activations=stored + chunks,
        host=(0 if keep_optimizer else optimizer) + (0 if keep_weights else 2 * weights),
    )


def engine_weights(shape: ModelShape, rollout: RolloutSettings, policy: PolicySettings) -> float:
    """Bytes of weights on each device of one engine."""
    dtype = policy.dtype if rollout.dtype == "policy" else rollout.dtype
    return shape.parameters * BYTES[dtype] / rollout.tensor_parallel_size
