"""A fingerprint of weights: cheap, the same on CPU and GPU, different if any byte, name, type, shape or order is.

It also differs with the slot of an engine that the weights are meant for.

It guards against mistakes (a lost bucket, a stale tensor, a wrong type), not against an adversary. Each tensor's bytes
are read as 64-bit integers and multiplied with fixed odd random weights; the sums, modulo 2**64, go into a SHA-256
together with the names. On one core this reads about 12 GB/s, many times as fast as hashing the bytes, and it needs no
copy from a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch

from rlhf.types import ModelSlot

BLOCK = 1 << 17
"""Integers per block: one MiB, which stays in a core's cache."""
_BLOCKS_AT_ONCE = 64  # on a GPU, where each step has its price however small it is
SCRATCH_BYTES = _BLOCKS_AT_ONCE * BLOCK * 8
"""What a fingerprint needs on a GPU for a moment; the planner counts it."""
_MASK = (1 << 64) - 1


class Fingerprint:
    """Accumulates tensors in the order in which they pass."""

    def __init__(self, slot: ModelSlot = "policy") -> None:
        self._hash = hashlib.sha256(slot.encode())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in one tensor, of any dtype and device."""
        head = f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}"
        self._hash.update(f"{head}|{_digest(tensor.detach())}\n".encode())

    def hexdigest(self) -> str:
        """16 hexadecimal digits for all that was added so far."""
        return self._hash.hexdigest()[:16]

    def watch(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the tensors through, adding each."""
        for name, tensor in named_tensors:
            self.add(name, tensor)
            yield name, tensor


def fingerprint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The fingerprint of these tensors in this order."""
    total = Fingerprint()
    for name, tensor in named_tensors:
        total.add(name, tensor)
    return total.hexdigest()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements as a flat uint8 tensor; shares memory if it was contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@lru_cache(maxsize=4)
def block_weights(device: torch.device) -> torch.Tensor:
    """The fixed odd factors of a block's integers, int64 [BLOCK]."""
    generator = torch.Generator().manual_seed(20_240_229)
    return (torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator) * 2 + 1).to(device)


def _digest(tensor: torch.Tensor) -> str:
    data = as_bytes(tensor)
    whole = data.numel() // 8 * 8
    tail = bytes(data[whole:].tolist()).hex()
    aligned = data[:whole] if data.storage_offset() % 8 == 0 else data[:whole].clone()
    words = aligned.view(torch.int64)
    sums = block_products(words) if words.device.type == "cpu" else block_sums(words, _BLOCKS_AT_ONCE)
    total = 0
    for value in sums.tolist():
        total = (total * 6364136223846793005 + value) & _MASK
    return f"{total:016x}{tail}"


def block_products(words: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each block, int64, where torch multiplies matrices of integers: on a CPU, and fastest there."""
    weights = block_weights(words.device)
    full = words.numel() // BLOCK * BLOCK
    rest = words[full:]
    sums = words[:full].view(-1, BLOCK) @ weights
    return torch.cat([sums, torch.dot(rest, weights[: rest.numel()]).view(1)]) if rest.numel() else sums


def block_sums(words: torch.Tensor, at_once: int) -> torch.Tensor:
    """The same on any device; `at_once` blocks are worked on together, which does not change them."""
    weights = block_weights(words.device)
    scratch = torch.empty(min(at_once * BLOCK, words.numel()), dtype=torch.int64, device=words.device)
    sums = [words.new_empty(0)]
    for part in words.split(at_once * BLOCK):
        full = part.numel() // BLOCK * BLOCK
        for rows in (part[:full].view(-1, BLOCK), part[None, full:]):
            if rows.numel():
                product = scratch[: rows.numel()].view_as(rows)
                sums.append(torch.mul(rows, weights[: rows.shape[1]], out=product).sum(1))
    return torch.cat(sums)
