"""Why a run cannot be placed, in words: what is wanted, what there is, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from rlhf.cluster.packing import servers_on
from rlhf.cluster.resources import Node, ResourceRequest
from rlhf.config.cluster import Role

SHOWN = 8
"""Nodes that a message lists."""


def refusal(request: ResourceRequest, nodes: Sequence[Node]) -> str:
    """The most telling reason, followed by the nodes that there are."""
    reason = next(_reasons(request, nodes))
    return f"{reason}. The cluster has {_nodes(nodes)}"


def _reasons(request: ResourceRequest, nodes: Sequence[Node]) -> Iterator[str]:
    """From the plainest to the least: the first one that holds is told."""
    allowed = {role: [node for node in nodes if request.allowed(role, node)] for role in get_args(Role)}
    for role, resource in request.needs.items():
        if not allowed[role]:
            yield (
                f"`cluster.node_resources`: no node offers the resource `{resource}`, which {role} asks for. Start a node with "
                f"`ray start --resources '{{\"{resource}\": 1}}'`, or remove the entry"
            )
    yield from _engines(request, allowed["rollout"], allowed["policy"])
    yield from _policy(request, allowed["policy"])
    yield from _sums(request, nodes)
    if request.shared_servers:
        both = {node for node in allowed["reward"] if node in allowed["policy"]}
        if not both:
            yield (
                "`cluster.node_resources`: reward models share the policy's GPUs, and no node may hold both. Remove an entry, or give "
                "the reward servers GPUs of their own (`reward.gpus`)"
            )
    for role, count in (("policy", request.ranks), ("rollout", request.engines), ("reward", request.servers)):
        sizes = {"policy": 1, "rollout": request.devices, "reward": request.server_gpus}[role]
        yield from _alone(request, role, count, sizes, allowed[role])
    yield (
        f"the roles fit one by one, but not together: {_wanted(request)}. Lower `rollout.tensor_parallel_size`, `policy.ranks` or "
        "`cluster.policy_nodes`, relax `cluster.node_resources`, or add a node"
    )


def _engines(request: ResourceRequest, rollout: Sequence[Node], policy: Sequence[Node]) -> Iterator[str]:
    size = request.devices
    if not request.gpu:
        return
    if request.shared:
        both = [node for node in rollout if node in policy]
        if max((node.gpus for node in both), default=0) < size:
            yield (
                f"`rollout.tensor_parallel_size`: an engine that shares GPUs with the policy wants {size} policy ranks in one "
                f"node, the nodes have {_gpus(both)} GPUs. Lower it, or set `cluster.placement: disaggregated`"
            )
    if request.engines > request.shared and not request.straddle:
        if max((node.gpus for node in rollout), default=0) < size:
            yield (
                f"`rollout.tensor_parallel_size`: an engine wants {size} GPU{'s' if size > 1 else ''} in one node, the nodes have "
                f"{_gpus(rollout)}. Lower it, add a node with {size} GPUs, or let engines span nodes with "
                "`rollout.straddle_nodes: true`"
            )


def _policy(request: ResourceRequest, nodes: Sequence[Node]) -> Iterator[str]:
    spread, sort = request.policy_nodes, "GPU" if request.gpu else "CPU"
    if spread is None or not request.ranks:
        return
    each = request.ranks // spread
    able = [node for node in nodes if (node.gpus if request.gpu else node.cpus) >= each]
    if len(able) < spread:
        yield (
            f"`cluster.policy_nodes`: {request.ranks} ranks (`policy.ranks`) on {spread} nodes want {each} {sort}s on each, and "
            f"{len(able)} of the nodes have so many. Lower one of the two, or add nodes"
        )


def _sums(request: ResourceRequest, nodes: Sequence[Node]) -> Iterator[str]:
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    own = (request.engines - request.shared) * request.devices
    wanted = request.ranks + own + request.servers * request.server_gpus
    if request.gpu and wanted > gpus:
        parts = [f"{request.ranks} for the policy (`policy.ranks`)"] if request.ranks else []
        if own:
            sharing = f" - {request.shared} that share" if request.shared else ""
            parts.append(f"{own} for engines (`rollout.engines` {request.engines}{sharing}, of {request.devices} each)")
        if request.server_gpus:
            parts.append(f"{request.servers} x {request.server_gpus:g} for reward servers (`reward.servers`)")
        yield (
            f"the run wants {wanted:g} GPUs, the nodes have {gpus}: {', '.join(parts)}. Lower them, add nodes, or let engines share "
            "the policy's GPUs with `cluster.placement: colocated`"
        )
    actors = request.ranks + request.engines + request.servers
    if actors > cpus:
        yield (
            f"the run has {actors} actors, which take a CPU each, and the nodes offer {cpus}. Lower `policy.ranks`, "
            "`rollout.engines` or `reward.servers`, or start the nodes with `ray start --num-cpus N`: it is a count of places, "
            "not a limit on threads"
        )


def _alone(request: ResourceRequest, role: Role, count: int, size: float, nodes: Sequence[Node]) -> Iterator[str]:
    """One role does not fit, even if it had its nodes to itself."""
    if not request.gpu or (role == "rollout" and (request.shared or request.straddle)):
        places = sum(node.cpus for node in nodes)
    else:
        places = sum(min(node.cpus, servers_on(node.gpus, size, count)) for node in nodes)
    if places < count:
        need = request.needs.get(role)
        where = f"the {len(nodes)} nodes that offer `{need}`" if need else "the nodes"
        each = f" with {size:g} GPUs each" if request.gpu and size else ""
        yield f"{role} wants {count} actors{each}, and {where} hold {places}. Lower their number or size, or add a node"


def _wanted(request: ResourceRequest) -> str:
    sort = "GPU" if request.gpu else "CPU"
    spread = f" evenly on {request.policy_nodes} nodes" if request.policy_nodes else ""
    shared = f", {request.shared} of them on the policy's" if request.shared else ""
    servers = f" with {request.server_gpus:g} GPUs each" if request.server_gpus else ""
    servers += ", each on the GPU of another policy rank" if request.shared_servers else ""
    return (
        f"{request.ranks} policy ranks{spread}, {request.engines} engines of {request.devices} {sort}(s) in one node{shared}, "
        f"{request.servers} reward servers{servers}"
    )


def _gpus(nodes: Sequence[Node]) -> str:
    return " + ".join(str(node.gpus) for node in nodes) or "none"


def _nodes(nodes: Sequence[Node]) -> str:
    if not nodes:
        return "no nodes"
    shown = [f"{node.address} ({node.gpus} GPUs, {node.cpus} CPUs{_offers(node)})" for node in nodes[:SHOWN]]
    more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
    return ", ".join(shown) + more


def _offers(node: Node) -> str:
    return "".join(f", {name}" for name in sorted(node.resources))
