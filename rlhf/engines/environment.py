"""How vLLM runs inside an actor, or in the driver in debug mode: who runs its workers, and what its processes need in their
environment. One rule for the rollout's engines and for an LLM judge. Written for vLLM 0.32; imports nothing of it.
"""

from __future__ import annotations

import os

from rlhf.cluster.devices import spans_nodes


def executor(devices: int) -> str | None:
    """Who runs the workers of an engine with so many devices. Inside a placement group vLLM would choose Ray by itself, which
    wants bundles of one GPU and is only for engines that span nodes (designed, not yet run on a GPU)."""
    if devices == 1:
        return None
    return "ray" if spans_nodes() else "mp"


def process_environment(devices: int, local: bool) -> dict[str, str]:
    """Environment variables that the engine's processes need before their first import.

    Args:
        local: in the driver's process, whose environment they then are.
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
    return env
