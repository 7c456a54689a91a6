"""Why a run cannot be placed, in words: what is wanted, what there is, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from rlhf.cluster.packing import servers_on
from rlhf.cluster.wishes import Node, Wishes
from rlhf.config.cluster import Role

SHOWN = 8
"""Nodes that a message lists."""


def refusal(wishes: Wishes, nodes: Sequence[Node]) -> str:
    """The most telling reason, followed by the nodes that there are."""
    reason = next(_reasons(wishes, nodes))
    return f"{reason}. The cluster has {_nodes(nodes)}"


def _reasons(wishes: Wishes, nodes: Sequence[Node]) -> Iterator[str]:
    """From the plainest to the least: the first one that holds is told."""
    allowed = {role: [node for node in nodes if wishes.allowed(role, node)] for role in get_args(Role)}
    for role, resource in wishes.needs.items():
        if not allowed[role]:
            yield (
                f"`cluster.node_resources`: no node offers the resource `{resource}`, which {role} asks for. Start a node with "
                f"`ray start --resources '{{\"{resource}\": 1}}'`, or remove the entry"
            )
    yield from _engines(wishes, allowed["rollout"], allowed["policy"])
    yield from _policy(wishes, allowed["policy"])
    yield from _sums(wishes, nodes)
    if wishes.shared_servers:
        both = {node for node in allowed["reward"] if node in allowed["policy"]}
        if not both:
            yield (
                "`cluster.node_resources`: reward models share the policy's GPUs, and no node may hold both. Remove an entry, or give "
                "the reward servers GPUs of their own (`reward.gpus`)"
            )
    for role, count in (("policy", wishes.ranks), ("rollout", wishes.engines), ("reward", wishes.servers)):
        sizes = {"policy": 1, "rollout": wishes.devices, "reward": wishes.server_gpus}[role]
        yield from _alone(wishes, role, count, sizes, allowed[role])
    yield (
        f"the roles fit one by one, but not together: {_wanted(wishes)}. Lower `rollout.tensor_parallel_size`, `policy.ranks` or "
        "`cluster.policy_nodes`, relax `cluster.node_resources`, or add a node"
    )


def _engines(wishes: Wishes, rollout: Sequence[Node], policy: Sequence[Node]) -> Iterator[str]:
    size = wishes.devices
    if not wishes.gpu:
        return
    if wishes.shared:
        both = [node for node in rollout if node in policy]
        if max((node.gpus for node in both), default=0) < size:
            yield (
                f"`rollout.tensor_parallel_size`: an engine that shares GPUs with the policy wants {size} policy ranks in one "
                f"node, the nodes have {_gpus(both)} GPUs. Lower it, or set `cluster.placement: disaggregated`"
            )
    if wishes.engines > wishes.shared and not wishes.straddle:
        if max((node.gpus for node in rollout), default=0) < size:
            yield (
                f"`rollout.tensor_parallel_size`: an engine wants {size} GPU{'s' if size > 1 else ''} in one node, the nodes have "
                f"{_gpus(rollout)}. Lower it, add a node with {size} GPUs, or let engines span nodes with "
                "`rollout.straddle_nodes: true`"
            )


def _policy(wishes: Wishes, nodes: Sequence[Node]) -> Iterator[str]:
    spread, sort = wishes.policy_nodes, "GPU" if wishes.gpu else "CPU"
    if spread is None or not wishes.ranks:
        return
    each = wishes.ranks // spread
    able = [node for node in nodes if (node.gpus if wishes.gpu else node.cpus) >= each]
    if len(able) < spread:
        yield (
            f"`cluster.policy_nodes`: {wishes.ranks} ranks (`policy.ranks`) on {spread} nodes want {each} {sort}s on each, and "
            f"{len(able)} of the nodes have so many. Lower one of the two, or add nodes"
        )


def _sums(wishes: Wishes, nodes: Sequence[Node]) -> Iterator[str]:
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    own = (wishes.engines - wishes.shared) * wishes.devices
    wanted = wishes.ranks + own + wishes.servers * wishes.server_gpus
    if wishes.gpu and wanted > gpus:
        parts = [f"{wishes.ranks} for the policy (`policy.ranks`)"] if wishes.ranks else []
        if own:
            sharing = f" - {wishes.shared} that share" if wishes.shared else ""
            parts.append(f"{own} for engines (`rollout.engines` {wishes.engines}{sharing}, of {wishes.devices} each)")
        if wishes.server_gpus:
            parts.append(f"{wishes.servers} x {wishes.server_gpus:g} for reward servers (`reward.servers`)")
        yield (
            f"the run wants {wanted:g} GPUs, the nodes have {gpus}: {', '.join(parts)}. Lower them, add nodes, or let engines share "
            "the policy's GPUs with `cluster.placement: colocated`"
        )
    actors = wishes.ranks + wishes.engines + wishes.servers
    if actors > cpus:
        yield (
            f"the run has {actors} actors, which take a CPU each, and the nodes offer {cpus}. Lower `policy.ranks`, "
            "`rollout.engines` or `reward.servers`, or start the nodes with `ray start --num-cpus N`: it is a count of places, "
            "not a limit on threads"
        )


def _alone(wishes: Wishes, role: Role, count: int, size: float, nodes: Sequence[Node]) -> Iterator[str]:
    """One role does not fit, even if it had its nodes to itself."""
    if not wishes.gpu or (role == "rollout" and (wishes.shared or wishes.straddle)):
        places = sum(node.cpus for node in nodes)
    else:
        places = sum(min(node.cpus, servers_on(node.gpus, size, count)) for node in nodes)
    if places < count:
        need = wishes.needs.get(role)
        where = f"the {len(nodes)} nodes that offer `{need}`" if need else "the nodes"
        each = f" with {size:g} GPUs each" if wishes.gpu and size else ""
        yield f"{role} wants {count} actors{each}, and {where} hold {places}. Lower their number or size, or add a node"


def _wanted(wishes: Wishes) -> str:
    sort = "GPU" if wishes.gpu else "CPU"
    spread = f" evenly on {wishes.policy_nodes} nodes" if wishes.policy_nodes else ""
    shared = f", {wishes.shared} of them on the policy's" if wishes.shared else ""
    servers = f" with {wishes.server_gpus:g} GPUs each" if wishes.server_gpus else ""
    servers += ", each on the GPU of another policy rank" if wishes.shared_servers else ""
    return (
        f"{wishes.ranks} policy ranks{spread}, {wishes.engines} engines of {wishes.devices} {sort}(s) in one node{shared}, "
        f"{wishes.servers} reward servers{servers}"
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
