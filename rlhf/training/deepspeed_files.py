"""DeepSpeed's files in a checkpoint: written with their checksums, read without executing anything that a file may hold.

Written for DeepSpeed 0.19.8, whose own engine loads with `weights_only=False`. What is no file of DeepSpeed's is `torch_files`' alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlhf.training import torch_files
from rlhf.training.checkpoints import sha256

ALLOWED = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""Classes of DeepSpeed's state beside tensors and plain values. Making one of them runs nothing but its assignments."""


def read(file: Path, map_location: Any = None, mmap: bool = False) -> Any:
    """As `torch_files.read`, of a file that DeepSpeed wrote.

    Raises:
        UserError: the file is damaged, or holds something else, which is not executed.
    """
    return torch_files.read(file, map_location, mmap, ALLOWED)


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
