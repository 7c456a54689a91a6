"""Attention inside a packed row: every group attends to itself only, and its responses do not see each other.

A row is a concatenation of groups; a group is one prompt followed by its responses (see packing.py). Attention runs group by
group, so no [row, row] mask ever exists and its cost is the sum of the groups' squares. It is registered with
transformers under the name "packed" and receives the groups through the model's keyword arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "packed"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some architectures hand to attention beside queries, keys and values: soft-caps, sinks, biases by distance."""


@dataclass(frozen=True)
class Segment:
    """One group's place in the row.

    Attributes:
        start, stop: positions in the row.
        mask: bool [stop - start, stop - start], True where a query may see a key; None for the model's own attention: causal, or in
            an encoder from all to all.
        positions: position of each token in its sequence, [stop - start] (for sliding windows).
    """

    start: int
    stop: int
    mask: torch.Tensor | None
    positions: torch.Tensor


def group_mask(prompt: int, responses: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Mask of a group: causal, and response tokens see the prompt and their own response only.

    Args:
        prompt: tokens of the prompt.
        responses: tokens of each response.
    """
    if len(responses) < 2:
        return None
    branch = torch.repeat_interleave(
        torch.arange(len(responses) + 1, device=device), torch.tensor([prompt, *responses], device=device)
    )
    same = branch[:, None] == branch[None, :]
    return (same | (branch == 0)[None, :]).tril()


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Sequence[Segment] = (),
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; query [1, heads, row, head_dim] -> output [1, row, heads, head_dim].

    Raises:
        ValueError: the model asks for something this function does not compute (soft-capped scores, attention sinks).
    """
    check_supported(module, sliding_window, kwargs)
    causal = getattr(module, "is_causal", True)
    # Inference that nothing is learned from (reward models) takes the fused kernel, on a CPU too. The policy's forwards without
    # gradients keep to the products, so that they round as those with gradients.
    fused = query.device.type != "cpu" or torch.is_inference_mode_enabled() or not causal
    attend = functools.partial(_attend, causal=causal) if fused else _attend_on_cpu
    outputs = []
    for segment in segments:
        part = slice(segment.start, segment.stop)
        mask = segment.mask
        if sliding_window is not None and segment.stop - segment.start > sliding_window:
            distance = segment.positions[:, None] - segment.positions[None, :]
            mask = _causal(distance) if mask is None else mask
            mask = mask & (distance < sliding_window)
        outputs.append(attend(query[:, :, part], key[:, :, part], value[:, :, part], mask, scaling, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def check_supported(module: torch.nn.Module, sliding_window: int | None, asked: Mapping[str, object]) -> None:
    """Raises ValueError if an attention layer asks for something that packed attention does not compute.

    Args:
        asked: what else the layer hands to the attention interface, by name.
    """
    unsupported = [name for name in UNSUPPORTED if asked.get(name) is not None]
    if unsupported:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(unsupported)}, which packed attention does not support"
        )
    if sliding_window is not None and not getattr(module, "is_causal", True):
        raise ValueError(
            f"{type(module).__name__} has a window in both directions, which packed attention does not support"
        )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention by plain matrix products: to learn from groups of some hundred tokens, far faster than torch's fused CPU kernel."""
    _, heads, length, size = query.shape
    shared = heads // key.shape[1]  # query heads per key head
    mask = _causal(query) if mask is None else mask
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scores = scaled.reshape(1, key.shape[1], shared * length, size) @ key.transpose(2, 3)
    scores = scores.view(1, key.shape[1], shared, length, length).masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout)  # torch's CPU softmax accumulates bf16 in fp32
    return (weights.view(1, key.shape[1], shared * length, length) @ value).view(1, heads, length, size)


def _causal(like: torch.Tensor) -> torch.Tensor:
    length = like.shape[-2]
    return torch.ones(length, length, dtype=torch.bool, device=like.device).tril()


AttentionInterface.register(NAME, packed_attention)
