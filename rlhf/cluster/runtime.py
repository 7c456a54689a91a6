"""Starting actors: in Ray, or in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from rlhf.cluster.handles import Handle, LocalHandle, RayHandle
from rlhf.config.cluster import ClusterSettings

CPU_MALLOC = {"hugetlb": 1, "mmap_threshold": 2**25, "trim_threshold": 2**33}
"""glibc's settings for actors that compute on CPU; thresholds in bytes."""


def uses_gpu(settings: ClusterSettings) -> bool:
    """Whether models run on GPUs: as `cluster.device` says, or, for `auto`, whether this process sees one."""
    if settings.device != "auto":
        return settings.device == "cuda"
    import torch

    return torch.cuda.is_available()


def compute_env(settings: ClusterSettings, actors: int) -> dict[str, str]:
    """Environment of an actor that computes: its CPU threads, of which `actors` actors of the same role share the cores."""
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // actors)
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if not uses_gpu(settings):
        # Keep freed memory, in huge pages: a training step on CPU otherwise spends a fifth of its time in page faults.
        env["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in CPU_MALLOC.items())
    return env


class Runtime(Protocol):
    """A place where actors can be started."""

    local: bool

    def start(self, name: str, cls: type, *args: Any, gpus: float = 0, env: Mapping[str, str] | None = None) -> Handle:
        """Start `cls(*args)` under `name`. Returns before the constructor has run; ask the actor whether it is ready.

        Args:
            gpus: devices to reserve, in GPUs.
            env: environment variables the actor's process needs before its first import.
        """
        ...

    def stop(self) -> None:
        """End all actors started here."""
        ...


class RayRuntime:
    """Actors are Ray actors: on a cluster that is running, or on one started here for this run alone."""

    local = False

    def __init__(self, settings: ClusterSettings, actors: int):
        """
        Args:
            actors: how many will be started; a cluster of our own offers at least so many CPU slots, because the roles of
                a synchronous loop take turns on the cores.
        """
        import ray

        self._ray = ray
        self._actors: list[Any] = []
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
        if settings.address is None:
            options |= {"address": "local", "num_cpus": max(actors, os.cpu_count() or 1), "include_dashboard": False}
        else:
            options["address"] = settings.address
        ray.init(**options)

    def start(self, name: str, cls: type, *args: Any, gpus: float = 0, env: Mapping[str, str] | None = None) -> Handle:
        options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": dict(env or {})}}
        actor = self._ray.remote(cls).options(**options).remote(*args)
        self._actors.append(actor)
        return RayHandle(name, actor)

    def stop(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        self._ray.shutdown()


class LocalRuntime:
    """All roles in this process, one after the other: debug mode."""

    local = True

    def __init__(self) -> None:
        self._targets: list[Any] = []

    def start(self, name: str, cls: type, *args: Any, gpus: float = 0, env: Mapping[str, str] | None = None) -> Handle:
        os.environ.update(env or {})
        target = cls(*args)
        self._targets.append(target)
        return LocalHandle(name, target)

    def stop(self) -> None:
        for target in reversed(self._targets):
            close = getattr(target, "close", None)
            if close is not None:
                close()
        self._targets.clear()
