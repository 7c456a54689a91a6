"""What a launch script asks before it starts the driver: where the run lives, which address a host has, who has joined.

Used by `launchers/` as `python -m rlhf.cluster.launching QUESTION`; each answer is one line on stdout. Starts no Ray node
and ends none; that is the script's business.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.cluster.own_ray import session_folder
from rlhf.config import UserError
from rlhf.config.commands import LOADERS

POLL_S = 1.0


def run_folder(config: str, overrides: Sequence[str], command: str = "train") -> Path:
    """Absolute path of `run.dir`. Options of the command, `train` or `sft` (they begin with `--`), are passed over.

    Raises:
        UserError: a mistake in the configuration.
    """
    settings = LOADERS[command](config, [item for item in overrides if not item.startswith("--")])
    return Path(settings.run.dir).absolute()


def address_towards(peer: str) -> str:
    """The address with which this host reaches `peer`, so the one under which `peer` can reach this host. Sends nothing.

    Raises:
        UserError: the peer's name has no address.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"{peer}: this host finds no way to it ({error}). Give names that resolve on every host, or set HEAD_IP to the address under "
            "which the others reach the first host."
        ) from None


def wait_for_head(address: str, deadline_s: float) -> None:
    """Return as soon as something listens at `address`, HOST:PORT.

    Raises:
        UserError: nothing does within `deadline_s` seconds.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + deadline_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=POLL_S).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"nothing answered at {address} within {deadline_s:g} s ({error}): the Ray head did not start, or a firewall is in "
                    "between. See the head's log."
                ) from None
        time.sleep(POLL_S)


def wait_for_nodes(nodes: int, deadline_s: float, alive: Callable[[], Sequence[str]]) -> None:
    """Return as soon as `nodes` Ray nodes are alive.

    Args:
        alive: addresses of the living nodes.

    Raises:
        UserError: not all have joined within `deadline_s` seconds; it says which have.
    """
    end = time.monotonic() + deadline_s
    while len(joined := alive()) < nodes:
        if time.monotonic() > end:
            raise UserError(
                f"{len(joined)} of {nodes} nodes joined the Ray cluster within {deadline_s:g} s: {', '.join(sorted(joined))}. See the logs "
                "of the others; they need the same token, RAY_AUTH_MODE=token and open ports towards the first host."
            )
        time.sleep(POLL_S)


def _wait_for_nodes(address: str, nodes: int, deadline_s: float) -> None:
    import ray

    wait_for_head(address, deadline_s)
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        wait_for_nodes(nodes, deadline_s, lambda: [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]])
    finally:
        ray.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question. Returns the exit status: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.cluster.launching", description=__doc__)
    questions = parser.add_subparsers(dest="question", metavar="QUESTION", required=True)
    folder = questions.add_parser("run-folder", help="absolute path of run.dir; checks the configuration")
    folder.add_argument("--command", choices=LOADERS, default="train", help="that will run (default: train)")
    folder.add_argument("config")
    folder.add_argument("overrides", nargs=argparse.REMAINDER)
    questions.add_parser("address", help="this host's address as PEER sees it").add_argument("peer")
    questions.add_parser("session-folder", help="where Ray keeps its sockets and logs here, shut to other users")
    for name, summary in (("head", "wait until the head listens"), ("nodes", "wait until all nodes have joined")):
        wait = questions.add_parser(name, help=summary)
        wait.add_argument("address", help="HOST:PORT of the Ray head")
        wait.add_argument("--deadline", type=float, default=300.0, help="seconds (default: 300)")
        if name == "nodes":
            wait.add_argument("--count", type=int, required=True)
    args = parser.parse_args(argv)
    try:
        if args.question == "run-folder":
            print(run_folder(args.config, args.overrides, args.command))
        elif args.question == "address":
            print(address_towards(args.peer))
        elif args.question == "session-folder":
            print(session_folder())
        elif args.question == "head":
            wait_for_head(args.address, args.deadline)
        else:
            _wait_for_nodes(args.address, args.count, args.deadline)
    except UserError as error:
        sys.stderr.write(f"rlhf: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
