"""What the parts share: the device, rows of groups, time and memory of a call, and which form attention takes."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.training import attention, gpu_attention
from rlhf.training.attention import Form
from rlhf.training.attention_scores import Scores
from rlhf.training.segments import Segment, Segments

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
GROUPS = Sequence[tuple[int, tuple[int, ...]]]
"""Tokens of each prompt and of its responses."""
FORMS: dict[str, Form] = {
    "varlen": gpu_attention.varlen,
    "flex": gpu_attention.flex,
    "branches": gpu_attention.branches,
    "plain": attention.plain,
    "masked": attention.fused,
}
"""By name; `masked` is what was used before: scaled_dot_product_attention with a mask per group and torch's choice of kernel."""


class Table:
    """Rows of one part, written as they come."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, **row: Any) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def attempt(table: Table, named: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Add a row with what `measure` returns, or that the device has too little memory for it."""
    try:
        table.add(**named, **measure())
    except torch.OutOfMemoryError:
        table.add(**named, note="out of memory")
        torch.cuda.empty_cache()


def row_of(groups: GROUPS) -> Segments:
    """The segments of a row of these groups."""
    made, start = [], 0
    for prompt, responses in groups:
        made.append(Segment(start, prompt, tuple(responses)))
        start = made[-1].stop
    return Segments(made)


def pairs(segments: Segments) -> int:
    """Pairs of a query and a key that it sees, over a causal row: what attention must compute."""
    total = 0
    for run in segments.runs:
        length, root = run.stop - run.start, segments.runs[run.root]
        before = 0 if run.start == root.start else root.stop - root.start
        total += length * before + length * (length + 1) // 2
    return total


def serves(form: str, segments: Segments, scores: Scores, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a form computes this here. On a CPU there is no FlashAttention for `varlen`."""
    capped, windowed = scores.softcap is not None, scores.window is not None
    if form == "varlen":
        return not segments.branches and not capped and GPU and gpu_attention.varlen_serves(query, value)
    if form == "flex":
        return not GPU or gpu_attention.flex_serves(query, value)
    if form == "branches":
        return not capped and not windowed
    return form == "plain" or not capped


@contextlib.contextmanager
def forced(form: str) -> Iterator[None]:
    """Attention in this form, whatever `attention.choose` would take."""
    before = attention.choose
    attention.choose = lambda *_: FORMS[form]
    try:
        yield
    finally:
        attention.choose = before


@contextlib.contextmanager
def flex_anywhere() -> Iterator[None]:
    """On a CPU torch 2.13 refuses gradients of FlexAttention's reference, though it has them: lifted here for the miniature."""
    from torch.nn.attention import flex_attention as module

    if GPU:
        yield
        return
    before = module._validate_device, module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    module._validate_device, module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = lambda *_: None, True
    try:
        yield
    finally:
        module._validate_device, module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def once(call: Callable[[], Any]) -> float:
    """Seconds of one call, to its end on the device."""
    _finish()
    start = time.perf_counter()
    call()
    _finish()
    return time.perf_counter() - start


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after two that do not count (none before a single one)."""
    for _ in range(2 if repeats > 1 else 0):
        call()
    return statistics.median(once(call) for _ in range(repeats))


def peak(call: Callable[[], Any]) -> float | None:
    """GB that the device holds at the most during a call, beyond what it held before; None without a GPU."""
    if not GPU:
        call()
        return None
    _finish()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    _finish()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def _finish() -> None:
    if GPU:
        torch.cuda.synchronize()
