"""Kinds of GPU, as their makers' data sheets describe them: memory, arithmetic and bandwidths.

Memory is in decimal gigabytes, as on the data sheet; most devices show their users a little more than that. Arithmetic is
dense bf16 with fp32 accumulation; links are counted in one direction.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import UserError


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU.

    Attributes:
        memory: bytes.
        flops: dense bf16 operations per second.
        bandwidth: of its memory, bytes per second.
        link: to the other GPUs of its node, bytes per second in one direction.
        link_name: what that link is.
        host: to the host's memory, bytes per second in one direction.
        network: between nodes, bytes per second and GPU in one direction, as the maker's own eight-GPU server has it (for the PCIe
            cards: one adapter of 200 Gb/s for eight).
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    link_name: str
    host: float
    network: float


def _kind(
    name: str, memory: float, tflops: float, bandwidth: float, link_name: str, link: float, host: float, network: float
) -> GpuKind:
    """In GB, TFLOP/s and GB/s."""
    return GpuKind(name, memory * 1e9, tflops * 1e12, bandwidth * 1e9, link * 1e9, link_name, host * 1e9, network * 1e9)


GPUS: dict[str, GpuKind] = {
    kind.name: kind
    for kind in (
        _kind("a100-40gb", 40, 312, 1555, "NVLink", 300, 32, 25),
        _kind("a100-80gb", 80, 312, 2039, "NVLink", 300, 32, 25),
        _kind("h100-80gb", 80, 989, 3350, "NVLink", 450, 64, 50),
        _kind("h200-141gb", 141, 989, 4800, "NVLink", 450, 64, 50),
        _kind("b200-192gb", 192, 2250, 8000, "NVLink", 900, 64, 50),
        _kind("l40s-48gb", 48, 362, 864, "PCIe", 32, 32, 3.1),
        _kind("rtx4090-24gb", 24, 165, 1008, "PCIe", 32, 32, 3.1),
        _kind("a10-24gb", 24, 125, 600, "PCIe", 32, 32, 3.1),
    )
}
"""By name. The SXM variants where there are several."""


def gpu_kind(name: str) -> GpuKind:
    """The kind of this name; `h100` finds h100-80gb if only one name begins so.

    Raises:
        UserError: no kind, or more than one, is called so.
    """
    exact = [kind for kind in GPUS.values() if name.lower() in (kind.name, kind.name.split("-")[0])]
    found = exact or [kind for kind in GPUS.values() if kind.name.startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    near = [kind.name for kind in found] or difflib.get_close_matches(name.lower(), GPUS, 1, 0.3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"--gpu: there is no GPU kind `{name}`.{hint} Known: {', '.join(GPUS)}")


def visible_gpu(names: Sequence[str]) -> GpuKind | None:
    """The kind of the GPUs that a machine reports under these names (as CUDA spells them), if it is a known one."""
    for name in names:
        words = name.lower().replace(" ", "")
        candidates = [kind for kind in GPUS.values() if kind.name.split("-")[0] in words]
        sized = [kind for kind in candidates if kind.name.split("-")[1] in words]
        if sized or len(candidates) == 1:
            return (sized or candidates)[0]
    return None
