"""How the ranks of one DeepSpeed group find one another: where they meet, joining and leaving."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from rlhf.cluster import uses_gpu
from rlhf.cluster.network import free_port, host_address, meeting_place
from rlhf.config.cluster import ClusterSettings
from rlhf.training.builds import remove_abandoned_locks
from rlhf.training.deepspeed import join_process_group


@dataclass(frozen=True)
class Member:
    """One rank, and the host and port where all `ranks` meet (see `rendezvous`)."""

    rank: int
    ranks: int
    host: str
    port: int


def rendezvous() -> tuple[str, int]:
    """Host and a free port for the ranks to meet; asked of rank 0."""
    return host_address(), free_port()


def join(member: Member, cluster: ClusterSettings) -> None:
    """Join the group in this process; returns when all ranks have. Each process has one device.

    A collective call that the others do not make ends after `cluster.learn_deadline_s`.
    """
    os.environ |= {
        "RANK": str(member.rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(member.ranks),
        "MASTER_ADDR": member.host,
        "MASTER_PORT": str(member.port),
    }
    remove_abandoned_locks()
    join_process_group(
        "nccl" if uses_gpu(cluster) else "gloo",
        meeting_place(member.host, member.port),
        member.rank,
        member.ranks,
        timedelta(seconds=cluster.learn_deadline_s),
    )


def leave() -> None:
    """Leave the group. A lone rank keeps its own for the process's life: DeepSpeed cannot join a second one."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.destroy_process_group()
