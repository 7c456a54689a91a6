"""Weights as the world outside training knows them: whole, under the names and shapes of the model's own files.

Owns: gathering what ZeRO-3 has sharded, and adding LoRA's product to the matrix it adapts, one tensor at a time, so that no second
model ever exists. Does not know: where the weights go (transfer/), or which of them learn (`lora`, `deepspeed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from rlhf.training.deepspeed_zero3 import gathered, whole_numel, whole_shape

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

GATHER_ELEMENTS = 4 * 2**20
"""Parameters gathered at a time when weights leave the group, in elements: fewer than two buckets of `transfer.gloo` hold, so that some
travel while the next are gathered, and few enough for a processor's cache. Most matrices of a large model are more by themselves."""

T = TypeVar("T")

_BASE = ".base_layer."  # where peft puts the layer that it wraps


def is_adapted(layer: nn.Module) -> bool:
    """Whether peft has wrapped it (a `LoraLayer`); peft itself is imported only by who adapts a model."""
    return hasattr(layer, "lora_A")


@dataclass(frozen=True)
class _Weight:
    """One tensor of the model's files, and what it is made of.

    Attributes:
        parameter: or a buffer, which is whole on every rank.
        layer: the adapted layer, if this is the matrix that it adapts.
    """

    name: str
    parameter: nn.Parameter | torch.Tensor
    layer: LoraLayer | None

    def parts(self, adapter: str | None) -> list[nn.Parameter]:
        """What must be whole at the same time."""
        if not isinstance(self.parameter, nn.Parameter):
            return []
        if self.layer is None or adapter is None:
            return [self.parameter]
        return [self.parameter, self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight]

    def value(self, adapter: str | None) -> torch.Tensor:
        """The tensor, from whole parts: W, or W + scaling B A, summed in fp32 and rounded once."""
        base = self.parameter.detach()
        if self.quantized:
            base = _dequantized(self.parameter)
        if self.layer is None or adapter is None:
            return base
        first, second = self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight
        delta = (second.detach().float() @ first.detach().float()) * self.layer.scaling[adapter]
        if self.layer.fan_in_fan_out:
            delta = delta.T
        return delta.add_(base).to(base.dtype)

    @property
    def quantized(self) -> bool:
        return hasattr(self.parameter, "quant_state")

    def described(self) -> tuple[str, torch.dtype, tuple[int, ...]]:
        if self.quantized:
            return self.name, self.parameter.quant_state.dtype, tuple(self.parameter.quant_state.shape)
        return self.name, self.parameter.dtype, whole_shape(self.parameter)


def whole_weights(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model's files, whole, one after the other; under ZeRO-3 gathered in chunks. Collective.

    Args:
        adapter: name of the LoRA adapter that is added to the matrices it adapts; None: the base as it is.
    """
    for weight in gather_in_chunks((weight, weight.parts(adapter)) for weight in _weights(model)):
        yield weight.name, weight.value(adapter)


def in_host_memory(weights: Iterable[tuple[str, torch.Tensor]], wanted: bool) -> dict[str, torch.Tensor]:
    """Copies of the weights where they are wanted; the other ranks only take part in gathering. Collective."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in weights if wanted}


def described_weights(model: nn.Module) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and whole shape of each tensor that `whole_weights` gives, in its order."""
    return [weight.described() for weight in _weights(model)]


def gather_in_chunks(items: Iterable[tuple[T, list[nn.Parameter]]]) -> Iterator[T]:
    """The items, each while the parameters beside it are whole; under ZeRO-3 gathered in chunks. Collective."""
    chunk: list[tuple[T, list[nn.Parameter]]] = []
    size = 0
    for item, parameters in items:
        chunk.append((item, parameters))
        size += sum(map(whole_numel, parameters))
        if size >= GATHER_ELEMENTS:
            yield from _gather(chunk)
            chunk, size = [], 0
    yield from _gather(chunk)


def _gather(chunk: list[tuple[T, list[nn.Parameter]]]) -> Iterator[T]:
    with gathered([parameter for _, parameters in chunk for parameter in parameters]):
        for item, _ in chunk:
            yield item


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """The model's own tensors, its parameters and then the buffers that its files hold; those of adapters are left out."""
    adapted = {name: layer for name, layer in model.named_modules() if is_adapted(layer)}
    for name, parameter in model.named_parameters():
        owner, _, rest = name.rpartition(_BASE)
        if owner in adapted:
            yield _Weight(f"{owner}.{rest}", parameter, adapted[owner] if rest == "weight" else None)
        elif ".lora_" not in name:
            yield _Weight(name, parameter, None)
    for owner, layer in model.named_modules():
        for name, buffer in layer.named_buffers(recurse=False):
            if name not in layer._non_persistent_buffers_set:  # such a buffer is computed anew when a model is made
                yield _Weight(f"{owner}.{name}" if owner else name, buffer, None)


def _dequantized(parameter: nn.Parameter) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)
