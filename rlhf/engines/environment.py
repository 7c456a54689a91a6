"""How vLLM runs inside an actor, or in the driver in debug mode: who runs its workers, and what its processes need in their
environment. One rule for the rollout's engines and for an LLM judge. Written for vLLM 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rlhf.cluster.devices import memory_env, spans_nodes
from rlhf.config.cluster import ClusterSettings


def executor(devices: int) -> str | None:
    """Who runs the workers of an engine with so many devices. Inside a placement group vLLM would choose Ray by itself, which
    wants bundles of one GPU and is only for engines that span nodes (designed, not yet run on a GPU)."""
    if devices == 1:
        return None
    return "ray" if spans_nodes() else "mp"


def engine_environment(cluster: ClusterSettings, devices: int, local: bool) -> dict[str, str]:
    """Environment variables that an engine's processes need before their first import, all but those about its CPU threads.

    Args:
        devices: of the engine.
        local: in the driver's process, whose environment they then are; so they concern vLLM alone.
    """
    quiet = "ERROR" if local else "WARNING"  # in debug mode vLLM writes between the lines of a debugger
    env = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", quiet),
        "VLLM_NO_USAGE_STATS": "1",
        # By default each engine pins its threads to the first cores, so that two engines would share one core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if devices == 1:
        # On CPU vLLM would give an only worker a process of its own, and spin on a second core while that one computes.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env if local else env | memory_env(cluster)


@contextmanager
def environment_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, and for processes that are started inside, these variables are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def built_for_cpu() -> bool:
    """Whether the vLLM that is installed here runs on CPUs. Imports it, so its environment must be set before."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
