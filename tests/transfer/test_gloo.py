"""The gloo wire: what arrives is what was sent, and broken transfers end soon, in words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster.network import free_port
from rlhf.transfer import TransferFailed, TransferSession
from rlhf.transfer.buckets import Placement, filled, pieces, plan, spec_bytes
from rlhf.transfer.fingerprint import fingerprint
from rlhf.transfer.gloo import GlooSender, join, receive
from rlhf.types import Shipment, WeightSpec

CAPACITY = 1000
POLICY = Shipment(1, "policy", ())


def spec_of(name: str, tensor: torch.Tensor) -> WeightSpec:
    return WeightSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def weights() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (7, 11), (5,), (40, 40), (2, 2), (250,), (1,)]  # 40 x 40 is larger than a bucket
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    return [
        (f"w{i}", torch.randn(shape, generator=generator).to(dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def freed(named: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies that are gone when the next one is asked for, as ZeRO-3's gathered parameters are."""
    for name, tensor in named:
        whole = tensor.clone()
        yield name, whole
        whole.view(torch.uint8).fill_(77)


def take(session: TransferSession, rank: int, specs: list[WeightSpec]) -> list[tuple[str, torch.Tensor]]:
    received: list[tuple[str, torch.Tensor]] = []
    receive(join(session, rank), specs, received.extend, CAPACITY)
    return received


@pytest.fixture
def session() -> TransferSession:
    return TransferSession("gloo", "127.0.0.1", free_port(), world_size=3, timeout_s=20)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def start_receivers(pool: ThreadPoolExecutor, session: TransferSession, specs: list[WeightSpec]) -> list[Future]:
    return [pool.submit(take, session, rank, specs) for rank in range(1, session.world_size)]


def test_two_receivers_get_every_tensor(session: TransferSession, threads: ThreadPoolExecutor) -> None:
    sent = weights()
    receivers = start_receivers(threads, session, [spec_of(*item) for item in sent])
    mark = GlooSender(session, CAPACITY).send(sent, POLICY)
    for receiver in receivers:
        received = receiver.result(timeout=30)
        assert fingerprint(received) == mark == fingerprint(sent)
        for (name, tensor), (expected_name, expected) in zip(received, sent, strict=True):
            assert name == expected_name
            assert torch.equal(tensor, expected)


def test_each_tensor_may_be_freed_after_it_was_handed_over(
    session: TransferSession, threads: ThreadPoolExecutor
) -> None:
    sent = weights()
    receivers = start_receivers(threads, session, [spec_of(*item) for item in sent])

    mark = GlooSender(session, CAPACITY).send(freed(sent), POLICY)
    assert (
        [fingerprint(receiver.result(timeout=30)) for receiver in receivers] == [mark, mark] == [fingerprint(sent)] * 2
    )


def test_specs_that_do_not_fit_what_is_sent(session: TransferSession, threads: ThreadPoolExecutor) -> None:
    sent = weights()
    specs = [spec_of(*item) for item in sent]
    specs[2] = WeightSpec("w2", "float16", (6,))
    receivers = start_receivers(threads, session, specs)
    with pytest.raises(TransferFailed, match="differ in number, shape or dtype"):
        GlooSender(session, CAPACITY).send(sent, POLICY)
    for receiver in receivers:
        with pytest.raises(TransferFailed, match="differ in number, shape or dtype"):
            receiver.result(timeout=30)


@pytest.mark.parametrize("missing_end", ["specs", "tensors"])
def test_more_or_fewer_tensors_than_announced(
    session: TransferSession, threads: ThreadPoolExecutor, missing_end: str
) -> None:
    sent = weights()
    specs = [spec_of(*item) for item in sent]
    specs, sent = (specs[:-1], sent) if missing_end == "specs" else (specs, sent[:-1])
    receivers = start_receivers(threads, session, specs)
    with pytest.raises(TransferFailed, match="differ in number"):
        GlooSender(session, CAPACITY).send(sent, POLICY)
    for receiver in receivers:
        with pytest.raises(TransferFailed, match="differ in number"):
            receiver.result(timeout=30)


def test_a_sender_that_cannot_make_its_tensors_tells_the_receivers(
    session: TransferSession, threads: ThreadPoolExecutor
) -> None:
    sent = weights()
    receivers = start_receivers(threads, session, [spec_of(*item) for item in sent])

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield sent[0]
        raise ValueError("the gather failed")

    with pytest.raises(ValueError, match="the gather failed"):
        GlooSender(session, CAPACITY).send(broken(), POLICY)
    for receiver in receivers:
        with pytest.raises(TransferFailed, match="gave up"):
            receiver.result(timeout=30)


def test_a_receiver_that_cannot_load_tells_the_others(session: TransferSession, threads: ThreadPoolExecutor) -> None:
    sent = weights()
    specs = [spec_of(*item) for item in sent]

    def fail_to_load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        raise ValueError("out of memory")

    broken = threads.submit(lambda: receive(join(session, 1), specs, fail_to_load, CAPACITY))
    other = threads.submit(take, session, 2, specs)
    with pytest.raises(TransferFailed, match="gave up"):
        GlooSender(session, CAPACITY).send(sent, POLICY)
    with pytest.raises(ValueError, match="out of memory"):
        broken.result(timeout=30)
    with pytest.raises(TransferFailed, match="gave up"):
        other.result(timeout=30)


def test_a_lost_receiver_ends_the_transfer_and_the_next_session_is_without_it(
    session: TransferSession, threads: ThreadPoolExecutor
) -> None:
    sent = weights() * 50
    specs = [spec_of(*item) for item in sent]

    everybody_is_there = threading.Event()

    def leave_early() -> None:
        group = join(session, 1)
        everybody_is_there.wait(30)
        del group  # it never takes part

    left = threads.submit(leave_early)
    stayed = threads.submit(take, session, 2, specs)
    sender = GlooSender(session, CAPACITY)
    everybody_is_there.set()
    with pytest.raises(TransferFailed, match="broke off"):
        sender.send(sent, POLICY)
    left.result(timeout=30)
    with pytest.raises(TransferFailed):
        stayed.result(timeout=60)
    sender.close()
    anew = replace(session, port=free_port(), world_size=2, epoch=2)
    (receiver,) = start_receivers(threads, anew, specs)
    mark = GlooSender(anew, CAPACITY).send(sent, POLICY)
    assert fingerprint(receiver.result(timeout=30)) == mark


def test_joining_alone_times_out_and_an_end_of_another_epoch_is_nobody(threads: ThreadPoolExecutor) -> None:
    session = TransferSession("gloo", "127.0.0.1", free_port(), world_size=2, timeout_s=1, epoch=2)
    stale = threads.submit(join, replace(session, epoch=1), 1)
    with pytest.raises(TransferFailed, match="could not join"):
        GlooSender(session)
    with pytest.raises(TransferFailed, match="could not join"):
        stale.result(timeout=30)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_buckets_hold_every_tensor_once_in_order(sizes: list[int]) -> None:
    specs = [WeightSpec(str(i), "int8", (size,)) for i, size in enumerate(sizes)]
    buckets = plan(specs, capacity=200)
    assert [spec for bucket in buckets for spec, _ in bucket.parts] == specs
    for bucket in buckets:
        assert bucket.size <= 200 or len(bucket.parts) == 1 or all(spec_bytes(s) == 0 for s, _ in bucket.parts[:-1])
        end = 0
        for spec, start in bucket.parts:
            assert start >= end
            assert start % 16 == 0
            end = start + spec_bytes(spec)
        assert end == bucket.size


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_the_sender_places_as_the_receiver_plans(sizes: list[int]) -> None:
    placement = Placement(200)
    placed = [placement.place(size) for size in sizes]
    specs = [WeightSpec(str(i), "int8", (size,)) for i, size in enumerate(sizes)]
    planned = [(number, start) for number, bucket in enumerate(plan(specs, 200)) for _, start in bucket.parts]
    assert placed == planned


@given(st.lists(st.integers(0, 900), min_size=1, max_size=60))
def test_the_pieces_that_leave_are_the_buckets_that_are_planned(sizes: list[int]) -> None:
    sent = [(str(i), torch.full((size,), i, dtype=torch.int8)) for i, size in enumerate(sizes)]
    planned = [bucket for bucket in plan([spec_of(*item) for item in sent], 200) if bucket.size]
    asked: list[torch.Tensor] = []

    def buffers() -> Iterator[torch.Tensor]:
        while True:
            asked.append(torch.full((200,), 99, dtype=torch.uint8))
            yield asked[-1]

    left = list(filled(freed(sent), 200, buffers()))
    assert len(left) == len(asked), "memory is asked for once for each piece"
    for piece, buffer in zip(left, asked, strict=True):
        assert piece.data.data_ptr() == buffer.data_ptr()
    for bucket in planned:
        whole = torch.empty(bucket.size, dtype=torch.uint8)
        for part in pieces(whole, 200):
            piece = left.pop(0)
            assert (piece.size, len(piece.data)) == (bucket.size, len(part))
            assert piece.first in [spec.name for spec, _ in bucket.parts]
            part.copy_(piece.data)
        for name, tensor in bucket.unpack(whole):
            assert torch.equal(tensor, sent[int(name)][1])
    assert not left
