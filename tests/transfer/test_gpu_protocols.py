"""The transfers between GPUs, all but the GPUs: who sends what to whom, what is held, and how a broken transfer ends.

Processes are threads here, NCCL's broadcast and a GPU's shared memory are made of this process's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch

from rlhf.cluster.network import free_port
from rlhf.transfer import TransferFailed, TransferSession
from rlhf.transfer.board import Board
from rlhf.transfer.fingerprint import fingerprint
from rlhf.transfer.ipc import IpcReader, IpcSender
from rlhf.transfer.nccl import NcclGroup
from rlhf.types import WeightSpec
from tests.transfer.test_gloo import CAPACITY, POLICY, spec_of, weights

CPU = torch.device("cpu")
Named = list[tuple[str, torch.Tensor]]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def session_of(backend: Any, workers: int, timeout_s: float = 20) -> TransferSession:
    return TransferSession(backend, "127.0.0.1", free_port(), 1 + workers, timeout_s)


def specs_of(named: Named) -> list[WeightSpec]:
    return [spec_of(*item) for item in named]


class Wire:
    """A broadcast over threads. The sender's part ends when all have taken the bucket, as NCCL's does."""

    def __init__(self, ends: int):
        self.meet = threading.Barrier(ends)
        self.bucket = torch.empty(0)
        self.aborted: list[int] = []

    def join(self, session: TransferSession, rank: int, board: Board, device: torch.device) -> Communicator:
        return Communicator(self, rank)


class Communicator:
    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank = wire, rank

    def broadcast(self, bucket: torch.Tensor) -> Callable[[], bool]:
        ended = threading.Event()
        threading.Thread(target=self._move, args=(bucket, ended), daemon=True).start()
        return ended.is_set

    def _move(self, bucket: torch.Tensor, ended: threading.Event) -> None:
        if self.rank == 0:
            self.wire.bucket = bucket
        with suppress(threading.BrokenBarrierError):  # aborted
            self.wire.meet.wait(60)
            if self.rank > 0:
                bucket.copy_(self.wire.bucket)
            self.wire.meet.wait(60)
            ended.set()

    def abort(self) -> None:
        self.wire.aborted.append(self.rank)
        self.wire.meet.abort()


def receive_by_nccl(
    session: TransferSession, wire: Wire, rank: int, specs: list[WeightSpec], rounds: int
) -> list[Named]:
    group = NcclGroup(session, rank, CPU, wire.join, CAPACITY)
    taken: list[Named] = []
    for _ in range(rounds):
        taken.append([])
        group.receive(specs, taken[-1].extend)
    return taken


def test_nccl_brings_every_tensor_in_each_round(threads: ThreadPoolExecutor) -> None:
    session, wire, sent = session_of("nccl", 2), Wire(3), weights()
    ends = [threads.submit(receive_by_nccl, session, wire, rank, specs_of(sent), 2) for rank in (1, 2)]
    group = NcclGroup(session, 0, CPU, wire.join, CAPACITY)
    marks = [group.send(named, POLICY) for named in (sent, [(n, t * 2) for n, t in sent])]
    for end in ends:
        assert [fingerprint(taken) for taken in end.result(timeout=30)] == marks
    assert marks[0] == fingerprint(sent) != marks[1]
    assert not wire.aborted


def test_nccl_ends_that_differ_say_so(threads: ThreadPoolExecutor) -> None:
    session, wire, sent = session_of("nccl", 1), Wire(2), weights()
    end = threads.submit(receive_by_nccl, session, wire, 1, specs_of(sent)[:-1], 1)
    with pytest.raises(TransferFailed, match="another end of the weight transfer gave up"):
        NcclGroup(session, 0, CPU, wire.join, CAPACITY).send(sent, POLICY)
    with pytest.raises(TransferFailed, match="differ in number, shape or dtype"):
        end.result(timeout=30)
    assert sorted(wire.aborted) == [0, 1]


def test_nccl_does_not_wait_for_a_worker_that_could_not_load(threads: ThreadPoolExecutor) -> None:
    session, wire, sent = session_of("nccl", 1, timeout_s=300), Wire(2), weights()

    def load(named: Named) -> None:
        raise ValueError("out of memory")

    def receive() -> None:
        NcclGroup(session, 1, CPU, wire.join, CAPACITY).receive(specs_of(sent), load)

    end = threads.submit(receive)
    with pytest.raises(TransferFailed, match="gave up"):
        NcclGroup(session, 0, CPU, wire.join, CAPACITY).send(sent, POLICY)
    with pytest.raises(ValueError, match="out of memory"):
        end.result(timeout=30)


def test_nccl_aborts_a_broadcast_that_does_not_end() -> None:
    session, wire = session_of("nccl", 1, timeout_s=1), Wire(2)
    group = NcclGroup(session, 0, CPU, wire.join, CAPACITY)  # nobody else comes
    with pytest.raises(TransferFailed, match="broadcast did not end within 1 s"):
        group.send(weights(), POLICY)
    assert wire.aborted == [0]


class SharedMemory:
    """A GPU of the name `uuid`, whose buffers others reach by a number."""

    buffers: dict[int, torch.Tensor] = {}

    def __init__(self, uuid: str):
        self.device, self.uuid = CPU, uuid
        self.largest = 0

    def share(self, buffer: torch.Tensor) -> int:
        self.largest = max(self.largest, buffer.nbytes)
        self.buffers[id(buffer)] = buffer
        return id(buffer)

    def attach(self, shared: int) -> torch.Tensor:
        return self.buffers[shared]

    def settle(self) -> None:
        """A copy within this process has ended when it returns."""


def receive_by_ipc(
    session: TransferSession, uuid: str, rank: int, specs: list[WeightSpec], rounds: int = 1
) -> list[Named]:
    reader = IpcReader(session, rank, SharedMemory(uuid))
    taken: list[Named] = []
    for _ in range(rounds):
        taken.append([])
        reader.receive(specs, taken[-1].extend)
    return taken


def send_by_ipc(
    session: TransferSession, memory: SharedMemory, rank: int, ranks: int, rounds: list[Named]
) -> list[str]:
    sender = IpcSender(session, rank, ranks, memory)
    return [sender.send(named, POLICY, capacity=CAPACITY) for named in rounds]


def test_each_rank_sends_to_the_workers_on_its_own_gpu(threads: ThreadPoolExecutor) -> None:
    """Three ranks; two engines' workers share the first one's GPU, none is on the second's. What the ranks hold differs here, to see
    who was served by whom."""
    session, sent = session_of("ipc", 3), weights()
    held = [[(name, tensor + rank) for name, tensor in sent] for rank in range(3)]
    memories = [SharedMemory(uuid) for uuid in "ABC"]
    workers = [
        threads.submit(receive_by_ipc, session, uuid, rank, specs_of(sent), 2)
        for rank, uuid in ((1, "A"), (2, "C"), (3, "A"))
    ]
    ranks = [threads.submit(send_by_ipc, session, memories[rank], rank, 3, [sent, held[rank]]) for rank in range(3)]
    marks = [rank.result(timeout=60) for rank in ranks]
    for worker, rank in zip(workers, (0, 2, 0), strict=True):
        first, second = worker.result(timeout=60)
        assert fingerprint(first) == fingerprint(sent) == marks[0][0]
        assert fingerprint(second) == fingerprint(held[rank]) == marks[rank][1]
        for (_, tensor), (_, expected) in zip(second, held[rank], strict=True):
            assert torch.equal(tensor, expected), "also those larger than the buffer"
    assert memories[0].largest == CAPACITY, "one bucket is all that a sender holds"


def test_ipc_sends_tensors_that_are_freed_as_the_next_is_asked_for(threads: ThreadPoolExecutor) -> None:
    session, sent = session_of("ipc", 1), weights()
    worker = threads.submit(receive_by_ipc, session, "A", 1, specs_of(sent))

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in sent:
            whole = tensor.clone()
            yield name, whole
            whole.zero_()

    send_by_ipc(session, SharedMemory("A"), 0, 1, [gathered()])
    assert fingerprint(worker.result(timeout=30)[0]) == fingerprint(sent)


def test_ipc_refuses_a_worker_that_shares_no_gpu_with_a_rank(threads: ThreadPoolExecutor) -> None:
    session = session_of("ipc", 2)
    workers = [threads.submit(receive_by_ipc, session, uuid, rank, []) for rank, uuid in ((1, "A"), (2, "Z"))]
    with pytest.raises(
        TransferFailed, match="1 of 2 engine workers run on a GPU without a policy rank.*rollout.transfer=auto"
    ):
        IpcSender(session, 0, 1, SharedMemory("A"))
    for worker in workers:
        with pytest.raises(TransferFailed, match="gave up|broke off"):  # the sender, and the store with it, may be gone
            worker.result(timeout=30)


def test_ipc_ends_that_differ_say_so(threads: ThreadPoolExecutor) -> None:
    session, sent = session_of("ipc", 1), weights()
    specs = specs_of(sent)
    specs[2] = WeightSpec("w2", "float16", (600,))
    worker: Future = threads.submit(receive_by_ipc, session, "A", 1, specs)
    with pytest.raises(TransferFailed, match="gave up"):
        send_by_ipc(session, SharedMemory("A"), 0, 1, [sent])
    with pytest.raises(TransferFailed, match="differ in number, shape or dtype"):
        worker.result(timeout=30)


def test_waiting_for_what_never_comes_ends_in_words() -> None:
    session = session_of("ipc", 1, timeout_s=0.2)
    with pytest.raises(TransferFailed, match="rank 1 of 2 could not join the weight transfer"):
        Board(session, 1)  # nobody holds the store
    with pytest.raises(TransferFailed, match=r"broke off at \['worker/1'\]: nothing came within 0.2 s"):
        Board(session, 0).read("worker/1")


def test_what_is_put_into_the_store_is_never_executed() -> None:
    """Whoever reaches the port can write there; a pickle is not what the ends read."""
    import pickle

    session = session_of("ipc", 1)
    board = Board(session, 0)
    board._store.set("worker/1", pickle.dumps(print))
    with pytest.raises(ValueError):
        board.read("worker/1")
