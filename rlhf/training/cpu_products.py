"""Matrix products of bf16 tensors on a CPU that has no bf16 matrix unit: done in fp32, where such a CPU is nearly twice as fast.

A product of bf16 numbers is exact in fp32, and a bf16 kernel accumulates in fp32 as well, so only the order of summation differs.
Owns: when that is so, and linear layers that compute so. Nothing changes on a GPU, on a CPU with AMX, or in fp32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def faster_in_fp32(tensor: torch.Tensor) -> bool:
    """Whether products of this tensor should be computed in fp32 here."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not _has_bf16_unit()


@functools.cache
def _has_bf16_unit() -> bool:
    return torch.cpu._is_amx_tile_supported()


class Fp32Product(torch.autograd.Function):
    """x W^T + b for bf16 x [..., I], W [O, I], b [O] or None -> bf16 [..., O]; the copies in fp32 live only inside a call."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.float()
        flat = rows.reshape(-1, rows.shape[-1])
        grad_x = (rows @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (
            (flat.T @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype) if ctx.needs_input_grad[1] else None
        )
        grad_bias = flat.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class FastLinear(nn.Linear):
    """A linear layer that computes in fp32 where that is faster."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if faster_in_fp32(self.weight):
            return Fp32Product.apply(input, self.weight, self.bias)
        return super().forward(input)


def use_fast_linear(model: nn.Module) -> None:
    """Make the model's linear layers `FastLinear`; their weights and names stay."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FastLinear
