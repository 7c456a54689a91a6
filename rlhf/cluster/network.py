"""Which network interface the processes of a node talk over.

Gloo resolves the host name, which on many machines is the loopback, and then other hosts cannot reach it; NCCL guesses; vLLM
looks for a route to the internet. All take the interface that carries the address under which Ray knows the node, unless the
user has said otherwise.
"""

from __future__ import annotations

import os

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
