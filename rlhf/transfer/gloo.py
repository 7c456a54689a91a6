"""Weights over sockets, for engines on CPU: a broadcast from the sender to all workers, bucket by bucket.

Before each bucket goes a header, one integer: its length in bytes, 0 for the end, or -1 when the sender gives up. So ends
that disagree fail at once and with words, instead of one waiting for the other until the timeout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhf.transfer.buckets import BUCKET_BYTES, Placement, plan
from rlhf.transfer.fingerprint import Fingerprint, as_bytes
from rlhf.transfer.session import TransferFailed, TransferSession, WeightSpec, local_address_towards

_END, _GIVEN_UP = 0, -1


def join(session: TransferSession, rank: int) -> dist.ProcessGroup:
    """Join the session's group; returns when all ranks are there.

    The group stands outside torch's global state, so a process may be in it and in DeepSpeed's or vLLM's own group.

    Raises:
        TransferFailed: not all ranks came within the session's timeout.
    """
    timeout = timedelta(seconds=session.timeout_s)
    try:
        store = dist.TCPStore(
            session.host, session.port, session.world_size, rank == 0, timeout, wait_for_workers=False
        )
        options = dist.ProcessGroupGloo._Options()
        # By default gloo listens on what the host name resolves to, which is often the loopback.
        address = local_address_towards(session.host, session.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        prefix = dist.PrefixStore("rlhf-weights", store)
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

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Broadcast the tensors; each is copied before the next one is asked for. Returns their fingerprint.

        Raises:
            TransferFailed: a worker was lost or did not follow within the session's timeout.
        """
        finished = False
        try:
            total = self._send_buckets(named_tensors)
            _exchange(self._group, torch.tensor([_END]), "the end of the weights")
            finished = True
        except TransferFailed:
            finished = True  # the group is lost: nobody is left to be told
            raise
        finally:
            if not finished:  # the caller's tensors could not be produced
                _exchange(self._group, torch.tensor([_GIVEN_UP]), "the sender's farewell")
        return total

    def _send_buckets(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        total = Fingerprint()
        placement = Placement(self._capacity)
        buffer = torch.empty(self._capacity, dtype=torch.uint8)
        pending, current = buffer[:0], 0
        for name, tensor in total.watch(named_tensors):
            data = as_bytes(tensor)
            bucket, start = placement.place(data.numel())
            if bucket != current:
                self._send(pending, before=name)
                current = bucket
            if data.numel() > self._capacity:
                pending = data.to("cpu", copy=True)
            else:
                buffer[start : start + data.numel()].copy_(data)
                pending = buffer[: start + data.numel()]
        if pending.numel():
            self._send(pending, before="the end")
        return total.hexdigest()

    def _send(self, bucket: torch.Tensor, before: str) -> None:
        _exchange(self._group, torch.tensor([bucket.numel()]), f"the header of the bucket before {before}")
        _exchange(self._group, bucket, f"the bucket before {before}")

    def close(self) -> None:
        """Leave the group."""
        self._group.shutdown()


def receive(
    group: dist.ProcessGroup, specs: Sequence[WeightSpec], capacity: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """A worker's end: the announced tensors, one bucket at a time, as views of a buffer that is not used again.

    Raises:
        TransferFailed: the sender was lost, gave up, or sent something other than what was announced.
    """
    header = torch.zeros(1, dtype=torch.int64)
    for bucket in plan(specs, capacity):
        first = bucket.parts[0][0].name
        _exchange(group, header, f"the header of the bucket from {first}")
        _expect(int(header), bucket.size, first)
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        _exchange(group, buffer, f"the bucket from {first}")
        yield bucket.unpack(buffer)
    _exchange(group, header, "the end of the weights")
    _expect(int(header), _END, "the end")


def _expect(announced: int, expected: int, place: str) -> None:
    if announced == _GIVEN_UP:
        raise TransferFailed(f"the sender gave up at {place}; the reason stands in the policy's own error")
    if announced != expected:
        raise TransferFailed(
            f"at {place} the sender announced {announced} bytes, but the specs say {expected}: the specs given to the engines "
            "and the tensors given to the sender differ in number, shape or dtype"
        )


def _exchange(group: dist.ProcessGroup, tensor: torch.Tensor, what: str) -> None:
    try:
        group.broadcast(tensor, 0).wait()
    except RuntimeError as error:  # gloo's own errors, timeouts included, derive from it
        raise TransferFailed(f"the weight transfer broke off at {what}: {error}") from error
