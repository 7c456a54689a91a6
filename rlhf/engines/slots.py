"""The models inside one vLLM worker, and a checksum of what each really holds.

An engine that samples from mixtures has two, "policy" and "partner"; any other has only the policy. A weight transfer
fills one of them; the checksum shows that the other kept its weights. Does not know how mixtures are made
(`rlhf.engines.mixture`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rlhf.transfer.fingerprint import Fingerprint
from rlhf.types import ModelSlot

_PROBES = 4  # rows of random input for each layer whose weights can only be seen through its output


class TwoModels(nn.Module):
    """A model for vLLM that consists of two equal ones. The receivers know it by this class."""

    policy: nn.Module
    partner: nn.Module


def slots(model: nn.Module) -> dict[ModelSlot, nn.Module]:
    """The models inside a worker's model, by name."""
    if isinstance(model, TwoModels):
        return {"policy": model.policy, "partner": model.partner}
    return {"policy": model}


@torch.no_grad()
def checksum(model: nn.Module) -> str:
    """16 hexadecimal digits for the weights as vLLM computes with them. The same weights in another process may differ.

    On CPU vLLM packs a linear layer's weight into memory that cannot be read, and empties or abandons the parameter. Such a
    layer counts by its output for fixed random rows: every weight is in it, though a change too small to alter a rounded
    sum may pass.
    """
    total = Fingerprint()
    for name, parameter in model.named_parameters():
        total.add(name, parameter)
    with _one_thread():
        for name, layer in model.named_modules():
            if hasattr(layer, "cpu_linear"):
                total.add(name, _output_for_random_rows(layer))
    return total.hexdigest()


def _output_for_random_rows(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    width = weight.shape[-1] if weight.numel() else layer.input_size_per_partition
    rows = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0))
    return layer.quant_method.apply(layer, rows.to(weight.dtype))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums must be formed in the same order each time, also when the process changes its number of threads between."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
