"""The gradients that DeepSpeed has accumulated and not stepped: how to get rid of them.

Owns: where DeepSpeed 0.19 keeps them at each ZeRO stage. Its own `zero_grad` is meant for after a step, and leaves the sums of stages 1
and 2, and the count of backward passes that says whether the next one adds to them.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def discard_gradients(engine: Any) -> None:
    """Forget all `backward` calls since the last step, as DeepSpeed does itself after an overflow. Not collective.

    Args:
        engine: DeepSpeed's.
    """
    engine.zero_grad()
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)  # at stage 3 the next backward overwrites the partitions
    if hasattr(optimizer, "all_grad_tensors"):  # stages 1 and 2
        optimizer.micro_step_id = -1
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
    elif hasattr(optimizer, "_offload_boundary_param_ids"):  # stage 3
        optimizer._offload_boundary_param_ids = set()
