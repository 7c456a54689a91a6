"""Weights within each GPU that a policy rank and an engine's worker share: through one buffer that both processes map.

Each rank serves the workers on its own GPU, which it knows by the GPU's UUID, so that no byte leaves the GPU; every rank holds whole
tensors when weights are published anyway. The memory handles travel over the session's `Board` as plain values. vLLM's own ipc
exchanges pickles, and unpacked it would hold every tensor until all are read: with LoRA merged into the weights, a second model.

The protocol is tested without a GPU, over the memory of one process; `CudaMemory` is designed and not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch

from rlhf.transfer.board import Board
from rlhf.transfer.buckets import BUCKET_BYTES, filled, plan
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.session import TransferFailed, TransferSession
from rlhf.types import Shipment, WeightSpec

_END = 0  # in place of a piece's length


class Memory(Protocol):
    """What is needed of a GPU.

    Attributes:
        device: its name in this process.
        uuid: the same in all processes.
    """

    device: torch.device
    uuid: str

    def share(self, buffer: torch.Tensor) -> Any:
        """What another process needs to `attach` the buffer, once: a JSON value."""
        ...

    def attach(self, shared: Any) -> torch.Tensor:
        """The buffer of another process, uint8 [n]."""
        ...

    def settle(self) -> None:
        """Return when all copies to and from buffers have ended."""
        ...


class CudaMemory:
    """A GPU; unless it says which, the current one."""

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.uuid = str(torch.cuda.get_device_properties(self.device).uuid)

    def share(self, buffer: torch.Tensor) -> Any:
        # Each call counts as one reader, who counts back when it lets its own storage go (torch's CudaIPCTypes).
        _, handle, size, offset, counter, counter_offset, event, wants_event = buffer.untyped_storage()._share_cuda_()
        return [handle.hex(), size, offset, counter.hex(), counter_offset, event.hex(), wants_event]

    def attach(self, shared: Any) -> torch.Tensor:
        handle, size, offset, counter, counter_offset, event, wants_event = shared
        storage = torch.UntypedStorage._new_shared_cuda(
            self.device.index,
            bytes.fromhex(handle),
            size,
            offset,
            bytes.fromhex(counter),
            counter_offset,
            bytes.fromhex(event),
            wants_event,
        )
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


class IpcSender:
    """A policy rank's end: sends to the workers on its GPU, of which there may be none.

    Args:
        rank, ranks: this policy rank, and how many there are; all of them open the session.

    Raises:
        TransferFailed: some worker is on no policy rank's GPU, or not all came within the session's timeout.
    """

    def __init__(self, session: TransferSession, rank: int = 0, ranks: int = 1, memory: Memory | None = None):
        self._memory = memory or CudaMemory()
        self._board = Board(session, rank)
        self._round = 0
        with self._board.others_told():
            self._board.post(f"sender/{rank}", self._memory.uuid)
            workers = {worker: self._board.read(f"worker/{worker}") for worker in range(1, session.world_size)}
            if rank == 0:
                self._require_served(workers, {self._board.read(f"sender/{other}") for other in range(ranks)})
                self._board.post("ready", True)
            self._board.read("ready")
        self._workers = [worker for worker, uuid in workers.items() if uuid == self._memory.uuid]

    def _require_served(self, workers: dict[int, str], senders: set[str]) -> None:
        alone = [worker for worker, uuid in workers.items() if uuid not in senders]
        if alone:
            raise TransferFailed(
                f"{len(alone)} of {len(workers)} engine workers run on a GPU without a policy rank, but ipc hands weights over within "
                "a GPU. Set rollout.transfer=auto"
            )

    def send(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        shipment: Shipment,
        capacity: int = BUCKET_BYTES,
    ) -> str:
        """Hand over the tensors; returns their fingerprint when the last one was read.

        Raises:
            TransferFailed: a worker failed, expected something else, or was too slow for the session's timeout.
        """
        total = Fingerprint(shipment.slot)
        with self._board.others_told():
            self._send(total.watch(named_tensors), capacity)
        self._round += 1
        if self._memory.device.type == "cuda":
            torch.cuda.ipc_collect()  # the buffer, which nobody maps any more
        return total.hexdigest()

    def _send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], capacity: int) -> None:
        buffer, number = torch.empty(capacity, dtype=torch.uint8, device=self._memory.device), 0
        for worker in self._workers:
            self._board.post(self._key(worker, "buffer"), self._memory.share(buffer))
        for piece in filled(named_tensors, capacity, repeat(buffer)):
            self._hand_over(number, len(piece.data), piece.first)
            number += 1
        for worker in self._workers:
            self._board.post(self._key(worker, number), [_END, "the end"])
        for worker in self._workers:
            self._board.take(self._key(worker, "done"))

    def _hand_over(self, number: int, size: int, first: str) -> None:
        self._memory.settle()
        for worker in self._workers:
            self._board.post(self._key(worker, number), [size, first])
        for worker in self._workers:
            self._board.take(self._key(worker, f"{number}/read"))

    def _key(self, worker: int, what: int | str) -> str:
        return f"{self._round}/{worker}/{what}"

    def close(self) -> None:
        """Nothing to release."""


class IpcReader:
    """A worker's end.

    Args:
        rank: of the worker in the session, from 1.

    Raises:
        TransferFailed: no policy rank is on this worker's GPU, or not all came within the session's timeout.
    """

    def __init__(self, session: TransferSession, rank: int, memory: Memory | None = None):
        self._memory = memory or CudaMemory()
        self._board, self._rank, self._round = Board(session, rank), rank, 0
        self._board.post(f"worker/{rank}", self._memory.uuid)
        self._board.read("ready")

    def receive(self, specs: Sequence[WeightSpec], load: Callable[[list[tuple[str, torch.Tensor]]], Any]) -> None:
        """Give the announced tensors to `load`, one bucket at a time, as views of a buffer of their own.

        Raises:
            TransferFailed: the sender was lost or gave up, or sends something other than what was announced.
        """
        with self._board.others_told():
            shared = self._memory.attach(self._board.take(self._key("buffer")))
            number = 0
            # The sender's buffer is as large as the buckets, which are planned alike.
            for bucket in plan(specs, len(shared)):
                arrived = torch.empty(bucket.size, dtype=torch.uint8, device=self._memory.device)
                filled_up = 0
                while filled_up < bucket.size:
                    filled_up += self._read(number, shared, arrived[filled_up:])
                    number += 1
                load(bucket.unpack(arrived))
            self._expect(number, _END)
            del shared
            self._board.post(self._key("done"), True)
        self._round += 1

    def _read(self, number: int, shared: torch.Tensor, into: torch.Tensor) -> int:
        size = self._expect(number, min(len(into), len(shared)))
        into[:size].copy_(shared[:size])
        self._memory.settle()
        self._board.post(self._key(f"{number}/read"), True)
        return size

    def _expect(self, number: int, size: int) -> int:
        sent, first = self._board.take(self._key(number))
        if sent != size:
            raise TransferFailed(
                f"at {first} the ends of the transfer expect {size} bytes and {sent}: the specs given to the engines and the tensors "
                "given to the sender differ in number, shape or dtype"
            )
        return size

    def _key(self, what: int | str) -> str:
        return f"{self._round}/{self._rank}/{what}"
