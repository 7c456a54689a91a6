"""Weights over sockets, for engines on CPU: a broadcast from the sender to all workers, bucket by bucket.

Before each bucket all ends agree on its length, and any end may give up there. So ends that differ, or an end that
fails, stop all others at once and with words, instead of leaving them to wait for the timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhf.cluster.network import open_store
from rlhf.transfer.buckets import BUCKET_BYTES, filled, plan
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.session import TransferFailed, TransferSession, local_address_towards
from rlhf.types import Shipment, WeightSpec

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

    def __init__(self, session: TransferSession, capacity: int = BUCKET_BYTES):
        self._group = join(session, rank=0)
        self._capacity = capacity

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str:
        """Broadcast the tensors; each is copied before the next one is asked for. Returns their fingerprint.

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
        buffer = torch.empty(self._capacity, dtype=torch.uint8)
        for first, bucket in filled(named_tensors, buffer):
            self._send(bucket.cpu(), first)

    def _send(self, bucket: torch.Tensor, first: str) -> None:
        _agree(self._group, bucket.numel(), first)
        _finish(self._group.broadcast(bucket, 0), first)

    def close(self) -> None:
        """Leave the group."""
        self._group.shutdown()


def receive(
    group: dist.ProcessGroup,
    specs: Sequence[WeightSpec],
    load: Callable[[list[tuple[str, torch.Tensor]]], Any],
    capacity: int = BUCKET_BYTES,
) -> None:
    """A worker's end: gives the announced tensors to `load`, one bucket at a time, as views of a buffer of their own.

    Raises:
        TransferFailed: another end was lost or gave up, or the sender sent something other than what was announced.
    """
    for bucket in plan(specs, capacity):
        first = bucket.parts[0][0].name
        _agree(group, bucket.size, first)
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        _finish(group.broadcast(buffer, 0), first)
        with _others_told(group):
            load(bucket.unpack(buffer))
    _agree(group, _END, "the end")


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
