"""Torch's files in a checkpoint: written with their checksum, read without executing anything that a file may hold.

A pickle can name any function to call. Here only tensors, plain values and the few classes that the caller names are made.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config.loader import UserError
from rlhf.training.checkpoints import sha256


def write(value: Any, file: Path) -> str:
    """Write tensors and plain values as `read` reads them. Returns the file's checksum."""
    torch.save(value, file)
    return sha256(file)


def read(file: Path, map_location: Any = None, mmap: bool = False, allowed: Sequence[type] = ()) -> Any:
    """The tensors and plain values of a file.

    Args:
        mmap: read a tensor's bytes when it is used, not before.
        allowed: further classes that may be made; making one must run nothing but its assignments.

    Raises:
        UserError: the file is damaged, or holds something else, which is not executed.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: the file is damaged, or no checkpoint of a run: it cannot be read without executing code that it names, which is "
            "not done. Go on from another checkpoint."
        ) from error
