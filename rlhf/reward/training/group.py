"""On what `rlhf reward train --method full` trains: its options for ranks, precision and checkpoints, and what they demand."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from rlhf.config.arguments import count, whole
from rlhf.reward.errors import RewardError


@dataclass(frozen=True)
class Group:
    """On what a model is trained, and what is written meanwhile.

    Attributes:
        ranks: DeepSpeed ranks. One runs in this process, more are Ray actors.
        dtype: of weights and activations; bf16 keeps fp32 master weights.
        micro_batch_tokens: most tokens of a forward and backward pass on one rank; results do not depend on it.
        address: of a running Ray cluster; None: one is started on this machine for several ranks.
        threads: CPU threads of a rank.
        checkpoint_every: optimizer steps between two checkpoints; 0: none.
        eval_every: optimizer steps between two measurements of the held-out loss, besides the first and the last; 0: none at all.
        resume: go on from the last checkpoint.
    """

    ranks: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    micro_batch_tokens: int = 8192
    gradient_checkpointing: bool = False
    address: str | None = None
    checkpoint_every: int = 0
    eval_every: int = 0
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None


SHARED = ("device", "threads")
"""Fields that other methods have as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    group = parser.add_argument_group("how --method full trains")
    group.add_argument(
        "--ranks",
        type=count,
        default=1,
        help="DeepSpeed ranks, one per device; 1 runs in this process, more are Ray actors",
    )
    group.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=0, help="what ranks share out")
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    group.add_argument(
        "--micro-batch-tokens",
        type=count,
        default=8192,
        help="most tokens of a forward pass on one rank; results do not depend on it",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="slower, far less memory")
    group.add_argument("--address", help="of a running Ray cluster, for several ranks; default: one on this machine")
    group.add_argument(
        "--checkpoint-every", type=whole(0), default=0, help="optimizer steps between checkpoints (0: none)"
    )
    group.add_argument(
        "--eval-every",
        type=whole(0),
        default=0,
        help="optimizer steps between measurements of the loss on the validation rows (0: none)",
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this same command")


def read_group(args: argparse.Namespace) -> Group:
    """What the options say.

    Raises:
        RewardError: a value that cannot be, or that would change nothing.
    """
    group = Group(**{field.name: getattr(args, field.name) for field in fields(Group)})
    if args.method != "full":
        for field in fields(Group):
            if field.name not in SHARED and getattr(group, field.name) != field.default:
                raise RewardError(f"--{field.name.replace('_', '-')} is an option of --method full. Leave it out.")
    if group.address is not None and group.ranks == 1:
        raise RewardError(
            "--address: a single rank runs in this process, not on a cluster. Leave it out, or raise --ranks."
        )
    if group.resume and group.checkpoint_every == 0:
        raise RewardError("--resume goes on from a checkpoint; give the --checkpoint-every of the training that ended.")
    if group.resume:
        require_training(training_folder(args.output))
    return group


def training_folder(output: str | Path) -> Path:
    """Where a training under way keeps its metrics and checkpoints: `OUTPUT.training`."""
    output = Path(output)
    return output.with_name(f"{output.name}.training")


def require_training(folder: Path) -> None:
    """Raises RewardError if no training to resume is there."""
    if not folder.is_dir():
        raise RewardError(f"--resume: there is no training to go on with in {folder}. Leave it out to start one.")
