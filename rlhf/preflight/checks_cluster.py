"""The nodes of a Ray cluster together: reachable, alike, with open ports, able to reduce and broadcast, and reading the same files.

One probe runs on every node, and on every GPU where there are some. The judgements are pure functions of what the probes report.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar, TypeVarTuple

from rlhf.cluster.calls import method_of
from rlhf.cluster.network import choose_interfaces, listener, meeting_place
from rlhf.cluster.own_ray import own_ray
from rlhf.cluster.signals import sigterm_kept_from_ray
from rlhf.config.cluster import ClusterSettings
from rlhf.preflight.checks_host import HostFacts, look
from rlhf.preflight.finding import Finding

Arguments = ParamSpec("Arguments")
Own = TypeVarTuple("Own")
Result = TypeVar("Result")

DEADLINE_S = 120.0
"""Longest wait for all probes to answer one question."""
MESSAGE = {"gloo": 64 * 2**20, "nccl": 1024 * 2**20}
"""Bytes of the tensor that is reduced and broadcast."""
SLOW = {"gloo": 0.05e9, "nccl": 1e9}
"""Bytes per second below which a collective is called slow."""


class Unreachable(Exception):
    """Ray's cluster cannot be used; the finding says why."""

    def __init__(self, finding: Finding):
        super().__init__(finding.seen)
        self.finding = finding


class Probe:
    """Runs on a node and answers questions about it."""

    def __init__(self, several_nodes: bool):
        import ray

        self._address = ray.util.get_node_ip_address()
        choose_interfaces(self._address, several_nodes)
        self._listener: socket.socket | None = None

    def facts(self) -> HostFacts:
        """What this node has."""
        return look()

    def unreadable(self, paths: Sequence[str]) -> list[str]:
        """Those of the paths that this node cannot read."""
        return [path for path in paths if not os.access(path, os.R_OK)]

    def listen(self) -> tuple[str, int]:
        """Open a free port and name it."""
        self._listener = listener(self._address)
        return self._address, self._listener.getsockname()[1]

    def unreached(self, places: Sequence[tuple[str, int]]) -> list[str]:
        """Those of the places that take no connection from here."""
        failed = []
        for host, port in places:
            try:
                socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                failed.append(f"{self._address} -> {host}:{port} ({error.strerror or error})")
        return failed

    def rendezvous(self) -> tuple[str, int]:
        """Where the others find the first probe: its address and a port that is free now."""
        from rlhf.cluster.network import free_port

        return self._address, free_port()

    def collective(self, backend: str, rank: int, world: int, place: tuple[str, int]) -> Collective:
        """Reduce and broadcast once for the connection, then three times for the clock. Collective over all probes."""
        import torch
        import torch.distributed as dist

        meeting, deadline = meeting_place(*place), timedelta(seconds=DEADLINE_S)
        dist.init_process_group(backend, meeting, rank=rank, world_size=world, timeout=deadline)
        device = "cuda" if backend == "nccl" else "cpu"
        tensor = torch.empty(MESSAGE[backend] // 4, device=device)

        def timed(work: Callable[[torch.Tensor], Any]) -> float:
            dist.barrier()
            start = time.perf_counter()
            work(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        def broadcast(what: torch.Tensor) -> None:
            dist.broadcast(what, 0)

        tensor.fill_(rank + 1)
        timed(dist.all_reduce)
        right = bool((tensor == world * (world + 1) / 2).all())
        tensor.fill_(rank + 1)
        timed(broadcast)
        right = right and bool((tensor == 1).all())
        tensor.zero_()
        times = [min(timed(work) for _ in range(3)) for work in (dist.all_reduce, broadcast)]
        dist.destroy_process_group()
        return Collective(world, MESSAGE[backend], times[0], times[1], right)


@dataclass(frozen=True)
class Collective:
    """What one probe measured.

    Attributes:
        size: bytes of the tensor.
        right: every number was what it should be.
    """

    world: int
    size: int
    reduce_s: float
    broadcast_s: float
    right: bool


@dataclass
class Team:
    """The probes, in the order of the nodes, and what their cluster is."""

    probes: list[Any]
    nodes: int
    gpus: int

    def ask(self, method: Callable[Concatenate[Probe, Arguments], Result]) -> Callable[Arguments, list[Result]]:
        """A function that asks every probe the same question: one answer from each.

        Raises (when called):
            RayError: a probe failed, died or (its subclass GetTimeoutError) did not answer within `DEADLINE_S`.
        """

        def asked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> list[Result]:
            return self._answers([method_of(probe, method).remote(*args, **kwargs) for probe in self.probes])

        return asked

    def ask_each(self, method: Callable[[Probe, *Own], Result], each: Sequence[tuple[*Own]]) -> list[Result]:
        """As `ask`, but every probe gets arguments of its own."""
        pairs = zip(self.probes, each, strict=True)
        return self._answers([method_of(probe, method).remote(*own) for probe, own in pairs])

    def _answers(self, calls: list[Any]) -> list[Any]:
        import ray

        return ray.get(calls, timeout=DEADLINE_S)


def check_address(address: str | None) -> Finding | None:
    """A quick look at whether anything listens, before Ray tries for minutes; None if it looks right."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return None
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        return Finding(
            "Ray",
            "failed",
            f"nothing answers at {address}: {error.strerror or error}",
            "start the head with `ray start --head --port=...`, correct `cluster.address`, or open the port in the firewall; "
            "`cluster.address: null` starts a cluster on this machine",
        )
    return None


@contextmanager
def team(settings: ClusterSettings) -> Iterator[Team]:
    """Probes on the cluster that the settings name, or on one of their own on this machine; all ended on the way out.

    Raises:
        Unreachable: Ray cannot be used.
    """
    import ray

    silent = check_address(settings.address)
    if silent is not None:
        raise Unreachable(silent)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    try:
        with sigterm_kept_from_ray():
            if settings.address is None:
                own_ray(**options)
            else:
                ray.init(address=settings.address, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise Unreachable(
            Finding(
                "Ray",
                "failed",
                f"cannot join `cluster.address` {settings.address}: {str(error).splitlines()[0]}",
                "see that the head runs (`ray status`), that both sides have the same Ray and Python versions, and that this shell has "
                "RAY_AUTH_MODE=token and the head's token file (~/.ray/auth_token)",
            )
        ) from error
    probes: list[Any] = []
    try:
        yield _start_probes(probes)
    finally:
        for probe in probes:
            ray.kill(probe)
        ray.shutdown()


def _start_probes(probes: list[Any]) -> Team:
    """One probe per GPU; on nodes without, one per node, and two if there is only one node, so that there is something to reduce.

    Args:
        probes: receives them as they start, so that the caller can end them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    total = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    for node in nodes:
        count = int(node["Resources"].get("GPU", 0)) if total else 2 if len(nodes) == 1 else 1
        for _ in range(count):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            kind = ray.remote(Probe).options(num_cpus=0, num_gpus=1 if total else 0, scheduling_strategy=where)
            probes.append(kind.remote(len(nodes) > 1))
    return Team(probes, len(nodes), total)


def check_ray(found: Team, address: str | None) -> Finding:
    """Which cluster it is."""
    where = "a cluster started on this machine" if address is None else f"the cluster at {address}"
    return Finding("Ray", "ok", f"{where}: {found.nodes} node(s), {found.gpus} GPU(s)")


def check_ports(unreached: Sequence[str], places: int) -> Finding:
    """Free ports of every node take connections from every other one: weight transfer and gradients need them."""
    if not unreached:
        return Finding("ports", "ok", f"{places} free port(s), each reached from every node")
    return Finding(
        "ports",
        "failed",
        "; ".join(unreached[:4]) + (f" and {len(unreached) - 4} more" if len(unreached) > 4 else ""),
        "open the ports between the nodes (Ray's worker ports and the ephemeral range, /proc/sys/net/ipv4/ip_local_port_range), and "
        "see that `ray start --node-ip-address` names an address that the others reach",
    )


def check_collective(backend: str, nodes: int, measured: Sequence[Collective]) -> Finding:
    """All-reduce and broadcast over all probes: right, and not too slow."""
    world, size = measured[0].world, measured[0].size
    reduce_s, broadcast_s = max(one.reduce_s for one in measured), max(one.broadcast_s for one in measured)
    rates = 2 * (world - 1) / world * size / reduce_s, size / broadcast_s
    seen = (
        f"{backend}, {size / 2**20:.0f} MiB over {world} processes on {nodes} node(s): all-reduce {rates[0] / 1e9:.2f} GB/s, "
        f"broadcast {rates[1] / 1e9:.2f} GB/s"
    )
    if not all(one.right for one in measured):
        return Finding(
            "collectives",
            "failed",
            f"{seen}, but the result is wrong",
            "this is a fault of hardware or drivers: run `nccl-tests` on each node by itself to find it, and try NCCL_P2P_DISABLE=1",
        )
    if min(rates) < SLOW[backend]:
        return Finding(
            "collectives",
            "warning",
            f"{seen}; less than {SLOW[backend] / 1e9:g} GB/s",
            "see which interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO) and that InfiniBand or RoCE is found "
            "(NCCL_IB_HCA); keep the policy's ranks in few nodes (`cluster.policy_nodes`)",
        )
    return Finding("collectives", "ok", seen)


def broken_collective(backend: str, error: BaseException) -> Finding:
    """The probes could not talk to each other."""
    return Finding(
        "collectives",
        "failed",
        f"{backend}: {str(error).splitlines()[-1]}",
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that carries the node's address, and open the ports between the "
        "nodes; NCCL_DEBUG=INFO says more",
    )


def check_readable(unreadable: dict[str, list[str]], count: int) -> Finding:
    """Model and data are where every node looks for them.

    Args:
        unreadable: host -> paths that it cannot read.
        count: paths that were looked for.
    """
    if not any(unreadable.values()):
        return Finding("files", "ok", f"{count} path(s) readable on {len(unreadable)} node(s)")
    words = "; ".join(f"{host}: {', '.join(paths)}" for host, paths in unreadable.items() if paths)
    return Finding(
        "files",
        "failed",
        f"not readable on {words}",
        "put models and data on a file system that all nodes mount at the same path, or copy them to every node",
    )
