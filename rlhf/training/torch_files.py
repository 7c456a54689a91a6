"""Torch's files in a checkpoint: written with their checksum, read without executing anything that a file may hold.

A pickle can name any function to call. Here only tensors, plain values and the few classes of DeepSpeed's state in `ALLOWED` are made.
Written for DeepSpeed 0.19.8, whose own engine loads with `weights_only=False`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlhf.config.loader import UserError
from rlhf.training.checkpoints import sha256

ALLOWED = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""Classes of DeepSpeed's state beside tensors and plain values. Making one of them runs nothing but its assignments."""


def write(value: Any, file: Path) -> str:
    """Write tensors and plain values as `read` reads them. Returns the file's checksum."""
    torch.save(value, file)
    return sha256(file)


def read(file: Path, map_location: Any = None, mmap: bool = False) -> Any:
    """The tensors and plain values of a file.

    Args:
        mmap: read a tensor's bytes when it is used, not before.

    Raises:
        UserError: the file is damaged, or holds something else, which is not executed.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: the file is damaged, or no checkpoint of a run: it cannot be read without executing code that it names, which is "
            "not done. Go on from another checkpoint."
        ) from error


class PlainCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of files, which executes nothing.

    Attributes:
        written: checksum of each file that `save` has written.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.written: dict[Path, str] = {}

    def save(self, state_dict: Any, path: str) -> None:
        super().save(state_dict, path)
        self.written[Path(path)] = sha256(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        return read(Path(path), map_location)
