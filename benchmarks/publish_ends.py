"""One process of `publish.py`: the policy's rank 0, which sends, its other rank under ZeRO-3, or a worker, which receives."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import workload

from rlhf.transfer.buckets import filled, plan
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.gloo import GlooSender, join, receive
from rlhf.transfer.session import TransferSession
from rlhf.types import Shipment, WeightSpec

HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 576, 1536, 192, 30, 49152  # SmolLM2-135M
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POLICY = Shipment(1, "policy", ())
Named = list[tuple[str, torch.Tensor]]


def specs(dtype: str) -> list[WeightSpec]:
    """SmolLM2-135M's tensors in the order of its files; its output layer is tied to the embedding."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes = {"embed_tokens": (VOCABULARY, HIDDEN)}
    shapes |= {f"layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    shapes["norm"] = (HIDDEN,)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return [WeightSpec(f"model.{place}.weight", name, shape) for place, shape in shapes.items()]


def tensors(dtype: str) -> Named:
    """Random values."""
    return [(spec.name, torch.randn(spec.shape).to(DTYPES[dtype])) for spec in specs(dtype)]


class Meeting:
    """All ends of the transfer in a group of their own, for bare broadcasts and for starting together."""

    def __init__(self, session: TransferSession, rank: int):
        self.rank = rank
        self._group = join(session, rank)

    def wait(self) -> None:
        """Until all are here."""
        self._group.allreduce([torch.zeros(1)]).wait()

    def broadcast(self, whole: torch.Tensor, piece: int) -> None:
        """Until all ends have these bytes, sent in pieces."""
        for part in whole.split(piece):
            self._group.broadcast(part, 0).wait()
        self.wait()

    def rounds(self, args: argparse.Namespace, publish: Callable[[], str], whole: torch.Tensor) -> None:
        """Publish and broadcast in turns, and say how many seconds each took, and how many of this end's processor."""
        marks: list[str] = []
        sides: dict[str, Callable[[], None]] = {
            "publish": lambda: marks.append(publish()),
            "bare": lambda: self.broadcast(whole, len(whole)),
            "bare_in_pieces": lambda: self.broadcast(whole, args.bucket),
        }
        for number in range(args.rounds + 1):
            seconds, processor = {}, {}
            for side in sorted(sides, reverse=number % 2 == 0):  # none is always first
                self.wait()
                start, busy = time.perf_counter(), time.process_time()
                sides[side]()
                seconds[side], processor[side] = time.perf_counter() - start, time.process_time() - busy
            if number:  # the first is not counted
                workload.report(
                    kind="round", rank=self.rank, seconds=seconds, processor=processor, fingerprint=marks[-1]
                )


def timed(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds, after once that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def send(args: argparse.Namespace, meeting: Meeting, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Rank 0: publish and broadcast in turns, and say how long each took; then each part of it alone."""
    sender = GlooSender(args.session, args.bucket)
    announced = specs(args.dtype)
    whole = torch.zeros(sum(size(spec) for spec in announced), dtype=torch.uint8)

    meeting.rounds(args, lambda: sender.send(weights(), POLICY), whole)
    local = [(spec.name, torch.zeros(spec.shape, dtype=DTYPES[args.dtype])) for spec in announced]
    parts = {
        "fingerprint": timed(lambda: list(Fingerprint().watch(local))),
        "copy": timed(lambda: copy(local, args.bucket)),
    }
    meetings = len(plan(announced, args.bucket)) + 1
    parts["agree"] = timed(lambda: [meeting.wait() for _ in range(meetings)])
    workload.report(kind="parts", bytes=len(whole), meetings=meetings, **parts)
    sender.close()


def receiving(args: argparse.Namespace, meeting: Meeting) -> None:
    """A worker: takes part in all of it. It loads by copying into tensors of its own, fingerprinted as an engine's worker does."""
    group = join(args.session, args.rank)
    announced = specs(args.dtype)
    held = {spec.name: torch.zeros(spec.shape, dtype=DTYPES[args.dtype]) for spec in announced}
    whole = torch.zeros(sum(size(spec) for spec in announced), dtype=torch.uint8)

    def load(named: Named, total: Fingerprint) -> None:
        for name, tensor in total.watch(named):
            held[name].copy_(tensor)

    def take() -> str:
        total = Fingerprint()
        receive(group, announced, lambda named: load(named, total), args.bucket)
        return total.hexdigest()

    meeting.rounds(args, take, whole)
    for _ in range(4 * (len(plan(announced, args.bucket)) + 1)):
        meeting.wait()
    arrived = [(name, tensor.clone()) for name, tensor in held.items()]
    if args.rank == 1:
        workload.report(kind="parts", load=timed(lambda: load(arrived, Fingerprint())))


def copy(named: Named, capacity: int) -> None:
    """Put all tensors into buckets, which go nowhere."""
    for _ in filled(named, capacity, cycle([torch.empty(capacity, dtype=torch.uint8) for _ in range(2)])):
        pass


def size(spec: WeightSpec) -> int:
    """Bytes of a tensor."""
    return torch.Size(spec.shape).numel() * getattr(torch, spec.dtype).itemsize


def sharded_weights(args: argparse.Namespace) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    """SmolLM2-135M of random weights, partitioned by DeepSpeed over two ranks, which gather it when it is iterated."""
    import transformers

    from rlhf.config.cluster import ClusterSettings
    from rlhf.config.policy import PolicySettings
    from rlhf.training import ranks, weights
    from rlhf.training.deepspeed import sharding
    from rlhf.training.deepspeed_zero3 import partition

    weights.GATHER_ELEMENTS = args.gather
    ranks.join(ranks.Member(args.policy_rank, 2, "127.0.0.1", args.policy_port), ClusterSettings(device="cpu"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, dtype=DTYPES[args.dtype])
    settings = PolicySettings(model="unused", dtype=args.dtype, ranks=2, zero_stage=3)
    shards = sharding(settings, learn=False)
    assert shards is not None
    partition(model, shards)
    assert [(name, shape) for name, _, shape in weights.described_weights(model)] == [
        (spec.name, spec.shape) for spec in specs(args.dtype)
    ]
    return lambda: weights.whole_weights(model)


def main() -> None:
    """Play one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, help="in the transfer; none: the policy's second rank")
    parser.add_argument("--policy-rank", type=int, help="of a policy under ZeRO-3")
    for name in ("core", "ends", "rounds", "port", "meeting-port", "policy-port", "bucket", "gather"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.session = TransferSession("gloo", "127.0.0.1", args.port, args.ends, 120.0)
    weights = None if args.policy_rank is None else sharded_weights(args)
    if args.rank is not None:
        meeting = Meeting(TransferSession("gloo", "127.0.0.1", args.meeting_port, args.ends, 120.0), args.rank)
    if args.rank == 0:
        held = tensors(args.dtype) if weights is None else []
        send(args, meeting, weights or (lambda: iter(held)))
    elif args.rank is not None:
        receiving(args, meeting)
    if weights is not None:
        if args.rank is None:
            for _ in range(args.rounds + 1):
                list_nothing(weights())
        gather = timed(lambda: list_nothing(weights()))
        if args.rank == 0:
            workload.report(kind="parts", gather=gather)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that still run when the interpreter is taken down abort the process now and then


def list_nothing(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Take part in gathering."""
    for _ in weights:
        pass


if __name__ == "__main__":
    main()
