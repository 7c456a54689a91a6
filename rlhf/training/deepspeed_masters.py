"""The fp32 weights that the optimizer steps, from which DeepSpeed rounds the weights that compute.

Owns: where DeepSpeed 0.19 keeps them at each ZeRO stage, and how a change of them reaches the model. A rule that moves a policy
between optimizer steps must move these: the model's own bf16 weights have forgotten all that is smaller than their spacing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""This rank's flat parts: of stage 3, of stages 1 and 2, and of stage 1 with bf16 weights."""


def masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's fp32 weights: its flat partition of each group, or (at stage 0) every weight.

    Args:
        optimizer: `engine.optimizer` of DeepSpeed.
    """
    for name in PARTITIONS:
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    # Of bf16 weights at stage 0; in fp32 the weights are their own masters.
    groups = getattr(optimizer, "fp32_groups", None)
    if groups is None:
        groups = [group["params"] for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group]


@torch.no_grad()
def set_masters(optimizer: Any, values: Iterable[torch.Tensor]) -> None:
    """Overwrite what `masters` gives with these, and the weights that compute with their rounding. Collective."""
    for mine, value in zip(masters(optimizer), values, strict=True):
        mine.data.copy_(value)
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _set_shards(optimizer)
    elif hasattr(optimizer, "fp32_groups"):
        for ours, theirs in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(ours, theirs, strict=True):
                weight.data.copy_(master)


def _set_shards(optimizer: Any) -> None:
    """What a step does at stage 3 after the optimizer's: DeepSpeed has no public call that moves shards. Small weights are whole between
    steps; these copies must be made anew."""
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
