"""How many actors of each sort go to which node: a search over counts, exhaustive but for clusters beyond all measure.

Nodes are visited in order, and each takes as much as it can, the policy first; where that leads nowhere, it takes less.
States that led nowhere are remembered, and a state for which the nodes left are too few in sum is not entered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlhf.cluster.resources import Node, ResourceRequest
from rlhf.config.cluster import Role

DEAD_ENDS = 20_000
"""After so many the search gives up: a second or so."""


class Load(NamedTuple):
    """Actors, on one node or still to be placed.

    Attributes:
        shared: engines on GPUs of this node's ranks.
        engines: with GPUs of their own; single devices of engines, where these may span nodes.
    """

    ranks: int
    shared: int
    engines: int
    servers: int


def pack(request: ResourceRequest, nodes: Sequence[Node], spanning: bool = False) -> list[Load] | None:
    """A load for each node, which together hold everybody; None if there is none.

    Args:
        spanning: engines with GPUs of their own may be divided among nodes.
    """
    size = 1 if spanning else request.devices
    own = (request.engines - request.shared) * request.devices // size
    everybody = Load(request.ranks, request.shared, own, request.servers)
    search = _Search(request, nodes, size)
    if request.policy_nodes is not None:
        return search.fill(0, everybody, request.policy_nodes)
    found = search.fill(0, everybody, len(nodes))
    fewer = 0 if found is None else sum(load.ranks > 0 for load in found)
    for count in range(min(1, request.ranks), fewer):
        better = search.fill(0, everybody, count)
        if better is not None:
            return better
    return found


class _Search:
    """One question, whose dead ends are remembered.

    Args:
        size: GPUs of an engine.
    """

    def __init__(self, request: ResourceRequest, nodes: Sequence[Node], size: int):
        self._request, self._nodes, self._size = request, nodes, size
        self._even = request.policy_nodes is not None
        self._failed: set[tuple[int, Load, int]] = set()
        # What the nodes from each one on offer in sum: places for ranks, for engines, GPUs, CPUs.
        self._sums = [(0, 0, 0, 0)]
        for node in reversed(nodes):
            offers = (self._places(node, "policy", 1), self._places(node, "rollout", size), node.gpus, node.cpus)
            ranks, engines, gpus, cpus = (a + b for a, b in zip(offers, self._sums[-1], strict=True))
            self._sums.append((ranks, engines, gpus, cpus))
        self._sums.reverse()
        self._most_ranks = max((self._places(node, "policy", 1) for node in nodes), default=0)

    def fill(self, at: int, left: Load, policy_nodes: int) -> list[Load] | None:
        """Loads for the nodes from number `at` on that hold all who are left, with at most so many policy nodes."""
        if at == len(self._nodes):
            return None if any(left) else []
        if not self._even:
            policy_nodes = min(policy_nodes, len(self._nodes) - at)
        state = (at, left, policy_nodes)
        if state in self._failed or len(self._failed) > DEAD_ENDS or self._too_many(at, left, policy_nodes):
            return None
        for load in self._loads(self._nodes[at], left, policy_nodes):
            still_left = Load(*(a - b for a, b in zip(left, load, strict=True)))
            rest = self.fill(at + 1, still_left, policy_nodes - (load.ranks > 0))
            if rest is not None:
                return [load, *rest]
        self._failed.add(state)
        return None

    def _too_many(self, at: int, left: Load, policy_nodes: int) -> bool:
        rank_places, engine_places, gpus, cpus = self._sums[at]
        return (
            left.ranks > min(rank_places, policy_nodes * self._most_ranks)
            or left.engines > engine_places
            or sum(left) > cpus
            or (self._request.gpu and left.ranks + left.engines * self._size > gpus)
        )

    def _loads(self, node: Node, left: Load, policy_nodes: int) -> Iterator[Load]:
        """What this node can take, the most first."""
        request = self._request
        for ranks in self._rank_counts(node, left.ranks, policy_nodes):
            shared_most = min(left.shared, ranks // request.devices, node.cpus - ranks)
            for shared in _down(shared_most if request.allowed("rollout", node) else 0):
                gpus, cpus = node.gpus - ranks, node.cpus - ranks - shared
                own_most = min(left.engines, gpus // self._size if request.gpu else cpus, cpus)
                for engines in _down(own_most if request.allowed("rollout", node) else 0):
                    free = gpus - engines * self._size
                    servers = min(left.servers, cpus - engines, servers_on(free, request.server_gpus, left.servers))
                    if request.shared_servers:
                        servers = min(servers, ranks)
                    yield Load(ranks, shared, engines, servers if request.allowed("reward", node) else 0)

    def _rank_counts(self, node: Node, left: int, policy_nodes: int) -> Iterator[int]:
        most = self._places(node, "policy", 1)
        if left and policy_nodes:
            if self._even:
                part, more = divmod(left, policy_nodes)
                wanted = [part + 1, part] if 0 < more < policy_nodes else [part]
            else:
                wanted = list(range(min(left, most), 0, -1))
            yield from (count for count in wanted if 0 < count <= most)
        yield 0

    def _places(self, node: Node, role: Role, size: int) -> int:
        if not self._request.allowed(role, node):
            return 0
        return min(node.gpus // size, node.cpus) if self._request.gpu else node.cpus


def servers_on(gpus: int, each: float, most: int) -> int:
    """Reward servers that so many free GPUs hold; a server's fraction is never divided between two GPUs."""
    if each == 0:
        return most
    if each >= 1:
        return int(gpus // each)
    return gpus * int(1 / each + 1e-9)


def _down(most: int) -> range:
    return range(most, -1, -1)
