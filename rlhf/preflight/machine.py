"""Whether this machine, or the cluster that is named, has what a run asks for: GPUs, memory, disk. Nothing is started and Ray is not asked.

Each check raises a `PlanError` that names the fields, or returns what was seen in words.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from rlhf.algorithms import Algorithm
from rlhf.cluster.devices import shared_engines, uses_gpu
from rlhf.config import Settings
from rlhf.config.checks import largest_assignment
from rlhf.config.sft import SftSettings
from rlhf.data.model_folder import size_of
from rlhf.preflight.checks_cluster import check_address
from rlhf.preflight.checks_host import SHARED_MEMORY, check_disk
from rlhf.preflight.finding import PlanError
from rlhf.preflight.memory import BYTES, GIB, engine_memory, policy_memory, trained_parameters
from rlhf.training.shapes import ModelShape

PADDED_ROWS = 64
"""vLLM rounds the vocabulary up to a multiple of this before it divides it."""


def check_machine(settings: Settings, debug: bool) -> Iterator[str]:
    """GPUs and shared memory of this machine, or the address of the cluster that takes its place. A line for each thing seen."""
    cluster = settings.cluster
    if cluster.address is not None and not debug:
        yield _check_address(cluster.address)
        return
    if uses_gpu(cluster):
        _check_gpus(settings, 1 if debug else _devices(settings))
    else:
        _check_no_gpus(settings)
    if not debug:
        yield from _shared_memory()


def check_rank_devices(settings: SftSettings, debug: bool) -> Iterator[str]:
    """The same for a supervised run."""
    if settings.cluster.address is not None and not debug:
        yield _check_address(settings.cluster.address)
        return
    visible, ranks = torch.cuda.device_count(), settings.policy.ranks
    if uses_gpu(settings.cluster) and visible < ranks:
        raise PlanError(
            f"`policy.ranks`: {ranks} rank(s) need a GPU each, and this machine shows {visible}. Lower `policy.ranks`, join a cluster with "
            "`cluster.address`, or set `cluster.device: cpu`"
        )
    if not debug:
        yield from _shared_memory()


def check_tensor_parallel(config: Any, size: int, field: str, model: str) -> None:
    """Whether vLLM can divide a model over so many devices: it refuses sizes that do not divide evenly, but only after minutes.

    Args:
        config: transformers' configuration of the model.
        field: that gives the number of devices.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    shared = size_of(text, "num_key_value_heads") or heads
    feedforward = size_of(text, "intermediate_size")
    rows = -(-text.vocab_size // PADDED_ROWS) * PADDED_ROWS

    def uneven(devices: int) -> list[str]:
        parts = (
            ("attention heads", heads, heads % devices == 0),
            ("key-value heads", shared, shared % devices == 0 or devices % shared == 0),
            ("numbers in the feed-forward block", feedforward, feedforward is None or feedforward % devices == 0),
            (f"rows of the embedding (padded to a multiple of {PADDED_ROWS})", rows, rows % devices == 0),
        )
        return [f"{count} {what}" for what, count, even in parts if not even]

    if wrong := uneven(size):
        possible = [str(n) for n in (1, 2, 4, 8, 16, 32) if not uneven(n)]
        raise PlanError(
            f"`{field}`: {size} devices cannot share the {' and the '.join(wrong)} of `{model}` evenly. Set it to one of "
            f"{', '.join(possible)}"
        )


def check_memory(settings: Settings, shape: ModelShape, algorithm: Algorithm) -> str:
    """Whether all ranks and engines fit into the memory of this machine, where they run on its CPUs."""
    evaluates = settings.data.eval_prompts is not None
    need = policy_memory(shape, settings.policy, algorithm, evaluates, largest_assignment(settings), gpu=False)
    engine = engine_memory(shape, settings.rollout, settings.policy, algorithm.mixes, gpu=False)
    ranks = settings.policy.ranks * need.device
    engines = settings.rollout.engines * (engine.weights + settings.rollout.cpu_kv_cache_gb * GIB)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    seen = f"all ranks and engines: {size_in_words(ranks + engines)}; this machine has {size_in_words(machine)}"
    if ranks + engines > machine and settings.cluster.address is None:
        raise PlanError(
            f"`policy.ranks`, `rollout.engines`: {settings.policy.ranks} rank(s) take about {size_in_words(ranks)} and "
            f"{settings.rollout.engines} engine(s) {size_in_words(engines)}, and this machine has {size_in_words(machine)}. Lower them, "
            "`rollout.cpu_kv_cache_gb` or `policy.micro_batch_tokens`, or take a smaller `policy.model`"
        )
    return f"{seen}: {'fits' if ranks + engines <= machine else 'DOES NOT FIT into this one'}"


def check_room(settings: Settings | SftSettings, shape: ModelShape, updates: int, resume: bool) -> str:
    """Whether the disk of `run.dir` holds the checkpoints and the export.

    Args:
        updates: steps of the run, after which a checkpoint can be due.
    """
    finding = check_disk(settings.run.dir, kept_on_disk(settings, shape, updates, resume))
    if finding.state == "failed":
        raise PlanError(f"`run.dir`: {finding.seen}. To put it right, {finding.remedy}")
    return f"disk: {finding.seen}"


def kept_on_disk(settings: Settings | SftSettings, shape: ModelShape, steps: int, resume: bool = False) -> float:
    """Bytes of the checkpoints that a run keeps, one more while it is written, and its export.

    Args:
        resume: those that it keeps are there already.
    """
    size, checkpoint = BYTES[settings.policy.dtype], settings.checkpoint
    state = trained_parameters(shape, settings.policy) * (size + 12)
    models = 2 if getattr(getattr(settings, "algorithm", None), "name", "") == "ppo" else 1
    made = -(-steps // checkpoint.every) if checkpoint.every else 0
    copies = min(made, 1 if resume else checkpoint.keep + 1) * models
    return state * copies + (shape.parameters * size if checkpoint.export else 0)


def size_in_words(size: float) -> str:
    """Bytes, for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _devices(settings: Settings) -> int:
    """GPUs of all engines that have their own, policy ranks and reward servers together."""
    rollout, reward = settings.rollout, settings.reward
    engines = rollout.engines - len(shared_engines(settings, debug=False))
    return engines * rollout.tensor_parallel_size + settings.policy.ranks + math.ceil(reward.servers * reward.gpus)


def _check_gpus(settings: Settings, needed: int) -> None:
    visible = torch.cuda.device_count()
    if visible < needed:
        engines = settings.rollout.engines - len(shared_engines(settings, debug=False))
        raise PlanError(
            f"the run needs {needed} GPU(s): {engines} x {settings.rollout.tensor_parallel_size} for engines with GPUs of their "
            f"own (`rollout.engines` x `rollout.tensor_parallel_size`), {settings.policy.ranks} for `policy.ranks` and "
            f"{settings.reward.servers} x {settings.reward.gpus:g} for `reward.servers` x `reward.gpus`, but this machine shows "
            f"{visible}. Lower them, let engines share the policy's GPUs (`cluster.placement: colocated`), join a cluster with "
            "`cluster.address`, use `--debug` (all roles on one GPU), or set `cluster.device: cpu`"
        )


def _check_no_gpus(settings: Settings) -> None:
    """What only GPUs can give, where `cluster.device: auto` finds none."""
    asked = {
        "reward.gpus": settings.reward.gpus > 0,
        "rollout.transfer": settings.rollout.transfer in ("nccl", "ipc"),
    }
    if settings.cluster.device == "auto" and (fields := [f"`{field}`" for field, wanted in asked.items() if wanted]):
        raise PlanError(
            f"{', '.join(fields)}: this is for GPUs, and with `cluster.device: auto` the run is on CPUs: this machine shows no GPU. "
            "Remove it, or join a cluster that has some with `cluster.address`"
        )


def _shared_memory() -> Iterator[str]:
    """A warning where Ray's object store would go to the disk."""
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free) < SHARED_MEMORY:
        yield (
            f"/dev/shm: {size_in_words(free)} free, less than {size_in_words(SHARED_MEMORY)}: Ray's object store may fall back to the disk "
            "(in a container: `--shm-size=16g`)"
        )


def _check_address(address: str) -> str:
    """The cluster's address in words, after something has answered there."""
    silent = check_address(address)
    if silent is not None:
        raise PlanError(f"`cluster.address`: {silent.seen}. To put it right, {silent.remedy}")
    return f"cluster `{address}`: its GPUs, memory and disks are not looked at from here; `rlhf doctor` does"
