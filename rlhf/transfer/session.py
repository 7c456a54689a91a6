"""What the two ends of a weight transfer agree on before the first byte moves."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

Backend = Literal["gloo", "nccl", "ipc", "local"]


class TransferFailed(RuntimeError):
    """A weight transfer broke off, or its two ends did not agree on what is sent."""


def sending_ranks(backend: Backend, ranks: int) -> range:
    """Which of so many policy ranks send: each to its own GPU with `ipc`, else rank 0 to all."""
    return range(ranks if backend == "ipc" else 1)


@dataclass(frozen=True)
class TransferSession:
    """One group of the policy (rank 0) and all vLLM workers (ranks 1 and up). It lives until an end is lost; the next one, without the lost
    end, has a larger epoch. Ends of different epochs never meet, even at the same place.

    Attributes:
        backend: `gloo` (CPU), `nccl` (GPU to GPU), `ipc` (within each GPU) or `local` (same process).
        host: address of policy rank 0's host, as the workers reach it.
        port: a free port there; with `local`, any number that no other open session uses.
        world_size: one for the policy, and all workers.
        timeout_s: longest wait for the other end, at joining and in each exchange, in seconds.
        epoch: number of the session (`rlhf.transfer.versions` counts them).
    """

    backend: Backend
    host: str
    port: int
    world_size: int
    timeout_s: float = 600.0
    epoch: int = 1

    @property
    def prefix(self) -> str:
        """Of this session's keys in a store."""
        return f"rlhf-weights/{self.epoch}"


def local_address_towards(host: str, port: int) -> str:
    """Which of this machine's own addresses lies on the way to `host`. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
