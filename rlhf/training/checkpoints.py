"""Checkpoints: which one is complete, which come to be deleted. DeepSpeed writes the weights; who drives the run writes its state.

`checkpoints/step-000050/` holds what the ranks wrote; `state.json` in it is written last, at once, and makes it complete. A
folder without it is the remains of a crash and is never read. Whether a run may go on from one is for `resume` to say.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from rlhf.config.loader import UserError

STATE = "state.json"
FILES = "files"
"""Key of the state that holds every other file's size in bytes, by its path inside the folder."""


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
        state = state | {FILES: _sizes(self.folder / tag)}
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
            UserError: its state cannot be read, or a file of it is missing or damaged.
        """
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / STATE}: cannot be read ({error}). {self._remedy(folder)}") from error
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise UserError(f"{folder / STATE}: is not what a run writes there. {self._remedy(folder)}")
        self._check_files(folder, state.pop(FILES, None))
        return folder.name, state

    def _check_files(self, folder: Path, sizes: dict[str, int] | None) -> None:
        """Raises UserError if a file is missing or has another size than when it was written.

        Args:
            sizes: None in checkpoints of an earlier format; then torch's files must at least be whole archives.
        """
        if sizes is None:
            for file in sorted(folder.rglob("*.pt")):
                if not zipfile.is_zipfile(file):
                    raise UserError(f"{file}: the file is damaged. {self._remedy(folder)}")
            return
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{file}: the file is missing from the checkpoint. {self._remedy(folder)}")
            if (found := file.stat().st_size) != size:
                raise UserError(
                    f"{file}: the file is damaged: it has {found:,} bytes, and {size:,} were written. {self._remedy(folder)}"
                )

    def _remedy(self, folder: Path) -> str:
        before = [path.name for path in self._complete() if path.name < folder.name]
        if before:
            return f"Restore it, or delete the folder {folder} to resume from the checkpoint before, {before[-1]}."
        return (
            f"Restore it; {folder.name} is the only complete checkpoint. Otherwise start a new run in another run.dir."
        )

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}"))


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}
