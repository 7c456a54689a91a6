"""Debug mode runs vLLM in the process of the policy: what vLLM 0.32 would change there for others is put back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Keep vLLM from changing torch for the policy, which shares this process.

    On CPU vLLM replaces `torch.set_num_threads` by a function that does nothing, may leave one thread, and reseeds.
    """
    import torch

    set_num_threads, threads, state = torch.set_num_threads, torch.get_num_threads(), random.getstate()
    numpy_state = np.random.get_state()
    cores = os.sched_getaffinity(0)
    with torch.random.fork_rng():
        yield
    random.setstate(state)
    np.random.set_state(numpy_state)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)


@contextmanager
def default_group_kept() -> Iterator[None]:
    """Keep vLLM from destroying torch's default process group when it ends: DeepSpeed may be using it here."""
    import torch.distributed as dist

    destroy = dist.destroy_process_group

    def destroy_unless_default(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_unless_default
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
