"""Which bucket a tensor travels in: many small tensors share one message, so that a model costs few round trips.

Both ends feed the same sizes in the same order to a `Placement` and so agree without exchanging a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlhf.transfer.fingerprint import as_bytes
from rlhf.types import WeightSpec

BUCKET_BYTES = 128 * 2**20
"""The most that the sender holds of the weights on their way, whatever the back end; the planner counts it."""
_ALIGN = 16  # bytes; any dtype may start here


class Placement:
    """Fills buckets in order. A tensor larger than a bucket has one of its own."""

    def __init__(self, capacity: int = BUCKET_BYTES):
        self._capacity = capacity
        self._bucket = 0
        self._used = 0

    def place(self, size: int) -> tuple[int, int]:
        """Bucket number and byte offset of the next tensor, of `size` bytes."""
        start = -(-self._used // _ALIGN) * _ALIGN
        if start and start + size > self._capacity:
            self._bucket, start = self._bucket + 1, 0
        self._used = start + size
        return self._bucket, start


@dataclass(frozen=True)
class Bucket:
    """One message: where each tensor lies in it, and its length in bytes."""

    parts: tuple[tuple[WeightSpec, int], ...]
    size: int

    def unpack(self, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The tensors as views into `buffer`, uint8 [size]."""
        named = []
        for spec, start in self.parts:
            flat = buffer[start : start + spec_bytes(spec)].view(getattr(torch, spec.dtype))
            named.append((spec.name, flat.view(spec.shape)))
        return named


class Piece(NamedTuple):
    """What travels at once: a bucket, or a part of one that is a single tensor larger than others.

    Attributes:
        first: name of the bucket's first tensor.
        size: of the bucket, in bytes.
        data: uint8 [n].
    """

    first: str
    size: int
    data: torch.Tensor


def filled(
    named_tensors: Iterable[tuple[str, torch.Tensor]], capacity: int, buffers: Iterator[torch.Tensor]
) -> Iterator[Piece]:
    """The pieces in which these tensors leave: the buckets that `plan` foresees, cut by `pieces`.

    Each tensor is copied before the next one is asked for.

    Args:
        buffers: asked once for the memory of each piece, uint8 [capacity], after the piece before was handed on.
    """
    placement, buffer, end, first = Placement(capacity), None, 0, ""
    for name, tensor in named_tensors:
        data = as_bytes(tensor)
        _, start = placement.place(data.numel())
        if start == 0:
            if buffer is not None:
                yield Piece(first, end, buffer[:end])
            buffer, first = None, name
        if data.numel() > capacity:
            for part in pieces(data, capacity):
                yield Piece(name, data.numel(), next(buffers)[: part.numel()].copy_(part))
        elif start + data.numel() > 0:
            end = start + data.numel()
            buffer = next(buffers) if buffer is None else buffer
            buffer[start:end].copy_(data)
    if buffer is not None:
        yield Piece(first, end, buffer[:end])


def pieces(bucket: torch.Tensor, capacity: int) -> Sequence[torch.Tensor]:
    """Views of a bucket, uint8 [n], each of which travels by itself. Of nothing, none."""
    return bucket.split(capacity) if bucket.numel() else ()


def spec_bytes(spec: WeightSpec) -> int:
    """Size of the announced tensor, in bytes."""
    return math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize


def plan(specs: Sequence[WeightSpec], capacity: int = BUCKET_BYTES) -> list[Bucket]:
    """The buckets in which these tensors will arrive."""
    placement = Placement(capacity)
    grouped: list[list[tuple[WeightSpec, int]]] = []
    for spec in specs:
        bucket, start = placement.place(spec_bytes(spec))
        if bucket == len(grouped):
            grouped.append([])
        grouped[bucket].append((spec, start))
    return [Bucket(tuple(parts), parts[-1][1] + spec_bytes(parts[-1][0])) for parts in grouped]
