"""Parameters of which ZeRO-3 leaves every rank a part: how they become so, what they are as a whole, and being whole for a while.

Owns: how DeepSpeed 0.19 marks such parameters, which nobody else looks at. Everything here takes any parameter: one that is not
partitioned is whole on every rank. Does not know: which model they are of (`sharded`), or its configuration (`deepspeed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# DeepSpeed is imported where something is partitioned or gathered: that takes seconds, and many who read weights do neither.

Sharding = Mapping[str, Any]
"""DeepSpeed's configuration at stage 3, by which parameters are partitioned (`deepspeed.sharding`)."""


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether every rank holds a part of it."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Its shape when it is whole."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def whole_numel(parameter: torch.Tensor) -> int:
    """Its elements when it is whole."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()


def local_shard(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter: its partition, or the whole of it."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter


def local_shards(module: nn.Module) -> Iterator[torch.Tensor]:
    """This rank's part of each parameter."""
    return map(local_shard, module.parameters())


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, partitioned parameters are whole (read-only) on every rank; a no-op for others. Collective."""
    if not any(map(is_partitioned, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
        yield


def partition(module: nn.Module, sharding: Sharding) -> None:
    """Leave every rank its part of each parameter that is not partitioned yet; all ranks must hold the same values. Collective."""
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=dict(sharding))


def rank_device() -> torch.device:
    """The device of this rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())
