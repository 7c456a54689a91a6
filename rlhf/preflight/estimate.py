"""A run on a cluster, estimated: memory of each role, whether it fits the GPUs, and the time of a step.

Joins `memory` (what is needed), `cluster.gpus` (what there is) and `speed` (how long). Pure: settings and shapes in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.algorithms import Algorithm, PolicyGradient
from rlhf.cluster.devices import shared_engines, shared_rewards
from rlhf.cluster.gpus import GpuKind
from rlhf.config import Settings
from rlhf.config.checks import largest_assignment
from rlhf.config.method_checks import used_responses
from rlhf.preflight.memory import (
    BYTES,
    GIB,
    EngineMemory,
    PolicyMemory,
    engine_memory,
    policy_memory,
    trained_parameters,
)
from rlhf.preflight.speed import Learners, StepTime, Work, gather_s, generate_s, learn_s, publish_s, turns_s
from rlhf.training.shapes import ModelShape
from rlhf.transfer.choice import backend_of

CONTEXT = 1.5 * GIB
"""Assumed: what each process takes of a GPU before any tensor: CUDA's context, NCCL's and cuBLAS's buffers."""
FRAGMENTATION = 0.08
"""Assumed: what torch's allocator holds beside the tensors themselves, as a share of them."""
ENGINE_WORKING = 2 * GIB
"""Assumed: vLLM's activations and captured graphs, inside its share of the GPU."""
JUDGE_WORKING = 2 * GIB
"""Assumed: activations of a reward model, without gradients, at its largest batch."""
ASLEEP = 0.5 * GIB
"""Assumed: what a sleeping engine keeps beside its context."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: GpuKind

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Estimate:
    """What a layout needs of each device and how long a step takes on it.

    Attributes:
        judge: bytes of a reward server's models, where they share the rank's device in turns; else 0.
        loading: bytes of a policy rank's device at the peak while it loads its models; nothing shares it yet.
        learning: bytes of a policy rank's device at the peak, everything that shares it included.
        generating: bytes of an engine's device at the peak, everything that shares it included.
        cache: tokens that one engine's key-value cache holds.
        sequences: of full length that it holds.
        problems: why it does not fit, in words; empty if it does.
    """

    policy: PolicyMemory
    engine: EngineMemory
    judge: float
    loading: float
    learning: float
    generating: float
    cache: int
    sequences: int
    time: StepTime
    problems: tuple[str, ...]


def work_of(settings: Settings, algorithm: Algorithm) -> Work:
    """One step of these settings, at the limits."""
    objective = algorithm.objective
    return Work(
        prompts=settings.loop.prompts_per_step,
        prompt=settings.data.max_prompt_tokens,
        response=settings.rollout.max_tokens,
        sampled=sum(source.n for source in algorithm.sources),
        learned=used_responses(settings.algorithm),
        updates=settings.loop.updates_per_step,
        epochs=settings.loop.epochs_per_step,
        micro_batch=settings.policy.micro_batch_tokens,
        at_once=settings.rollout.max_num_seqs,
        models=1 + algorithm.mixes,
        critic=isinstance(objective, PolicyGradient) and objective.critic is not None,
    )


def estimate(
    settings: Settings, shape: ModelShape, algorithm: Algorithm, cluster: Cluster, judge: float = 0.0
) -> Estimate:
    """This layout on this cluster, whose GPUs it must not exceed (`propose.seats` knows).

    Args:
        judge: bytes of a reward server's models.
    """
    gpu, rollout = cluster.gpu, settings.rollout
    need = policy_memory(
        shape,
        settings.policy,
        algorithm,
        settings.data.eval_prompts is not None,
        largest_assignment(settings),
        gpu=True,
    )
    engine = engine_memory(shape, rollout, settings.policy, algorithm.mixes)
    shared = bool(shared_engines(settings, debug=False))
    judging = shared_rewards(settings, debug=False)
    judge = judge if judging else 0.0
    learning = need.device * (1 + FRAGMENTATION) + CONTEXT + (CONTEXT + ASLEEP if shared else 0) + judging * CONTEXT
    loading = need.loaded * (1 + FRAGMENTATION) + CONTEXT
    reserved = rollout.gpu_memory_utilization * gpu.memory
    others = engine.arriving + (need.staying * (1 + FRAGMENTATION) + need.publishing + CONTEXT if shared else 0)
    generating = reserved + others + CONTEXT
    generating += judging * (judge * (1 + FRAGMENTATION) + JUDGE_WORKING + CONTEXT)
    cache = engine.room(reserved - engine.weights - ENGINE_WORKING)
    length = settings.data.max_prompt_tokens + rollout.max_tokens
    problems = tuple(_problems(settings, cluster, engine, (loading, learning, generating), cache // length))
    time = _time(settings, shape, algorithm, cluster, engine, need, max(cache, length), judge)
    return Estimate(need, engine, judge, loading, learning, generating, cache, cache // length, time, problems)


def _problems(
    settings: Settings, cluster: Cluster, engine: EngineMemory, peaks: tuple[float, float, float], sequences: int
) -> Iterator[str]:
    """Why it does not fit, from the peaks of loading, learning and generating, and how many sequences an engine's cache holds."""
    memory, (loading, learning, generating) = cluster.gpu.memory, peaks
    if loading > memory:
        yield f"while its models are loaded, a policy rank needs {_gb(loading)} of {_gb(memory)}"
    if learning > memory:
        yield f"a policy rank needs {_gb(learning)} of {_gb(memory)}"
    share = settings.rollout.gpu_memory_utilization
    if sequences < 1:
        yield (
            f"`rollout.gpu_memory_utilization` {share:g} gives an engine {_gb(share * memory)} of each GPU, but its weights take "
            f"{_gb(engine.weights)} of that, and no sequence of full length fits beside them"
        )
    elif generating > memory:
        yield (
            f"while engines generate, {_gb(generating)} of {_gb(memory)} are needed: {_gb(share * memory)} for vLLM "
            f"(`rollout.gpu_memory_utilization` {share:g}), the rest for weights on their way and what shares the GPU"
        )


def _time(
    settings: Settings,
    shape: ModelShape,
    algorithm: Algorithm,
    cluster: Cluster,
    engine: EngineMemory,
    need: PolicyMemory,
    room: int,
    judge: float,
) -> StepTime:
    rollout, policy, gpu, work = settings.rollout, settings.policy, cluster.gpu, work_of(settings, algorithm)
    size, sent = BYTES[policy.dtype if rollout.dtype == "policy" else rollout.dtype], BYTES[policy.dtype]
    devices = rollout.tensor_parallel_size
    spans = math.ceil(devices / cluster.gpus_per_node)
    learners = Learners(
        ranks=policy.ranks,
        zero_stage=policy.zero_stage,
        checkpointing=policy.gradient_checkpointing,
        offloaded_optimizer=policy.offload_optimizer != "none",
        offloaded_weights=policy.offload_parameters != "none",
        nodes=math.ceil(policy.ranks / cluster.gpus_per_node),
        trained=trained_parameters(shape, policy) / shape.parameters,
    )
    shared = shared_engines(settings, debug=False)
    backend = backend_of(settings, local=False, gpu=True)
    moved = need.resident - min(need.resident, need.staying) + judge
    published = sent * _published(shape, settings)
    return StepTime(
        generate=generate_s(shape, gpu, work, rollout.engines, devices, room, size, spans) if work.sampled else 0.0,
        learn=learn_s(shape, gpu, work, learners, sent),
        publish=gather_s(published, gpu, learners) + publish_s(published, gpu, cluster.nodes == 1, backend),
        turns=turns_s(gpu, engine.weights if rollout.sleep_level == 1 else 0, moved) if shared else 0.0,
        ahead=settings.loop.staleness > 0,
    )


def _published(shape: ModelShape, settings: Settings) -> int:
    """Numbers that travel to each worker."""
    policy = settings.policy
    as_adapter = policy.lora.rank > 0 and policy.lora.publish == "adapter"
    return trained_parameters(shape, policy) if as_adapter else shape.parameters


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
