"""Weights over sockets, for engines on CPU: a broadcast from the sender to all workers, bucket by bucket.

Before each bucket all ends agree on its length, and any end may give up there. So ends that differ, or an end that
fails, stop all others at once and with words, instead of leaving them to wait for the timeout.

While one bucket travels, in gloo's own threads, the sender fills the next one and the receivers load the one before. All ends agree on the
next bucket only after that, so no end is ever more than one bucket ahead of the slowest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlhf.cluster.network import open_store
from rlhf.transfer.buckets import BUCKET_BYTES, Bucket, filled, pieces, plan
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.session import TransferFailed, TransferSession, local_address_towards
from rlhf.types import Shipment, WeightSpec

CAPACITY = BUCKET_BYTES // 8
"""Of a bucket, in bytes: small enough to stay in a processor's cache from being written to being read."""
_END = 0  # in place of a bucket's length


def join(session: TransferSession, rank: int) -> dist.ProcessGroup:
    """Join the session's group; returns when all ranks are there.

    The group stands outside torch's global state, so a process may be in it and in DeepSpeed's or vLLM's own group.

    Raises:
        TransferFailed: not all ranks came within the session's timeout.
    """
    timeout = timedelta(seconds=session.timeout_s)
    try:
        store = open_store(session.host, session.port, timeout, serves=rank == 0, world_size=session.world_size)
        options = dist.ProcessGroupGloo._Options()
        # By default gloo listens on what the host name resolves to, which is often the loopback.
        address = local_address_towards(session.host, session.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        prefix = dist.PrefixStore(session.prefix, store)
        return dist.ProcessGroupGloo(prefix, rank, session.world_size, options)
    except RuntimeError as error:  # torch.distributed's own errors derive from it
        raise TransferFailed(
            f"rank {rank} of {session.world_size} could not join the weight transfer at {session.host}:{session.port} "
            f"within {session.timeout_s:g} s: {error}"
        ) from error


class GlooSender:
    """The trainer's end (rank 0)."""

    def __init__(self, session: TransferSession, capacity: int = CAPACITY):
        self._group = join(session, rank=0)
        self._buffers = [_memory(capacity), _memory(capacity)]

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str:
        """Broadcast the tensors; each is read and copied before the next one is asked for. Returns their fingerprint.

        Raises:
            TransferFailed: a worker was lost, failed, expected something else, or was too slow for the session's
            timeout.
        """
        with _others_told(self._group):
            total = Fingerprint(shipment.slot)
            self._send_buckets(total.watch(named_tensors))
        _agree(self._group, _END, "the end")
        return total.hexdigest()

    def _send_buckets(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        under_way: deque[_Travelling] = deque()
        left = (
            0  # bytes of a bucket that has begun; nothing fails before its end, as the fingerprint has read all of it
        )
        for piece in filled(named_tensors, self._buffers[0].numel(), self._free_buffers(under_way)):
            if left == 0:
                _agree(self._group, piece.size, piece.first)
                left = piece.size
            left -= piece.data.numel()
            under_way.append(_Travelling(self._group.broadcast(piece.data, 0), piece.first))
        for travelling in under_way:
            travelling.finish()

    def _free_buffers(self, under_way: deque[_Travelling]) -> Iterator[torch.Tensor]:
        """Two in turn, each when what it held has left."""
        for buffer in cycle(self._buffers):
            if len(under_way) == 2:
                under_way.popleft().finish()
            yield buffer

    def close(self) -> None:
        """Leave the group."""
        self._group.shutdown()


def receive(
    group: dist.ProcessGroup,
    specs: Sequence[WeightSpec],
    load: Callable[[list[tuple[str, torch.Tensor]]], Any],
    capacity: int = CAPACITY,
) -> None:
    """A worker's end: gives the announced tensors to `load`, one bucket at a time, as views of a buffer of their own.

    The bucket after arrives meanwhile.

    Raises:
        TransferFailed: another end was lost or gave up, or the sender sent something other than what was announced.
    """
    with _others_told(group):
        waiting: _Arrival | None = None
        for bucket in plan(specs, capacity):
            following = _Arrival.begin(group, bucket, capacity)
            if waiting is not None:
                load(waiting.tensors())
            waiting = following
        if waiting is not None:
            load(waiting.tensors())
    _agree(group, _END, "the end")


@dataclass(frozen=True)
class _Travelling:
    """A piece under way; its memory is gloo's until it has finished."""

    work: dist.Work
    place: str

    def finish(self) -> None:
        _finish(self.work, self.place)


@dataclass(frozen=True)
class _Arrival:
    """A bucket on its way to this end."""

    bucket: Bucket
    buffer: torch.Tensor
    pieces: list[_Travelling]

    @classmethod
    def begin(cls, group: dist.ProcessGroup, bucket: Bucket, capacity: int) -> _Arrival:
        place = bucket.parts[0][0].name
        buffer = _memory(bucket.size)
        if bucket.size:
            _agree(group, bucket.size, place)
        parts = pieces(buffer, capacity)
        return cls(bucket, buffer, [_Travelling(group.broadcast(part, 0), place) for part in parts])

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What has arrived, when it has."""
        for piece in self.pieces:
            piece.finish()
        return self.bucket.unpack(self.buffer)


def _memory(size: int) -> torch.Tensor:
    """uint8 [size]. From numpy, which asks Linux for large pages: the first use of small ones costs more than what is copied into them."""
    return torch.from_numpy(np.empty(size, dtype=np.uint8))


def _agree(group: dist.ProcessGroup, size: int, place: str, give_up: bool = False) -> None:
    """All ends meet before a bucket: raises at all of them unless they mean the same size and nobody gives up."""
    header = torch.tensor([size, -size, int(give_up)])
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX
    _finish(group.allreduce([header], options), place)
    largest, negative_smallest, given_up = header.tolist()
    if given_up:
        raise TransferFailed(f"at {place}: another end of the weight transfer gave up; its own error says why")
    if largest != -negative_smallest:
        raise TransferFailed(
            f"at {place} the ends of the transfer expect from {-negative_smallest} to {largest} bytes: the specs "
            "given to the engines and the tensors given to the sender differ in number, shape or dtype"
        )


@contextmanager
def _others_told(group: dist.ProcessGroup) -> Iterator[None]:
    """An error in here, other than one that all ends share, is made known to the others before it goes on."""
    known = False
    try:
        yield
        known = True
    except TransferFailed:
        known = True
        raise
    finally:
        if not known:
            with suppress(TransferFailed):  # the error under way is the one to be seen
                _agree(group, 0, "giving up", give_up=True)


def _finish(work: dist.Work, place: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:  # gloo's own errors, timeouts included, derive from it
        raise TransferFailed(f"the weight transfer broke off at {place}: {error}") from error
