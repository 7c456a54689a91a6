"""Which actor runs on which node, with which GPUs: decided before anything starts, or refused in words.

Pure: knows the request and the nodes, not Ray (that is `reservation`), and gives the same answer to the same question. The rules:
- An engine lies within one node, unless it fits nowhere and `rollout.straddle_nodes` allows more.
- An engine that shares the policy's GPUs sits on as many ranks of one node as it has devices.
- The policy takes as few nodes as possible, or `cluster.policy_nodes`, evenly. Its ranks are numbered node by node.
- Reward servers fill what is left, several on a GPU where they want fractions; or each sits on the GPU of a rank.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf.cluster.packing import Load, pack
from rlhf.cluster.refusal import refusal
from rlhf.cluster.resources import Node, ResourceRequest, actor_name, role_of
from rlhf.config.loader import UserError


class CannotPlace(UserError):
    """The nodes do not offer what the roles want; the message says what is missing and what would help."""


@dataclass(frozen=True)
class Seat:
    """Where one actor runs.

    Attributes:
        node: of the actor itself.
        gpus: reserved for it alone. A fraction shares one GPU with other seats.
        shares: the policy ranks whose GPUs it uses instead.
        workers: node of each of its devices, for an engine that spans nodes; else empty.
        needs: the custom resource that its node offers for it.
    """

    node: Node
    gpus: float = 0.0
    shares: tuple[int, ...] = ()
    workers: tuple[Node, ...] = ()
    needs: str | None = None


@dataclass(frozen=True)
class Placement:
    """A seat for every actor, by name (`policy-0`, `rollout-0`, `reward-0`), in the order in which they take GPUs.

    Attributes:
        overlap: ranks and engines compute at the same time.
    """

    seats: Mapping[str, Seat]
    overlap: bool = False

    def neighbours(self, actor: str) -> list[str]:
        """The actors on its node that compute when it does, itself among them: those of its role, or ranks and engines if these overlap."""
        role, node = role_of(actor), self.seats[actor].node
        busy = {"policy", "rollout"} if self.overlap and role in ("policy", "rollout") else {role}
        return [name for name, seat in self.seats.items() if role_of(name) in busy and seat.node == node]

    def lines(self) -> list[str]:
        """What runs where: one line per node."""
        nodes = dict.fromkeys(node for seat in self.seats.values() for node in (seat.node, *seat.workers))
        return [f"{node.address}: {', '.join(self._on(node))}" for node in nodes]

    def _on(self, node: Node) -> Iterator[str]:
        for name, seat in self.seats.items():
            if seat.workers:
                count = seat.workers.count(node)
                if count:
                    yield f"{name} ({count} of its {len(seat.workers)} GPUs)"
            elif seat.node == node:
                shared = " and ".join(actor_name("policy", rank) for rank in seat.shares)
                own = f"{seat.gpus:g} GPU{'s' if seat.gpus > 1 else ''}" if seat.gpus else ""
                words = f"on the GPU{'s' if len(seat.shares) > 1 else ''} of {shared}" if shared else own
                yield f"{name} ({words})" if words else name


def place(request: ResourceRequest, nodes: Sequence[Node]) -> Placement:
    """A seat for every actor. If there is a way, it is found.

    Raises:
        CannotPlace: there is none.
    """
    nodes = sorted(nodes, key=_by_address)
    loads = pack(request, nodes)
    spanning = loads is None and request.straddle
    if spanning:
        loads = pack(request, nodes, spanning=True)
    if loads is None:
        raise CannotPlace(refusal(request, nodes))
    return Placement(_seats(request, list(zip(nodes, loads, strict=True)), spanning), request.overlap)


def _seats(request: ResourceRequest, loads: Sequence[tuple[Node, Load]], spanning: bool) -> dict[str, Seat]:
    needs = request.needs.get
    seats: dict[str, Seat] = {}
    rank_gpus = 1.0 if request.gpu else 0.0
    for rank, node in enumerate(node for node, load in loads for _ in range(load.ranks)):
        seats[actor_name("policy", rank)] = Seat(node, rank_gpus, needs=needs("policy"))
    for engine, seat in enumerate(_engines(request, loads, spanning)):
        seats[actor_name("rollout", engine)] = seat
    for server, (node, rank) in enumerate(_server_places(loads)):
        shares = (rank,) if request.shared_servers else ()
        seats[actor_name("reward", server)] = Seat(node, request.server_gpus, shares, needs=needs("reward"))
    return seats


def _server_places(loads: Sequence[tuple[Node, Load]]) -> Iterator[tuple[Node, int]]:
    """Of each reward server its node, and the rank there whose GPU it would share."""
    first = 0  # of the node's ranks
    for node, load in loads:
        yield from ((node, first + server) for server in range(load.servers))
        first += load.ranks


def _engines(request: ResourceRequest, loads: Sequence[tuple[Node, Load]], spanning: bool) -> Iterator[Seat]:
    """Those that share first."""
    size, need = request.devices, request.needs.get("rollout")
    first = 0  # of the node's ranks
    for node, load in loads:
        for engine in range(load.shared):
            start = first + engine * size
            yield Seat(node, shares=tuple(range(start, start + size)), needs=need)
        first += load.ranks
    places = [node for node, load in loads for _ in range(load.engines)]
    if spanning:
        for start in range(0, len(places), size):
            workers = tuple(places[start : start + size])
            yield Seat(workers[0], workers=workers, needs=need)
    else:
        yield from (Seat(node, float(size if request.gpu else 0), needs=need) for node in places)


def _by_address(node: Node) -> tuple[int, int, str, str]:
    """10.0.0.9 comes before 10.0.0.10, and names after numbers."""
    try:
        return (0, int(ipaddress.ip_address(node.address)), "", node.id)
    except ValueError:
        return (1, 0, node.address, node.id)
