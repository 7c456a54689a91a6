"""Under which address and over which network interface the processes of a node talk.

Gloo resolves the host name, which on many machines is the loopback, and then other hosts cannot reach it; NCCL guesses; vLLM
looks for a route to the internet. All take the interface that carries the address under which Ray knows the node, unless the
user has said otherwise.
"""

from __future__ import annotations

import os
import socket

import psutil

GLOO, NCCL, VLLM = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"


def interface_of(address: str) -> str | None:
    """Name of this machine's interface that carries the address; None if it has none (behind address translation)."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def choose_interfaces(address: str, several_nodes: bool) -> None:
    """Set gloo's interface and vLLM's address, and in a cluster of several nodes NCCL's interface, in this process's environment,
    before its first collective. Child processes inherit them. What is set already stays.

    Args:
        address: of this node in the cluster.
    """
    name = interface_of(address)
    if name is None:
        return
    os.environ.setdefault(GLOO, name)
    os.environ.setdefault(VLLM, address)
    if several_nodes:
        os.environ.setdefault(NCCL, name)


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

    return ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
