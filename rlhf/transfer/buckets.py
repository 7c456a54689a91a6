"""Which bucket a tensor travels in: many small tensors share one message, so that a model costs few round trips.

Both ends feed the same sizes in the same order to a `Placement` and so agree without exchanging a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rlhf.transfer.fingerprint import as_bytes
from rlhf.types import WeightSpec

BUCKET_BYTES = 128 * 2**20
"""What either end holds of the weights on their way, whatever the back end; the planner counts it."""
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


def filled(
    named_tensors: Iterable[tuple[str, torch.Tensor]], buffer: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The buckets in which these tensors leave: the first tensor's name and the bytes, as `plan` foresees them.

    Each tensor is copied before the next one is asked for, except one that is larger than a bucket: it is a bucket by itself, and is
    handed on as it is. So a bucket must have left before the next one is asked for.

    Args:
        buffer: uint8 [capacity], where each bucket is put together.
    """
    placement, current, end, first = Placement(len(buffer)), 0, 0, ""
    for name, tensor in named_tensors:
        data = as_bytes(tensor)
        bucket, start = placement.place(data.numel())
        if bucket != current:
            if end:
                yield first, buffer[:end]
            current, end = bucket, 0
        if start == 0:
            first = name
        if data.numel() > len(buffer):
            yield first, data
        else:
            end = start + data.numel()
            buffer[start:end].copy_(data)
    if end:
        yield first, buffer[:end]


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
