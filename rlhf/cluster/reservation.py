"""A placement made real in Ray: one bundle per actor, held for the whole run, each pinned to its node.

Talks to Ray alone. Every wait has a deadline, and says when it expires who waited for what.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.cluster.calls import DeadlineExpired
from rlhf.cluster.devices import SPANS_NODES
from rlhf.cluster.placement import CannotPlace, Placement, Seat
from rlhf.cluster.resources import Node, actor_name, role_of
from rlhf.config.cluster import Role
from rlhf.config.loader import UserError

TOUCH = 0.001
"""How much of a node's custom resource an actor takes: next to nothing, because it says which node, not how much of it."""


def cluster_nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    return [_node(entry) for entry in ray.nodes() if entry["Alive"]]


def _node(entry: Mapping[str, Any]) -> Node:
    resources = entry["Resources"]
    ordinary = ("CPU", "GPU", "memory", "object_store_memory")
    return Node(
        id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        gpus=int(resources.get("GPU", 0)),
        cpus=int(resources.get("CPU", 0)),
        resources=frozenset(
            name for name in resources if name not in ordinary and not name.startswith(("node:", "accelerator_type:"))
        ),
        host=entry["NodeManagerHostname"],
    )


@dataclass(frozen=True)
class _Bundle:
    """What is held on one node for one actor, or for one device of an engine that spans nodes.

    Attributes:
        device: which one of them; else 0.
    """

    actor: str
    seat: Seat
    node: Node
    device: int = 0

    def resources(self) -> dict[str, float]:
        gpus = 1.0 if self.seat.workers else self.seat.gpus
        held = {"CPU": 1.0} | ({"GPU": gpus} if gpus else {})
        return held | ({self.seat.needs: TOUCH} if self.seat.needs else {})


class Reservation:
    """The bundles of one run, held from the constructor's return until `release`."""

    def __init__(self, placement: Placement, free_deadline_s: float, answer_deadline_s: float):
        """
        Args:
            free_deadline_s: longest wait for what other users of the cluster hold.
            answer_deadline_s: longest wait for a process on a node to start and answer.

        Raises:
            CannotPlace: others still hold what is needed.
            DeadlineExpired: a node has not answered.
        """
        self.placement = placement
        self._answer_deadline_s = answer_deadline_s
        self._groups: list[Any] = []
        self._bundles: dict[_Bundle, Any] = {}  # -> Ray's scheduling strategy
        seats = placement.seats.items()
        # One group for all, so that two runs never hold one half each. An engine that spans nodes has its own, as vLLM wants.
        groups = [[_Bundle(name, seat, seat.node) for name, seat in seats if not seat.workers]]
        groups += [
            [_Bundle(name, seat, node, device) for device, node in enumerate(seat.workers)]
            for name, seat in seats
            if seat.workers
        ]
        for bundles in groups:
            self._hold(bundles)
        if not all(group.wait(free_deadline_s) for group in self._groups):
            raise CannotPlace(self._not_free(free_deadline_s))
        self._shared_gpus = self._ask_for_gpus()

    def _hold(self, bundles: Sequence[_Bundle]) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        pinned = [{"ray.io/node-id": bundle.node.id} for bundle in bundles]
        group = placement_group([bundle.resources() for bundle in bundles], bundle_label_selector=pinned)
        self._groups.append(group)
        for index, bundle in enumerate(bundles):
            self._bundles[bundle] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)

    def _not_free(self, deadline_s: float) -> str:
        import ray

        free = ray.available_resources()
        self.release()
        return (
            f"the driver waited {deadline_s:g} s (`cluster.placement_deadline_s`) for CPUs and GPUs that the cluster has and others "
            f"hold; free are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs. `ray list actors` shows by whom. Wanted: "
            + "; ".join(self.placement.lines())
        )

    def _ask_for_gpus(self) -> dict[int, str]:
        """Rank -> its GPU on its node, for ranks that share it."""
        ranks = {actor_name("policy", rank): rank for seat in self.placement.seats.values() for rank in seat.shares}
        bundles = [bundle for bundle in self._bundles if bundle.actor in ranks]
        answers = self._ask([(bundle, 1, _my_gpu, ()) for bundle in bundles])
        return {ranks[bundle.actor]: gpu for bundle, gpu in zip(bundles, answers, strict=True)}

    def check_files(self, files: Mapping[Role, Mapping[str, str]]) -> None:
        """Make sure that every node can read what its roles will read, before anything is loaded.

        Args:
            files: role -> field of the settings -> path.

        Raises:
            UserError: a file is not there.
            DeadlineExpired: a node has not answered.
        """
        held = self._held()
        wanted = {node: _files_for(bundles, files) for node, bundles in held.items()}
        questions = [(held[node][0], 0, _unreadable, (list(wanted[node].values()),)) for node in held]
        for node, unreadable in zip(held, self._ask(questions), strict=True):
            for name, path in wanted[node].items():
                if path in unreadable:
                    actors = ", ".join(dict.fromkeys(bundle.actor for bundle in held[node]))
                    raise UserError(
                        f"`{name}`: {path} cannot be read on node {node.address}, where {actors} would run. Put it on a file system "
                        "that all nodes mount at the same place, copy it there on each node, or keep the role off that node with "
                        "`cluster.node_resources`"
                    )

    def ask_nodes(self, roles: Collection[Role], question: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Address of each node that holds one of these roles -> what `question(*args)` returns in a process there.

        Raises:
            DeadlineExpired: a node has not answered.
        """
        asked = {
            node: next(bundle for bundle in bundles if role_of(bundle.actor) in roles)
            for node, bundles in self._held().items()
            if any(role_of(bundle.actor) in roles for bundle in bundles)
        }
        answers = self._ask([(bundle, 0, question, args) for bundle in asked.values()])
        return {node.address: answer for node, answer in zip(asked, answers, strict=True)}

    def _held(self) -> dict[Node, list[_Bundle]]:
        held: dict[Node, list[_Bundle]] = {}
        for bundle in self._bundles:
            held.setdefault(bundle.node, []).append(bundle)
        return held

    def _ask(self, questions: Sequence[tuple[_Bundle, float, Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        """Answers of (bundle, GPUs, function, arguments), each called by a process in its bundle."""
        import ray

        answers = [
            ray.remote(function)
            .options(num_cpus=0, num_gpus=gpus, scheduling_strategy=self._bundles[bundle])
            .remote(*arguments)
            for bundle, gpus, function, arguments in questions
        ]
        if not answers:
            return []
        _, silent = ray.wait(answers, num_returns=len(answers), timeout=self._answer_deadline_s)
        if silent:
            nodes = dict.fromkeys(
                bundle.node.address for (bundle, *_), ref in zip(questions, answers, strict=True) if ref in silent
            )
            raise DeadlineExpired(
                f"the driver waited {self._answer_deadline_s:g} s for a first process on {', '.join(nodes)}. Is this package installed "
                "there, in the same Python? Ray's logs on that node say why its workers end: session_latest/logs in /tmp/ray, or in "
                "/tmp/rlhf-UID/ray where the run itself or hosts.sh has started it"
            )
        return ray.get(answers)

    def options(self, actor: str) -> dict[str, Any]:
        """Ray's options for starting an actor in its seat."""
        seat = self.placement.seats[actor]
        bundle = next(bundle for bundle in self._bundles if bundle.actor == actor)
        return {"num_cpus": 1, "num_gpus": seat.gpus, "scheduling_strategy": self._bundles[bundle]}

    def env(self, actor: str) -> dict[str, str]:
        """Environment variables that tell an actor of its seat what Ray itself would not."""
        seat = self.placement.seats[actor]
        if seat.workers:
            return {SPANS_NODES: "1"}
        if seat.gpus:
            return {}
        gpus = ",".join(self._shared_gpus[rank] for rank in seat.shares)
        return {"CUDA_VISIBLE_DEVICES": gpus, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}

    def release(self) -> None:
        """Give everything back."""
        from ray.util.placement_group import remove_placement_group

        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()


def _files_for(bundles: Sequence[_Bundle], files: Mapping[Role, Mapping[str, str]]) -> dict[str, str]:
    """Field -> path of what the roles of these bundles read."""
    actors = [bundle.actor for bundle in bundles]
    roles = [role for role in files if role in map(role_of, actors)]
    return {name: path for role in roles for name, path in files[role].items()}


def _my_gpu() -> str:
    import ray

    (gpu,) = ray.get_gpu_ids()
    return str(gpu)


def _unreadable(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not os.access(path, os.R_OK)]
