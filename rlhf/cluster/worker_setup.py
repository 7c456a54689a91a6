"""What every Ray process of a run does first, on whichever node: Ray calls `prepare` before any actor or task."""

from __future__ import annotations

import os

from rlhf.cluster.devices import claim_threads
from rlhf.cluster.network import choose_interfaces

DRIVER_FOLDER = "RLHF_DRIVER_FOLDER"


def job_environment() -> dict[str, object]:
    """Ray's `runtime_env` for the whole run."""
    return {
        "worker_process_setup_hook": f"{__name__}.prepare",
        "env_vars": {DRIVER_FOLDER: os.getcwd()},
    }


def prepare() -> None:
    """Work in the driver's folder, so that relative paths mean the same everywhere, take the process's share of this node's cores, and
    choose the network interface.

    A node without that folder is found out by `Reservation.check_files`, in words; an error here would only end the process.
    """
    import ray

    claim_threads(os.environ)
    folder = os.environ.get(DRIVER_FOLDER)
    if folder is not None and os.path.isdir(folder):
        os.chdir(folder)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    choose_interfaces(ray.util.get_node_ip_address(), several_nodes=len(nodes) > 1)
