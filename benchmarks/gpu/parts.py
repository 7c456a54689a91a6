"""One part of `measure.py`, in a process of its own: `parts.py NAME [--smoke] ROWS`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package lies beside, installed or not

from attention_parts import equality, ragged, speed
from common import Table
from model_parts import logprobs, machine, memory, step, with_deepspeed

PARTS = {
    "machine": machine,
    "equality": equality,
    "speed": speed,
    "logprobs": logprobs,
    "step": step,
    "memory": memory,
    "ragged": ragged,
    "deepspeed": with_deepspeed,
}


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    PARTS[args.part](Table(args.rows), args.smoke)


if __name__ == "__main__":
    main()
