"""What a run asks of a cluster for its roles, and what a node offers. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.cluster.devices import shared_engines, shared_rewards, uses_gpu
from rlhf.config.cluster import Role
from rlhf.config.settings import Settings


def actor_name(role: Role, index: int) -> str:
    """The name of a role's actor, such as policy-0: in placements, messages and `Runtime.start`."""
    return f"{role}-{index}"


def role_of(actor: str) -> str:
    """The role in an actor's name."""
    return actor.partition("-")[0]


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        address: under which other nodes reach it.
        resources: names of the custom resources that it offers.
        host: its name.
    """

    id: str
    address: str
    gpus: int
    cpus: int
    resources: frozenset[str] = frozenset()
    host: str = ""


@dataclass(frozen=True)
class ResourceRequest:
    """What a run asks for its roles. Each actor takes one CPU besides.

    Attributes:
        gpu: whether ranks and engines run on GPUs.
        policy_nodes: over which the ranks are spread evenly; None: as few as possible.
        shared: how many of the engines use GPUs of policy ranks; they are the first ones.
        devices: of each engine.
        straddle: an engine may span nodes.
        server_gpus: of each reward server: a fraction, or a whole number.
        shared_servers: each reward server uses the GPU of a policy rank, another one's each.
        needs: role -> the custom resource that a node must offer for it.
        overlap: ranks and engines compute at the same time (`loop.staleness`), so that they divide the cores of a node.
    """

    gpu: bool
    ranks: int
    engines: int
    servers: int
    policy_nodes: int | None = None
    shared: int = 0
    devices: int = 1
    straddle: bool = False
    server_gpus: float = 0.0
    shared_servers: bool = False
    needs: Mapping[Role, str] = field(default_factory=dict)
    overlap: bool = False

    def allowed(self, role: Role, node: Node) -> bool:
        """Whether the node may be used for this role."""
        return role not in self.needs or self.needs[role] in node.resources


def resource_request(settings: Settings, policy: bool = True) -> ResourceRequest:
    """What a run with these settings asks for.

    Args:
        policy: False: engines and reward servers alone, which then share with nobody.
    """
    rollout, reward, cluster = settings.rollout, settings.reward, settings.cluster
    gpu = uses_gpu(cluster)
    return ResourceRequest(
        overlap=settings.loop.staleness > 0,
        gpu=gpu,
        ranks=settings.policy.ranks if policy else 0,
        engines=rollout.engines,
        servers=reward.servers,
        policy_nodes=cluster.policy_nodes if policy else None,
        shared=len(shared_engines(settings, debug=False)) if policy else 0,
        devices=rollout.tensor_parallel_size if gpu else 1,
        straddle=rollout.straddle_nodes and gpu,
        server_gpus=reward.gpus if gpu else 0.0,
        shared_servers=policy and shared_rewards(settings, debug=False),
        needs=cluster.node_resources,
    )
