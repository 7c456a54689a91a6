"""How long a step takes, from the model's shape and what a GPU can do. Pure arithmetic; `ASSUMED` holds what is not on a data sheet.

Decoding is bound by memory: each step reads the weights once and the cache of every sequence. Learning is bound by
arithmetic: six operations per weight and token, two more for the reference. All lengths are the limits, so a step whose
responses end earlier takes less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.cluster.gpus import GpuKind
from rlhf.training.shapes import ModelShape
from rlhf.transfer import Backend


@dataclass(frozen=True)
class Assumptions:
    """What the estimate assumes.

    Attributes:
        learn: share of the GPU's arithmetic that forward and backward passes reach.
        prefill: the same for reading prompts.
        decode: share of the memory's bandwidth that decoding reaches.
        link: share of a link's bandwidth that collective calls reach.
        decode_overhead_s: of one decoding step: scheduling and sampling.
        host_update: parameters that a host updates per second for each of its ranks, where the optimizer is kept there.
        gloo: bytes per second of a broadcast through host memory (0.9 to 1.6 s for 538 MB between processes of one CPU machine, loading
            included, is the slow end; 2.5e9 was seen for the bytes alone).
        hop_s: of one all-reduce between the GPUs of an engine; there are two per layer.
    """

    learn: float = 0.4
    prefill: float = 0.5
    decode: float = 0.6
    link: float = 0.7
    decode_overhead_s: float = 0.005
    host_update: float = 0.5e9
    gloo: float = 1e9
    hop_s: float = 15e-6


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Work:
    """One step of the loop at the limits of its lengths.

    Attributes:
        prompts: of a step.
        prompt, response: tokens of each.
        sampled: responses written to each prompt.
        learned: responses of each prompt that are learned from.
        updates: optimizer steps that an epoch is divided over.
        epochs: times that the step's data is learned from.
        micro_batch: tokens of one forward and backward on one rank.
        at_once: sequences that an engine decodes at the same time, at most.
        models: in each engine: 2 where it mixes.
        frozen: models that only forward what is learned from: 1, the reference.
        critic: whether a second model learns.
    """

    prompts: int
    prompt: int
    response: int
    sampled: int
    learned: int
    updates: int
    epochs: int
    micro_batch: int
    at_once: int
    models: int = 1
    frozen: int = 1
    critic: bool = False

    @property
    def learned_tokens(self) -> int:
        """Tokens forwarded and learned from in one epoch of a step."""
        return self.prompts * (self.prompt + self.learned * self.response)

    @property
    def sampled_tokens(self) -> int:
        """Response tokens written in a step."""
        return self.prompts * self.sampled * self.response


@dataclass(frozen=True)
class Learners:
    """How the policy is spread (see `PolicySettings`).

    Attributes:
        nodes: over which the ranks are spread.
        trained: share of the weights that is trained: less than 1 with adapters.
    """

    ranks: int
    zero_stage: int
    checkpointing: bool
    offloaded_optimizer: bool
    offloaded_weights: bool
    nodes: int
    trained: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes:
        turns: moving engines and trainer in and out of shared GPUs.
        ahead: the engines write the next step's responses while the policy learns (`loop.staleness`).
    """

    generate: float
    learn: float
    publish: float
    turns: float = 0.0
    ahead: bool = False

    @property
    def total(self) -> float:
        """One after the other, or as long as the longer part."""
        work = max(self.generate, self.learn) if self.ahead else self.generate + self.learn
        return work + self.publish + self.turns


def generate_s(
    shape: ModelShape,
    gpu: GpuKind,
    work: Work,
    engines: int,
    devices: int,
    room: int,
    size: int,
    nodes: int = 1,
    assumed: Assumptions = ASSUMED,
) -> float:
    """Seconds until the engines have answered all prompts.

    Args:
        devices: of one engine.
        room: tokens that one engine's cache holds.
        size: bytes of a weight.
        nodes: over which one engine is spread.
    """
    share = math.ceil(work.prompts / engines) * work.sampled
    length = work.prompt + work.response
    together = max(1, min(share, work.at_once, room // length))
    waves = math.ceil(share / together)
    together = math.ceil(share / waves)
    weights = work.models * shape.parameters * size / devices
    cache = work.models * shape.cached * size * (work.prompt + work.response / 2) / devices
    read = (weights + together * cache) / (gpu.bandwidth * assumed.decode)
    compute = 2 * work.models * shape.parameters * together / (devices * gpu.flops * assumed.prefill)
    hops = 0.0
    if devices > 1:
        wire = gpu.link if nodes == 1 else gpu.network
        sent = 2 * together * shape.hidden * size / (wire * assumed.link)
        hops = 2 * work.models * shape.layers * (assumed.hop_s + sent)
    decode = waves * work.response * (max(read, compute) + hops + assumed.decode_overhead_s)
    prompts = math.ceil(work.prompts / engines) * work.prompt
    prefill = 2 * work.models * shape.parameters * prompts / (devices * gpu.flops * assumed.prefill)
    return decode + prefill


def learn_flops(shape: ModelShape, work: Work, learners: Learners) -> float:
    """Operations of one step's learning: all ranks, all epochs.

    Per weight and token: forward 2, backward 2 and 2 more if the weight is trained, 2 more if activations are computed again, 2 for
    each frozen model, which is asked once. Attention costs 4 per pair of tokens, layer and query width in a forward pass, half of
    that because it is causal, and twice as much backwards.
    """
    responses = work.learned * work.response / (work.prompt + work.learned * work.response)
    weights = (
        shape.linear + shape.vocabulary * shape.hidden * responses
    )  # only responses are projected to the vocabulary
    attention = 4 * shape.layers * shape.queries * (work.prompt + work.response) / 2
    again = learners.checkpointing
    policy = 2 * weights * (2 + learners.trained + again) + attention * (3 + again)
    models = 2 if work.critic else 1
    return work.learned_tokens * (policy * models * work.epochs + (2 * weights + attention) * work.frozen)


def learn_s(
    shape: ModelShape, gpu: GpuKind, work: Work, learners: Learners, size: int, assumed: Assumptions = ASSUMED
) -> float:
    """Seconds of one step's learning. Stages 2 and 3 reduce gradients in every micro-batch, the others once an optimizer step; what ZeRO-3
    sends hides behind arithmetic as far as it fits."""
    compute = learn_flops(shape, work, learners) / (learners.ranks * gpu.flops * assumed.learn)
    wire = (gpu.link if learners.nodes == 1 else gpu.network) * assumed.link
    spread = (learners.ranks - 1) / learners.ranks
    steps = work.updates * work.epochs
    batches = steps * math.ceil(work.learned_tokens / work.updates / learners.ranks / work.micro_batch)
    trained = shape.parameters * learners.trained
    reduced = (batches if learners.zero_stage >= 2 else steps) * trained * size * spread / wire
    renewed = steps * trained * size * spread / wire if learners.zero_stage < 3 else 0.0
    moved = 0.0
    if learners.offloaded_optimizer:
        moved = steps * trained / learners.ranks * ((4 + size) / gpu.host + 1 / assumed.host_update)
    if learners.zero_stage < 3:
        return compute + reduced + renewed + moved
    passes = (3 if learners.checkpointing else 2) * (2 if work.critic else 1) + work.frozen
    gathered = batches * passes * shape.parameters * size * spread / wire
    if learners.offloaded_weights:
        gathered += batches * passes * shape.parameters * size / learners.ranks / gpu.host
    return max(compute, gathered + reduced) + moved


def publish_s(sent: float, gpu: GpuKind, one_node: bool, backend: Backend, assumed: Assumptions = ASSUMED) -> float:
    """Seconds of one weight transfer of `sent` bytes, which every worker receives at the same time."""
    if backend == "ipc":  # a copy within the GPU's memory: read and written
        return 2 * sent / gpu.bandwidth
    wire = (gpu.link if one_node else gpu.network) * assumed.link
    return sent / (wire if backend == "nccl" else min(wire, assumed.gloo))


def gather_s(sent: float, gpu: GpuKind, learners: Learners, assumed: Assumptions = ASSUMED) -> float:
    """Seconds in which ZeRO-3 makes `sent` bytes of weights whole on its ranks, before they leave; other stages hold them whole."""
    if learners.zero_stage < 3:
        return 0.0
    wire = (gpu.link if learners.nodes == 1 else gpu.network) * assumed.link
    return sent * (learners.ranks - 1) / learners.ranks / wire


def turns_s(gpu: GpuKind, engine_bytes: float, trainer_bytes: float, assumed: Assumptions = ASSUMED) -> float:
    """Seconds of one change from generating to learning and back, where both share a GPU: all states of both out and in."""
    return 2 * (engine_bytes + trainer_bytes) / (gpu.host * assumed.link)
