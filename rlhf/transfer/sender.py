"""The trainer's end of a weight transfer, whatever the back end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from rlhf.transfer.session import TransferSession
from rlhf.types import Shipment

if TYPE_CHECKING:
    from rlhf.transfer.nccl import Join


class WeightSender:
    """Sends whole tensors, under Hugging Face names, to every worker of a session. Policy rank 0 holds one; with `ipc`, every rank does.

    The receivers must be told to receive the same shipment at the same time (`RolloutPool.receive`); its specs name these
    tensors in this order. Under ZeRO-3 the other policy ranks only iterate the gathered parameters.
    """

    def __init__(self, end: _End):
        self._end = end

    @classmethod
    def open(
        cls, session: TransferSession, rank: int = 0, ranks: int = 1, join_nccl: Join | None = None
    ) -> WeightSender:
        """Join the session as its sender. Blocks until all workers have joined (they do in `RolloutPool.connect`).

        Args:
            rank, ranks: which of the policy's ranks this is, and how many open the session (`sending_ranks`).
            join_nccl: how to join a session over `nccl`; the other back ends need nothing.

        Raises:
            TransferFailed: some worker did not come within the session's timeout.
        """
        return cls(_open(session, rank, ranks, join_nccl))

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str:
        """Send one version of the weights; blocks until the last byte has left. Returns its fingerprint.

        Args:
            shipment: what is sent; the receivers are told the same (`RolloutPool.receive`).

        Raises:
            TransferFailed: the transfer broke off. The engines then hold a mixture and the pool refuses to sample.
        """
        return self._end.send(named_tensors, shipment)

    def close(self) -> None:
        """Leave the session."""
        self._end.close()


class _End(Protocol):
    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str: ...

    def close(self) -> None: ...


def _open(session: TransferSession, rank: int, ranks: int, join_nccl: Join | None) -> _End:
    # Imported here because each back end needs what others lack: a GPU, sockets, or nothing.
    if session.backend == "gloo":
        from rlhf.transfer.gloo import GlooSender

        return GlooSender(session)
    if session.backend == "local":
        from rlhf.transfer.local import LocalSender

        return LocalSender(session)
    if session.backend == "nccl":
        from rlhf.transfer.nccl import NcclSender

        if join_nccl is None:
            raise ValueError("a session over nccl needs `join_nccl`, which makes its communicator")
        return NcclSender(session, join_nccl)
    from rlhf.transfer.ipc import IpcSender

    return IpcSender(session, rank, ranks)
