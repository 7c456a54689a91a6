"""How much memory the roles need, from the model's shape alone. Estimates, meant to be right within a fifth or so.

Pure arithmetic: knows bytes per parameter and how ZeRO divides them, not what a device has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.algorithms import Algorithm, PolicyGradient
from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed
from rlhf.config.policy import PolicySettings
from rlhf.config.rollout import RolloutSettings

BYTES = {"bf16": 2, "fp32": 4}
GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """What the estimates need to know of a model.

    Attributes:
        parameters: tied weights count once.
        cached: numbers that one token leaves in the key-value cache.
    """

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    context: int | None
    cached: int


@dataclass(frozen=True)
class PolicyMemory:
    """Bytes on one policy rank's device, and in host memory for what is offloaded.

    Attributes:
        partner: the engines' second model, where it is not the reference.
        start: the model the run started from, where an evaluation needs it beside a reference that moves.
        critic: its weights, gradients and optimizer states.
    """

    policy: float
    reference: float
    partner: float
    start: float
    gradients: float
    optimizer: float
    critic: float
    activations: float
    host: float

    def parts(self) -> dict[str, float]:
        """What lies on the device, by name; what the method does not have is left out."""
        return {name: size for name, size in vars(self).items() if name != "host" and size}

    @property
    def device(self) -> float:
        return sum(self.parts().values())


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
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
        cached=2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head_size,
    )


def policy_memory(
    shape: ModelShape, settings: PolicySettings, algorithm: Algorithm, evaluates: bool = False
) -> PolicyMemory:
    """Bytes per rank.

    bf16 training keeps fp32 master weights and, from ZeRO 1 on, accumulates gradients in fp32 beside the bf16 ones.
    Activations are about 34 bytes per token, layer and hidden unit in bf16 (attention matrices never whole), or 2 with
    gradient checkpointing plus one layer; in fp32 twice as much. The vocabulary is projected in fp32 chunks, two of
    which live at the same time. A critic is as large as the policy and takes turns with it. An average, or the last iterate that an
    extrapolation remembers, is kept in fp32 in host memory.

    Args:
        evaluates: on held-out prompts: with a reference that moves, the start is kept as well, to measure the distance to.
    """
    size, stage, ranks = BYTES[settings.dtype], settings.zero_stage, settings.ranks
    mixed = settings.dtype == "bf16"
    weights = shape.parameters * size / (ranks if stage == 3 else 1)
    gradients = shape.parameters * (size + (4 if mixed and stage > 0 else 0)) / (ranks if stage >= 2 else 1)
    optimizer = shape.parameters * (8 + (4 if mixed else 0)) / (ranks if stage >= 1 else 1)
    per_layer = settings.micro_batch_tokens * shape.hidden * size
    stored = per_layer * (shape.layers + 17) if settings.gradient_checkpointing else per_layer * 17 * shape.layers
    chunks = 2 * settings.logprob_chunk_tokens * shape.vocabulary * 4
    trained = 2 if isinstance(algorithm.objective, PolicyGradient) and algorithm.objective.critic is not None else 1
    anchors = [rule for rule in (algorithm.reference, algorithm.partner) if rule is not None]
    start = weights if evaluates and not isinstance(algorithm.reference, Fixed) else 0
    remembered = sum(isinstance(rule, Ema | Extrapolated) for rule in anchors)
    device_weights = weights if settings.offload_parameters == "none" else 0
    device_optimizer = optimizer if settings.offload_optimizer == "none" else 0
    return PolicyMemory(
        policy=device_weights,
        reference=device_weights,
        partner=device_weights * (len(anchors) - 1),
        start=start if settings.offload_parameters == "none" else 0,
        gradients=gradients,
        optimizer=device_optimizer,
        critic=(device_weights + gradients + device_optimizer) * (trained - 1),
        activations=stored + chunks,
        host=(optimizer - device_optimizer) * trained
        + (weights - device_weights) * (trained + len(anchors) + (start > 0))
        + remembered * 4 * weights / size,
    )


def engine_weights(shape: ModelShape, rollout: RolloutSettings, policy: PolicySettings, mixes: bool = False) -> float:
    """Bytes of weights on each device of one engine, which holds two models if it mixes."""
    return (1 + mixes) * shape.parameters * _engine_bytes(rollout, policy) / rollout.tensor_parallel_size


def cached_token(shape: ModelShape, rollout: RolloutSettings, policy: PolicySettings, mixes: bool = False) -> float:
    """Bytes that one token takes in the key-value cache on each device of one engine."""
    return (1 + mixes) * shape.cached * _engine_bytes(rollout, policy) / rollout.tensor_parallel_size


def _engine_bytes(rollout: RolloutSettings, policy: PolicySettings) -> int:
    return BYTES[policy.dtype if rollout.dtype == "policy" else rollout.dtype]
