"""What the estimates need to know of a model: counted from its configuration alone, without weights or a network.

Well-known models are described here by the numbers of their published config.json, so that a plan for them works offline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.data.model_folder import size_of


@dataclass(frozen=True)
class ModelShape:
    """A causal language model's sizes.

    Attributes:
        parameters: tied weights count once.
        context: longest sequence, in tokens; None if the configuration does not say.
        cached: numbers that one token leaves in the key-value cache.
        queries: width of all attention heads of one layer together.
        feedforward: width of one layer's feed-forward block.
        heads: query heads of one layer.
        linear: weights of all linear layers between embedding and output projection: what a token is multiplied with,
            and what adapters and quantisation apply to.
        largest: numbers in the largest tensor: the embedding, or a layer's fused experts.
        adapter_widths: name of a kind of those layers (`q_proj`) -> inputs plus outputs of all of that kind, which is the number of
            parameters of their adapters of rank 1.
    """

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    context: int | None
    cached: int
    queries: int
    feedforward: int
    heads: int
    linear: int
    largest: int
    adapter_widths: Mapping[str, int]


def _llama(hidden: int, feedforward: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "intermediate_size": feedforward, "num_hidden_layers": layers}
    rest = {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256}
    return "llama", sizes | rest | {"max_position_embeddings": 131072, "tie_word_embeddings": False}


def _qwen(
    hidden: int, feedforward: int, layers: int, heads: int, shared: int, rows: int, tied: bool
) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "intermediate_size": feedforward, "num_hidden_layers": layers}
    rest = {"num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": rows}
    return "qwen2", sizes | rest | {"max_position_embeddings": 32768, "tie_word_embeddings": tied}


KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, 152064, False),
}
"""Name -> transformers' model type and the fields of its configuration."""


def known_name(model: str) -> str | None:
    """The entry of `KNOWN` that a name means, tuned variants and their hub names included; None if it means none."""
    name = model.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-instruct")
    return name if name in KNOWN else None


def known_shape(name: str) -> ModelShape:
    """The shape of a model in `KNOWN`."""
    from transformers import AutoConfig

    kind, fields = KNOWN[name]
    return model_shape(AutoConfig.for_model(kind, **fields))


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
    head_size = size_of(text, "head_dim") or text.hidden_size // heads
    inner = {name: m for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)}
    widths: Counter[str] = Counter()
    for name, layer in inner.items():
        widths[name.rpartition(".")[2]] += layer.in_features + layer.out_features
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
        cached=2 * text.num_hidden_layers * (size_of(text, "num_key_value_heads") or heads) * head_size,
        queries=heads * head_size,
        feedforward=size_of(text, "intermediate_size") or 4 * text.hidden_size,
        heads=heads,
        linear=sum(layer.weight.numel() for layer in inner.values()),
        largest=max(parameter.numel() for parameter in model.parameters()),
        adapter_widths=dict(widths),
    )
