"""Under which address and over which network interface the processes of a node talk, and where they listen: there and nowhere else.

Gloo resolves the host name, which on many machines is the loopback, and then other hosts cannot reach it; NCCL guesses; vLLM
looks for a route to the internet. All take the interface that carries the address under which Ray knows the node, unless the
user has said otherwise.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import psutil

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
GLOO, NCCL, VLLM = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"
INTERFACES = (GLOO, NCCL, VLLM)


def interface_of(address: str) -> str | None:
    """Name of this machine's interface that carries the address; None if it has none (behind address translation)."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def choose_interfaces(address: str, several_nodes: bool) -> None:
    """Set gloo's interface and vLLM's address, and in a cluster of several nodes and on the loopback NCCL's interface, in this process's
    environment, before its first collective. Child processes inherit them. What is set already stays.

    Args:
        address: of this node in the cluster.
    """
    name = interface_of(address)
    if name is None:
        return
    os.environ.setdefault(GLOO, name)
    os.environ.setdefault(VLLM, address)
    if several_nodes or address == LOOPBACK:
        os.environ.setdefault(NCCL, f"={name}")  # without the sign it is a prefix: eth1 is eth10 too


def free_port() -> int:
    """A TCP port that nobody listens on now, on the host of the caller."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def host_address() -> str:
    """The address under which other hosts of the cluster reach this one.

    In a Ray process it is the address that Ray itself uses; elsewhere the loopback, because there is no other host.
    """
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else LOOPBACK


def listener(host: str, port: int = 0) -> socket.socket:
    """A socket that listens at this address and no other, or, if it is none of this machine (behind address translation), at all.

    Args:
        host: this machine's, a name or an address.
        port: 0: any that is free.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(place)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            bound.bind(("", port))
        bound.listen()
    except OSError:
        bound.close()
        raise
    return bound


def open_store(
    host: str, port: int, timeout: timedelta, *, serves: bool, world_size: int | None = None, wait: bool = False
) -> TCPStore:
    """torch's key-value store at this place. It knows no secret: who reaches the place reads and writes it. torch itself would serve it on
    every interface; here its address is the only one.

    Args:
        serves: whether this process holds the store; the others connect.
        world_size: how many processes use it.
        wait: return when all of them are there.

    Raises:
        RuntimeError: it cannot be served or reached in time (torch.distributed's own errors derive from it).
    """
    from torch.distributed import TCPStore

    descriptor = None
    if serves:
        try:
            descriptor = listener(host, port).detach()  # the store closes it
        except OSError as error:
            raise RuntimeError(f"nothing can listen at {host}:{port} ({error})") from error
    return TCPStore(host, port, world_size, serves, timeout, wait_for_workers=wait, master_listen_fd=descriptor)


SCHEME = "rlhf"


def meeting_place(host: str, port: int) -> str:
    """torch.distributed's `init_method` for a group that meets at a store of ours (`open_store`), served by its rank 0."""
    from torch.distributed.rendezvous import register_rendezvous_handler

    with suppress(RuntimeError):  # it is registered
        register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://{host}:{port}" if ":" not in host else f"{SCHEME}://[{host}]:{port}"


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[TCPStore, int, int]]:
    place = urlsplit(url)
    rank, size = (int(parse_qs(place.query)[name][0]) for name in ("rank", "world_size"))
    host, port = str(place.hostname), int(place.port or 0)
    yield open_store(host, port, timeout, serves=rank == 0, world_size=size, wait=True), rank, size
    raise RuntimeError("a group that has met cannot meet again at the same place")
