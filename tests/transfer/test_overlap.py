"""Filling, travelling and loading overlap on the gloo wire: nothing is overwritten, reordered or kept, wherever an end fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf.cluster.network import free_port
from rlhf.training import weights as sharded_weights
from rlhf.transfer import TransferFailed, TransferSession, gloo
from rlhf.transfer.buckets import plan
from rlhf.transfer.fingerprint import fingerprint
from rlhf.transfer.gloo import GlooSender, receive
from rlhf.types import WeightSpec
from tests.transfer.test_gloo import CAPACITY, POLICY, freed, spec_of, weights

Named = list[tuple[str, torch.Tensor]]
Load = Callable[[Named], Any]


def numbered(sizes: list[int]) -> Named:
    """Tensors of so many bytes, all different."""
    return [(str(i), (torch.arange(size) * 7 + 13 * i).remainder(251).to(torch.uint8)) for i, size in enumerate(sizes)]


def buffers(capacity: int) -> list[torch.Tensor]:
    """A sender's."""
    return [torch.empty(capacity, dtype=torch.uint8) for _ in range(2)]


def specs_of(named: Named) -> list[WeightSpec]:
    return [spec_of(*item) for item in named]


class Ends:
    """A sender and receivers in threads of this process, which stay in one session for many transfers."""

    def __init__(self, receivers: int = 1):
        session = TransferSession("gloo", "127.0.0.1", free_port(), 1 + receivers, timeout_s=20)
        self.pool = ThreadPoolExecutor(receivers)
        joining = [self.pool.submit(gloo.join, session, 1 + number) for number in range(receivers)]
        self.sender = GlooSender(session)
        self.groups = [end.result(timeout=30) for end in joining]

    def send(
        self, named: Any, specs: list[WeightSpec], loads: list[Load], capacity: int
    ) -> tuple[Future, list[Future]]:
        """What became of the sender, and of the receivers."""
        self.sender._buffers = buffers(capacity)
        receivers = [
            self.pool.submit(receive, group, specs, load, capacity)
            for group, load in zip(self.groups, loads, strict=True)
        ]
        sent: Future = Future()
        try:
            sent.set_result(self.sender.send(named, POLICY))
        except (TransferFailed, ValueError) as error:
            sent.set_exception(error)
        for receiver in receivers:
            receiver.exception(timeout=30)
        return sent, receivers


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.pool.shutdown()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 900), max_size=12), capacity=st.integers(50, 400))
def test_order_and_bytes_are_kept(ends: Ends, sizes: list[int], capacity: int) -> None:
    named, arrived = numbered(sizes), []
    sent, (received,) = ends.send(freed(named), specs_of(named), [arrived.extend], capacity)
    received.result()
    assert [name for name, _ in arrived] == [name for name, _ in named]
    assert all(torch.equal(got, tensor) for (_, got), (_, tensor) in zip(arrived, named, strict=True))
    assert sent.result() == fingerprint(named)


def test_a_failure_before_any_tensor_ends_both_ends_with_words(ends: Ends) -> None:
    named = weights()

    def broken(at: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from named[:at]
        raise ValueError("the gather failed")

    for at in range(len(named) + 1):
        sent, (received,) = ends.send(broken(at), specs_of(named), [lambda _: None], CAPACITY)
        with pytest.raises(ValueError, match="the gather failed"):
            sent.result()
        with pytest.raises(TransferFailed, match="gave up"):
            received.result()
    # All ends stopped at the same place, so what comes next is understood.
    arrived: Named = []
    sent, (received,) = ends.send(named, specs_of(named), [arrived.extend], CAPACITY)
    received.result()
    assert sent.result() == fingerprint(arrived)


def test_a_failure_to_load_any_bucket_ends_all_ends_with_words() -> None:
    named = weights()
    ends = Ends(receivers=2)

    class Broken:
        def __init__(self, at: int):
            self.left = at

        def load(self, arrived: Named) -> None:
            if self.left == 0:
                raise ValueError("out of memory")
            self.left -= 1

    for at in range(len(plan(specs_of(named), CAPACITY))):
        loads = [Broken(at).load, lambda _: None]
        sent, (received, other) = ends.send(named, specs_of(named), loads, CAPACITY)
        with pytest.raises(ValueError, match="out of memory"):
            received.result()
        for end in (sent, other):
            with pytest.raises(TransferFailed, match="gave up"):
                end.result()
    ends.pool.shutdown()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_ends_that_differ_anywhere_say_so(ends: Ends, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
    wrong = data.draw(st.integers(0, len(sizes) - 1))
    named = numbered(sizes)
    specs = specs_of(numbered([size + 400 * (place == wrong) for place, size in enumerate(sizes)]))
    sent, (received,) = ends.send(named, specs, [lambda _: None], 100)
    for end in (sent, received):
        with pytest.raises(TransferFailed, match="differ in number, shape or dtype"):
            end.result()


@dataclass
class Late:
    """A group that reads and writes what travels as late as it may: when it is asked whether that has ended."""

    headers: list[torch.Tensor] = field(default_factory=list)
    meet: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=20))
    wire: queue.Queue[torch.Tensor] = field(default_factory=queue.Queue)

    def end(self, *, sends: bool) -> LateEnd:
        return LateEnd(self, sends)


@dataclass
class LateEnd:
    between: Late
    sends: bool

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions) -> Work:
        return Work(lambda: self._largest(tensors[0]))

    def _largest(self, header: torch.Tensor) -> None:
        self.between.headers.append(header.clone())
        self.between.meet.wait()
        header.copy_(torch.stack(self.between.headers[-2:]).amax(0))
        self.between.meet.wait()

    def broadcast(self, piece: torch.Tensor, root: int) -> Work:
        if self.sends:
            return Work(lambda: self.between.wire.put(piece.clone()))
        return Work(lambda: piece.copy_(self.between.wire.get(timeout=20)))


@dataclass
class Work:
    happen: Callable[[], Any]

    def wait(self) -> None:
        self.happen()


def transfer(named: Iterable[tuple[str, torch.Tensor]], specs: list[WeightSpec], load: Load) -> str:
    """From a sender to a receiver over such a group, in buckets of 200 bytes; the sender's fingerprint."""
    group = Late()
    sender = GlooSender.__new__(GlooSender)
    sender._group, sender._buffers = group.end(sends=True), buffers(200)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receive, group.end(sends=False), specs, load, 200)
        mark = sender.send(named, POLICY)
        received.result(timeout=30)
    return mark


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 900), min_size=1, max_size=30))
def test_nothing_is_overwritten_while_it_travels(sizes: list[int]) -> None:
    named, arrived = numbered(sizes), []
    assert transfer(freed(named), specs_of(named), arrived.extend) == fingerprint(named)
    assert all(torch.equal(got, tensor) for (_, got), (_, tensor) in zip(arrived, named, strict=True))
    assert len(arrived) == len(named)


def test_what_was_loaded_is_released_before_the_next_bucket_is_loaded() -> None:
    named = numbered([150, 900, 120, 60, 190, 400, 30, 200])
    loaded: list[StorageWeakRef] = []

    def load(arrived: Named) -> None:
        assert all(buffer.expired() for buffer in loaded), "one is loaded and one arrives; no third is kept"
        loaded.append(StorageWeakRef(arrived[0][1].untyped_storage()))

    transfer(named, specs_of(named), load)
    assert len(loaded) == len(plan(specs_of(named), 200))


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_what_zero3_gathers_is_copied_before_it_is_released(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(size, 9) for size in (3, 40, 8, 1, 17, 5)))
    whole = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    sent = [(name, whole[parameter]) for name, parameter in model.named_parameters()]

    @contextmanager
    def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data.copy_(whole[parameter])
        yield
        for parameter in parameters:
            parameter.data.fill_(torch.nan)

    monkeypatch.setattr(sharded_weights, "gathered", gathered)
    monkeypatch.setattr(sharded_weights, "GATHER_ELEMENTS", at_once)
    arrived: Named = []
    assert transfer(sharded_weights.whole_weights(model), specs_of(sent), arrived.extend) == fingerprint(sent)
    assert fingerprint(arrived) == fingerprint(sent)
    assert all(parameter.isnan().all() for parameter in whole), "all were released"
