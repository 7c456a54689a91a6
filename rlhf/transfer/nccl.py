"""Weights from GPU to GPU: NCCL broadcasts from the sender to all workers, bucket by bucket.

Designed, not yet run on a GPU. vLLM 0.32's own sender packs 1 GiB at a time twice over and has no deadline; here each end holds one
bucket, tells the others by the session's `Board` what comes and whether it gives up, and ends a broadcast that does not (NCCL itself waits
without limit) by aborting the communicator. Does not know who makes the communicator: both ends bring a `Join` (`rlhf.engines.nccl`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, Protocol

import torch

from rlhf.transfer.board import Board
from rlhf.transfer.buckets import BUCKET_BYTES, filled, pieces, plan
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.session import TransferFailed, TransferSession
from rlhf.types import Shipment, WeightSpec

_END = 0  # in place of a bucket's length
_POLL_S = 0.0005


class Communicator(Protocol):
    """What is needed of NCCL."""

    def broadcast(self, bucket: torch.Tensor) -> Callable[[], bool]:
        """Start sending, or receiving into, a bucket, from rank 0; the result says whether it has ended."""
        ...

    def abort(self) -> None:
        """End what is under way; nothing can be sent afterwards."""
        ...


Join = Callable[[TransferSession, int, Board, torch.device], Communicator]
"""Meets all other ranks of the session, of which this is one, then makes the communicator on this device."""


class NcclGroup:
    """One end of a session over NCCL: on the sender's rank 0, or in a worker.

    Raises:
        TransferFailed: not all ranks came within the session's timeout.
    """

    def __init__(
        self,
        session: TransferSession,
        rank: int,
        device: torch.device,
        join: Join,
        capacity: int = BUCKET_BYTES,
    ):
        """
        Args:
            device: where the weights come from, or go to.
            join: makes the communicator.
            capacity: of a bucket, in bytes; the same at all ends.
        """
        self._session, self._device, self._capacity = session, device, capacity
        self._board = Board(session, rank)
        self._communicator = join(session, rank, self._board, device)
        self._round = 0
        self._read: list[str] = []

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str:
        """Broadcast the tensors, on the current stream, after what it still has to do. Returns their fingerprint."""
        total = Fingerprint(shipment.slot)
        with self._whole_round():
            buffer, number = torch.empty(self._capacity, dtype=torch.uint8, device=self._device), 0
            for piece in filled(total.watch(named_tensors), self._capacity, repeat(buffer)):
                self._board.post(self._key(number), [piece.data.numel(), piece.first])
                self._broadcast(piece.data, piece.first)
                number += 1
            self._board.post(self._key(number), [_END, "the end"])
        self._board.remove(self._read)  # all ends have finished the round before
        self._read = [f"{self._round - 1}/{place}" for place in range(number + 1)]
        return total.hexdigest()

    def receive(self, specs: Sequence[WeightSpec], load: Callable[[list[tuple[str, torch.Tensor]]], Any]) -> None:
        """Give the announced tensors to `load`, one bucket at a time, as views of a buffer of their own."""
        with self._whole_round():
            number = 0
            for bucket in plan(specs, self._capacity):
                buffer = torch.empty(bucket.size, dtype=torch.uint8, device=self._device)
                for part in pieces(buffer, self._capacity):
                    self._expect(number, part.numel())
                    self._broadcast(part, bucket.parts[0][0].name)
                    number += 1
                load(bucket.unpack(buffer))
            self._expect(number, _END)

    def _expect(self, number: int, size: int) -> None:
        sent, first = self._board.read(self._key(number))
        if sent != size:
            raise TransferFailed(
                f"at {first} the ends of the transfer expect {size} bytes and {sent}: the specs given to the engines and the tensors "
                "given to the sender differ in number, shape or dtype"
            )

    def _broadcast(self, bucket: torch.Tensor, place: str) -> None:
        has_ended = self._communicator.broadcast(bucket)
        end = time.monotonic() + self._session.timeout_s
        while not has_ended():
            self._board.require_nobody_gave_up(place)
            if time.monotonic() > end:
                raise TransferFailed(
                    f"the weight transfer broke off at {place}: the broadcast did not end within {self._session.timeout_s:g} s"
                )
            time.sleep(_POLL_S)

    @contextmanager
    def _whole_round(self) -> Iterator[None]:
        """One version of the weights. After an error neither this end nor the others can go on: the session is over."""
        well = False
        try:
            with self._board.others_told():
                yield
            well = True
        finally:
            if not well:
                self._communicator.abort()
        self._round += 1

    def _key(self, number: int) -> str:
        return f"{self._round}/{number}"

    def close(self) -> None:
        """Leave the session."""
        self._communicator.abort()


class NcclSender:
    """The trainer's end (rank 0)."""

    def __init__(self, session: TransferSession, join: Join):
        self._group = NcclGroup(session, 0, torch.device("cuda", torch.cuda.current_device()), join)

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str:
        """Broadcast the tensors from the current device. Returns their fingerprint when the last one has left.

        Raises:
            TransferFailed: a worker was lost, failed, expected something else, or was too slow for the session's timeout.
        """
        return self._group.send(named_tensors, shipment)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()
