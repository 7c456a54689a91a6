"""Attention inside a packed row: every group attends to itself only, and its responses do not see each other.

Registered with transformers under the name "packed"; it receives the row's `Segments` through the model's keyword arguments. Owns: the
choice of how a row's attention is computed (`choose`, the only place), and the forms for a CPU. The forms for a GPU lie in
`gpu_attention`. All forms give the same values and gradients, to rounding; none holds a mask or scores of a whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from rlhf.training.attention_scores import Scores
from rlhf.training.segments import Segments

NAME = "packed"
UNSUPPORTED = ("s_aux", "position_bias")
"""What some architectures hand to attention beside queries, keys and values: sinks, biases by distance."""

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, Scores], torch.Tensor]
"""(query [1, heads, row, size], key and value [1, key heads, row, size], ...) -> [1, heads, row, size]."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; query [1, heads, row, head_dim] -> output [1, row, heads, head_dim].

    Raises:
        ValueError: the model asks for something this function does not compute (attention sinks, dropout, a window in both directions).
    """
    check_supported(module, sliding_window, kwargs | {"dropout": dropout})
    if segments is None:
        raise ValueError("packed attention is told the row's segments through the model's keyword arguments")
    causal = getattr(module, "is_causal", True)
    if segments.branches and not causal:
        raise ValueError(f"{type(module).__name__} reads in both directions, so responses cannot share a prompt")
    window = sliding_window if sliding_window is not None and segments.longest > sliding_window else None
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, causal, window, softcap)
    output = choose(query, value, segments, scores)(query, key, value, segments, scores)
    return output.transpose(1, 2).contiguous(), None


def check_supported(module: torch.nn.Module, sliding_window: int | None, asked: Mapping[str, object]) -> None:
    """Raises ValueError if an attention layer asks for something that packed attention does not compute.

    Args:
        asked: what else the layer hands to the attention interface, by name.
    """
    unsupported = [name for name in UNSUPPORTED if asked.get(name) is not None]
    if asked.get("dropout"):
        unsupported.append("dropout")
    if sliding_window is not None and not getattr(module, "is_causal", True):
        unsupported.append("a window in both directions")
    if unsupported:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(unsupported)}, which packed attention does not support"
        )


def choose(query: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores) -> Form:
    """How this row's attention is computed here. The same whether or not gradients are kept, so that recomputed activations, and the
    policy's and its reference's log-probs, round alike.

    | device | row | form |
    | --- | --- | --- |
    | CPU | what may be learned from; soft-capped scores | `plain`: products, one group at a time |
    | CPU | inference of reward models, encoders | `fused`: torch's fused kernel, one group at a time |
    | GPU | whole texts | `varlen`: FlashAttention over all at once, if it serves type, head size and device |
    | GPU | responses that share a prompt, soft-capped scores, fp32 | `flex`: FlexAttention with a block mask |
    | GPU | where Triton is missing or the head is too small | `branches`: a memory-efficient kernel, one response at a time |

    Raises:
        ValueError: no form serves this model on this device.
    """
    if query.device.type == "cpu":
        # The policy's forwards without gradients keep to the products, so that they round as those with gradients.
        learning = scores.causal and not torch.is_inference_mode_enabled()
        return plain if learning or scores.softcap is not None else fused
    from rlhf.training import gpu_attention

    if not segments.branches and scores.softcap is None and gpu_attention.varlen_serves(query, value):
        return gpu_attention.varlen
    if gpu_attention.flex_serves(query, value):
        return gpu_attention.flex
    if scores.window is None and scores.softcap is None:
        return gpu_attention.branches
    raise ValueError(
        f"attention with {'a sliding window' if scores.window is not None else 'soft-capped scores'} and heads of {query.shape[-1]} in "
        f"{query.dtype} needs FlexAttention on a GPU: heads of at least {gpu_attention.FLEX_SMALLEST_HEAD} and an installed Triton"
    )


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
) -> torch.Tensor:
    """By plain matrix products: to learn from groups of some hundred tokens, far faster than torch's fused CPU kernel."""
    outputs = []
    for segment in segments:
        part = slice(segment.start, segment.stop)
        hidden = segments.hidden(segment, scores.window, query.device) if scores.causal else None
        outputs.append(_products(query[:, :, part], key[:, :, part], value[:, :, part], hidden, scores))
    return torch.cat(outputs, dim=2)


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    _, heads, length, size = query.shape
    shared = heads // key.shape[1]  # query heads per key head
    products = (query * scores.scale).reshape(1, key.shape[1], shared * length, size) @ key.transpose(2, 3)
    products = products.view(1, key.shape[1], shared, length, length)
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    if hidden is not None:
        products = products.masked_fill(hidden, float("-inf"))
    weights = products.softmax(-1)  # torch's CPU softmax accumulates bf16 in fp32
    mixed = weights.view(1, key.shape[1], shared * length, length) @ value
    return mixed.view(1, heads, length, value.shape[-1])


def fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
) -> torch.Tensor:
    """By torch's fused CPU kernel, without soft caps: no scores are kept."""
    outputs = []
    for segment in segments:
        part = slice(segment.start, segment.stop)
        masked = scores.causal and (segment.branches or (scores.window is not None and segment.length > scores.window))
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, part],
                key[:, :, part],
                value[:, :, part],
                attn_mask=~segments.hidden(segment, scores.window, query.device) if masked else None,
                is_causal=scores.causal and not masked,
                scale=scores.scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def avoid_plans_per_shape() -> None:
    """Keep scaled_dot_product_attention in this process from cuDNN. torch 2.13 prefers it on Hopper and later, where it makes a plan for
    every exact shape (tens to hundreds of milliseconds), and batches here are ragged."""
    torch.backends.cuda.enable_cudnn_sdp(False)


AttentionInterface.register(NAME, packed_attention)
