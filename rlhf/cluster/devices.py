"""Which devices the roles compute on, and which of them share: pure answers from the settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from rlhf.config.cluster import ClusterSettings
from rlhf.config.settings import Settings

CPU_MALLOC = {"hugetlb": 1, "mmap_threshold": 2**25, "trim_threshold": 2**33}
"""glibc's settings for actors that compute on CPU; thresholds in bytes."""
SHARED_BY = "RLHF_CORES_SHARED_BY"
"""Set in an actor's process: how many actors of its role share the cores of its node."""
SPANS_NODES = "RLHF_SPANS_NODES"
"""Set in the process of an engine whose devices lie on several nodes."""


def uses_gpu(settings: ClusterSettings) -> bool:
    """Whether models run on GPUs: as `cluster.device` says, or, for `auto`, whether this process sees one."""
    if settings.device != "auto":
        return settings.device == "cuda"
    import torch

    return torch.cuda.is_available()


def shared_engines(settings: Settings, debug: bool) -> frozenset[int]:
    """Indices of the engines that use GPUs of policy ranks, in turns with them. Without GPUs there are none.

    Args:
        debug: all roles in one process, on one GPU.
    """
    if not uses_gpu(settings.cluster):
        return frozenset()
    if debug or settings.cluster.placement == "colocated":
        return frozenset(range(settings.rollout.engines))
    return frozenset(range(settings.cluster.colocated_engines or 0))


def shared_rewards(settings: Settings, debug: bool) -> bool:
    """Whether the reward servers' models lie on GPUs of policy ranks, in turns with them: where engines do, unless `reward.gpus` gives
    them their own. An LLM judge's engine never shares.

    Args:
        debug: all roles in one process, on one GPU.
    """
    colocated = settings.cluster.placement == "colocated" and settings.reward.gpus == 0
    return loads_reward_model(settings) and uses_gpu(settings.cluster) and (debug or colocated)


def loads_reward_model(settings: Settings) -> bool:
    """Whether reward servers load a model themselves, other than an LLM judge's engine."""
    return any(source.known.by == "model" for _, source in settings.reward.sources())


def takes_turns(settings: Settings, debug: bool) -> bool:
    """Whether some engines must sleep while the policy works."""
    return bool(shared_engines(settings, debug))


def spans_nodes() -> bool:
    """Asked in an engine's own process: whether its devices lie on several nodes."""
    return SPANS_NODES in os.environ


def threads_env(settings: ClusterSettings, actors: int) -> dict[str, str]:
    """Environment that gives an actor its CPU threads: `cluster.threads`, or its share of the cores of the node it comes to.

    Args:
        actors: of its role, which share these cores. Where the runtime has placed them it counts those of the node instead.
    """
    return {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {SHARED_BY: str(actors)}


def share(cores: int, actors: int) -> int:
    """Of so many cores, what each of so many actors gets."""
    return max(1, cores // actors)


def own_share(environ: Mapping[str, str], actors: int = 1) -> int:
    """Cores of this node for this process, asked in the actor's own.

    Args:
        actors: among how many they are divided where the runtime has not said so.
    """
    return share(len(os.sched_getaffinity(0)), int(environ.get(SHARED_BY, actors)))


def claim_threads(environ: MutableMapping[str, str]) -> None:
    """Make the share that `threads_env` promises the number of threads: in the actor's own process, before anything computes."""
    if SHARED_BY in environ:
        environ["OMP_NUM_THREADS"] = str(own_share(environ))


def compute_env(settings: ClusterSettings, actors: int) -> dict[str, str]:
    """Environment of an actor that trains or generates: its CPU threads (see `threads_env`), and how it handles memory on a CPU."""
    return threads_env(settings, actors) | memory_env(settings)


def memory_env(settings: ClusterSettings) -> dict[str, str]:
    """The part of it that is not about threads."""
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if not uses_gpu(settings):
        # Keep freed memory, in huge pages: a training step on CPU otherwise spends a fifth of its time in page faults.
        env["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in CPU_MALLOC.items())
    return env
