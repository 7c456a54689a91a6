"""Checkpoints: which one is complete, which come to be deleted. DeepSpeed writes the weights; who drives the run writes its state.

`checkpoints/step-000050/` holds what the ranks wrote; `state.json` in it is written last, at once, and makes it complete. A
folder without it is the remains of a crash and is never read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rlhf.config.loader import UserError

STATE = "state.json"


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        keep: how many complete ones to keep.
    """

    def __init__(self, run_dir: str, keep: int):
        self.folder = (Path(run_dir) / "checkpoints").absolute()
        self._keep = keep

    def tag(self, step: int) -> str:
        """Name of the checkpoint after `step` steps; what is left of a broken one with that name is removed."""
        tag = f"step-{step:06d}"
        if (self.folder / tag).exists():
            shutil.rmtree(self.folder / tag)
        return tag

    def complete(self, tag: str, state: dict[str, Any]) -> None:
        """Mark a checkpoint whose weights are written as complete, then delete those that are too old."""
        target = self.folder / tag / STATE
        temporary = target.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        for old in self._complete()[: -self._keep]:
            (old / STATE).unlink()
            shutil.rmtree(old)

    def latest(self) -> tuple[str, dict[str, Any]] | None:
        """Tag and state of the newest complete checkpoint; None if there is none.

        Raises:
            UserError: its state cannot be read.
        """
        complete = self._complete()
        if not complete:
            return None
        path = complete[-1] / STATE
        try:
            return complete[-1].name, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}). Delete the folder to resume from the checkpoint before."
            ) from error

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}"))
