"""Run as a program: `rlhf doctor` on the tiny run, in a Ray cluster of two nodes on this machine. Ends with the doctor's status.

Arguments: the JSON file for the findings, and overrides. A process of its own, because a process belongs to one Ray cluster at
a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf.cli import main

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")

if __name__ == "__main__":
    from ray.cluster_utils import Cluster

    file, *overrides = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=4)
        status = main(["doctor", TINY, f"cluster.address={cluster.address}", *overrides, "--json", file])
    finally:
        cluster.shutdown()
    sys.exit(status)
