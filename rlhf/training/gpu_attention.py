"""Attention of a packed row on a GPU: three forms, none of which holds a mask or scores of [tokens, tokens].

Designed, not yet run on a GPU. On a CPU, tests hold `flex` (uncompiled) and `branches` equal to the plain form, and `varlen`'s arguments
to their meaning. Which form is taken is `attention.choose`'s decision. torch 2.11 and 2.13 differ in the arguments of `varlen_attn`
only; `varlen_arguments` knows.

How `flex` avoids compiling for every ragged row: rows are padded to whole blocks; torch compiles for the first row's length, sees at the
second that lengths differ, and compiles once more for all of them. Windows, whatever their sizes, are another kernel, and so are another
grad mode and soft cap. A graph is always whole (`fullgraph`): torch would otherwise fall back, without a word, to a form that holds all
scores.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rlhf.training.attention_scores import Scores
from rlhf.training.segments import Run, Segments, blocks, padded

BLOCK = 128
"""Tokens of a side of FlexAttention's blocks: torch's default."""
FLEX_SMALLEST_HEAD = 16
"""Head sizes below this are refused by FlexAttention's kernels (torch 2.13)."""
VARIANTS = 64
"""Kernels that may be compiled: each of few, but torch's limit of 8 is too low for windows or none, two grad modes and a second model."""


# Whole texts: FlashAttention's kernel for variable lengths


def varlen_serves(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention serves this type, head size and device, also with gradients."""
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    if not varlen_arguments() or query.shape[-1] != value.shape[-1] or query.shape[-1] % 8:
        return False
    learned = query.detach()[:, :, :1].requires_grad_()  # no copy; some devices refuse large heads to gradients only
    return can_use_flash_attention(SDPAParams(learned, learned, learned, None, 0.0, True, False))


@functools.cache
def varlen_arguments() -> frozenset[str]:
    """The names that this torch's `varlen_attn` knows; none if it has none that takes a scale and a window (torch before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"scale", "window_size"} <= names else frozenset()


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
) -> torch.Tensor:
    """All texts of the row at once."""
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if scores.window is None else scores.window - 1
    # Older versions leave grouped heads to the kernel, which has always known them.
    grouped = {"enable_gqa": True} if "enable_gqa" in varlen_arguments() else {}
    bounds = segments.bounds(query.device)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        segments.longest,
        segments.longest,
        scale=scores.scale,
        window_size=(back, 0) if scores.causal else (-1, -1),
        **grouped,
    )
    return output.transpose(0, 1)[None]


# Shared prompts: FlexAttention with a block mask


def flex_serves(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlexAttention can be compiled here."""
    from torch.utils._triton import has_triton

    return min(query.shape[-1], value.shape[-1]) >= FLEX_SMALLEST_HEAD and has_triton()


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
) -> torch.Tensor:
    """All groups of the row at once. Compiled on a GPU; elsewhere as torch's reference, which holds all scores."""
    device, total = query.device, segments.total
    mask = segments.keep(
        ("blocks", scores.window, scores.causal, device),
        lambda: block_mask(segments, scores.window, device, causal=scores.causal),
    )
    missing = mask.seq_lengths[0] - total
    inputs = [F.pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value)]
    output = flex_kernel(device)(
        *inputs,
        score_mod=None if scores.softcap is None else _softcap(scores.softcap),
        block_mask=mask,
        scale=scores.scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output[:, :, :total]


def flex_kernel(device: torch.device) -> Callable[..., torch.Tensor]:
    """`flex_attention` as it is called on this device."""
    return compiled_flex() if device.type == "cuda" else flex_attention


def compiled_flex(backend: Any = "inductor") -> Callable[..., torch.Tensor]:
    """`flex_attention`, compiled when first called with arguments of a new kind."""

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return _compiled(backend)(*args, **kwargs)

    return attend


@functools.cache
def _compiled(backend: Any) -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, fullgraph=True, backend=backend)


@functools.cache
def _softcap(cap: float) -> Callable[..., torch.Tensor]:
    """One function per cap, so that torch sees the same one at every call."""

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return capped


def block_mask(segments: Segments, window: int | None, device: torch.device, *, causal: bool) -> BlockMask:
    """The row's block mask, padded to whole blocks with a text of its own. Made on the host from lengths: torch's own
    `create_block_mask` would hold [row, row] on the device."""
    runs = padded(segments.runs, BLOCK)
    some, all_ = blocks(runs, BLOCK, window, causal=causal)
    partial, full = (_ordered(chosen, device) for chosen in (some & ~all_, all_))
    length = runs[-1].stop
    mask_mod = _mask_mod(runs, window, device, causal=causal)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length))


def _ordered(chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [blocks, blocks] -> int32 ([1, 1, blocks] how many are chosen, [1, 1, blocks, blocks] which, first those)."""
    counts = torch.from_numpy(chosen.sum(1, dtype=np.int32))
    places = torch.from_numpy(np.argsort(~chosen, axis=1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), places[None, None].to(device)


def _mask_mod(
    runs: tuple[Run, ...], window: int | None, device: torch.device, *, causal: bool
) -> Callable[..., torch.Tensor]:
    """Whether the query at a place of the row sees the key at another."""
    sizes = [run.stop - run.start for run in runs]

    def per_token(values: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.int32), sizes)).to(device)

    run, root = per_token(list(range(len(runs)))), per_token([one.root for one in runs])
    if not causal:
        return lambda b, h, q, k: run[q] == run[k]
    if window is None:
        return lambda b, h, q, k: ((run[q] == run[k]) | (root[q] == run[k])) & (q >= k)
    position = [one.first - one.start for one in runs]  # minus the place in the row
    # The window lies in a tensor, so that one kernel serves all; as a number it would be compiled in, or become a symbol of the kernel.
    own, reach = per_token(position), per_token([before + window for before in position])

    def near(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = ((run[q] == run[k]) | (root[q] == run[k])) & (q >= k)
        return seen & (q + own[q] < k + reach[k])

    return near


# Where neither serves: one response at a time


def branches(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
) -> torch.Tensor:
    """Each prompt, and each response after its prompt, by a call of its own, flash or memory-efficient: never cuDNN, which makes a plan
    for every exact shape, nor products that hold all scores. Windows and soft caps are not served."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))  # masks exclude grouped heads
    outputs = []
    with sdpa_kernel(_KERNELS if query.is_cuda else [*_KERNELS, SDPBackend.MATH]):
        for run in segments.runs:
            own, root = slice(run.start, run.stop), segments.runs[run.root]
            keys, values = key[:, :, own], value[:, :, own]
            if run.start != root.start:
                before = slice(root.start, root.stop)
                keys, values = (
                    torch.cat(pair, dim=2) for pair in ((key[:, :, before], keys), (value[:, :, before], values))
                )
            bias = causal_lower_right(run.stop - run.start, keys.shape[2]) if scores.causal else None
            outputs.append(F.scaled_dot_product_attention(query[:, :, own], keys, values, bias, scale=scores.scale))
    return torch.cat(outputs, dim=2)


_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
