"""Run as a program: a Ray cluster of several nodes with GPUs that do not exist, and what actors see in their seats on it.

Prints one JSON object: name of a question -> what each actor reports, or the words with which the question was refused.
A process of its own, because a process belongs to one Ray cluster at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from rlhf.cluster import RayRuntime, ResourceRequest
from rlhf.cluster.devices import spans_nodes
from rlhf.config.cluster import ClusterSettings
from rlhf.config.loader import UserError

# GPUs and custom resources of each node. All nodes have this machine's address, so they are told apart by their ids.
NODES = ((4, {}), (4, {}), (2, {"judge": 1}))
DEADLINE_S = 240.0


class Witness:
    """Says where it is and what it sees."""

    def report(self) -> dict[str, Any]:
        import ray

        return {
            "node": ray.get_runtime_context().get_node_id(),
            "gpus": [int(gpu) for gpu in ray.get_gpu_ids()],
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "folder": os.getcwd(),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
            "group": [bundle.get("GPU", 0) for bundle in ray.util.get_current_placement_group().bundle_specs],
            "spans": spans_nodes(),
        }


def ask(settings: ClusterSettings, request: ResourceRequest, **files: str) -> dict[str, Any] | str:
    """What an actor in each seat reports, or the words with which the question was refused."""
    runtime = RayRuntime(settings, actors=0)
    try:
        placement = runtime.reserve(request)
        runtime.check_files({"rollout": files})
        handles = {name: runtime.start(name, Witness)() for name in placement.seats}

        async def reports() -> list[Any]:
            calls = (handle.ask(Witness.report, deadline=DEADLINE_S)() for handle in handles.values())
            return await asyncio.gather(*calls)

        return dict(zip(handles, asyncio.run(reports()), strict=True))
    except UserError as error:
        return str(error)
    finally:
        runtime.stop()


def asked(settings: ClusterSettings, request: ResourceRequest) -> dict[str, str]:
    """What the nodes of the engines answer."""
    runtime = RayRuntime(settings, actors=0)
    try:
        runtime.reserve(request)
        return runtime.ask_nodes(("rollout",), node_id)
    finally:
        runtime.stop()


def node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    ids = [cluster.add_node(num_cpus=8, num_gpus=gpus, resources=extra).node_id for gpus, extra in NODES]
    settings = ClusterSettings(
        address=cluster.address, device="cuda", startup_deadline_s=DEADLINE_S, placement_deadline_s=DEADLINE_S
    )
    own = ResourceRequest(
        gpu=True, ranks=2, engines=1, servers=2, devices=4, server_gpus=0.5, needs={"reward": "judge"}
    )
    answers: dict[str, Any] = {
        "nodes": ids,
        "disaggregated": ask(settings, own, model=os.getcwd()),
        "colocated": ask(settings, ResourceRequest(gpu=True, ranks=2, engines=1, shared=1, servers=0, devices=2)),
        "mixed": ask(settings, ResourceRequest(gpu=True, ranks=2, engines=2, shared=1, servers=1, policy_nodes=2)),
        "spanning": ask(settings, ResourceRequest(gpu=True, ranks=1, engines=1, servers=0, devices=6, straddle=True)),
        "8 in 4 + 4": ask(settings, ResourceRequest(gpu=True, ranks=1, engines=1, servers=1, devices=8)),
        "unreadable": ask(
            settings, ResourceRequest(gpu=True, ranks=1, engines=1, servers=0), **{"policy.model": "/no/model"}
        ),
    }
    answers["asked"] = asked(settings, own)
    unsaid = settings.model_copy(update={"device": "auto"})
    answers["auto on a host without GPU"] = ask(unsaid, ResourceRequest(gpu=False, ranks=1, engines=1, servers=1))
    ray.init(address=cluster.address, log_to_driver=False)
    others = ray.util.placement_group([{"GPU": 1}] * 4, name="others", lifetime="detached")  # outlives this connection
    ray.get(others.ready(), timeout=DEADLINE_S)
    ray.shutdown()
    impatient = settings.model_copy(update={"placement_deadline_s": 0.5})
    answers["held by others"] = ask(impatient, ResourceRequest(gpu=True, ranks=8, engines=1, servers=0))
    json.dump(answers, sys.stdout)
    cluster.shutdown()


if __name__ == "__main__":
    main()
