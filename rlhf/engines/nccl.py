"""The NCCL communicator of weight transfers: vLLM's own, for the workers' ends and for the policy's.

Owns how the ends meet. What is sent over it, and how long one waits, is `rlhf.transfer.nccl`'s. Written for vLLM 0.32 and its
`PyNcclCommunicator`; designed, not yet run on a GPU. Importing this module does not import vLLM, which a policy without GPUs never needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf.transfer.board import Board
from rlhf.transfer.nccl import Communicator
from rlhf.transfer.session import TransferSession


class PyNccl:
    """vLLM's communicator, always on the caller's own stream."""

    def __init__(self, session: TransferSession, rank: int, unique_id: bytes, device: torch.device):
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.utils.nccl import unpinned_nccl_env

        # Its first collective asks vLLM for a stream, which makes a new one current for good: a trainer would go on training there.
        stream = torch.cuda.current_stream(device)
        try:
            with unpinned_nccl_env():
                self._nccl = PyNcclCommunicator.from_unique_id_bytes(unique_id, rank, session.world_size, device)
        finally:
            torch.cuda.set_stream(stream)

    def broadcast(self, bucket: torch.Tensor) -> Callable[[], bool]:
        stream = torch.cuda.current_stream(bucket.device)
        self._nccl.broadcast(bucket, src=0, stream=stream)
        return stream.record_event().query

    def abort(self) -> None:
        self._nccl.destroy()


def join_nccl(session: TransferSession, rank: int, board: Board, device: torch.device) -> Communicator:
    """Meet all other ranks, then make the communicator on this GPU.

    vLLM would exchange NCCL's id as a pickle, and wait for 300 s at the most, however long a large model takes to load.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    if rank == 0:
        board.post("nccl-id", bytes(NCCLLibrary().ncclGetUniqueId()).hex())
    unique_id = bytes.fromhex(board.read("nccl-id"))
    board.post(f"here/{rank}", 1)
    board.wait([f"here/{other}" for other in range(session.world_size)])
    return PyNccl(session, rank, unique_id, device)
