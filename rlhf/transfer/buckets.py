"""Which bucket a tensor travels in: many small tensors share one message, so that a model costs few round trips.

Both ends feed the same sizes in the same order to a `Placement` and so agree without exchanging a plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.transfer.session import WeightSpec

BUCKET_BYTES = 128 * 2**20
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
