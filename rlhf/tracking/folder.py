"""Whether a run may start or resume in a folder. Only looks, in microseconds: the command line asks before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlhf.config.loader import UserError

MANIFEST = "manifest.json"
"""Marks a folder as holding a run."""
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
    "samples.jsonl",
    "spans.jsonl",
    "responses",
    "checkpoints",
    "export",
)
"""What a run writes there besides."""
REMEDY = "Set run.dir to a folder on a disk with free space that you may write to."


def check_run_folder(run_dir: str | os.PathLike[str], resume: bool) -> None:
    """Args:
        resume: the run that the folder holds is to go on.

    Raises:
        UserError: the folder holds a run and `resume` is False; it holds none and it is True, or one whose manifest is damaged; it has
            other files that the run would write over; or nothing can be written there.
    """
    folder = Path(run_dir)
    try:
        holds_run = (folder / MANIFEST).exists()
        if holds_run and not resume:
            raise UserError(
                f"run.dir={folder}: this folder already holds a run. "
                "Choose another run.dir, continue that run with --resume, or delete the folder."
            )
        if resume and not holds_run:
            raise UserError(
                f"run.dir={folder}: --resume found no run in this folder. "
                "Set run.dir to the folder of the run to continue, or leave out --resume to start a new one."
            )
        taken = [name for name in WRITTEN if not resume and (folder / name).exists()]
        if taken:
            raise UserError(
                f"run.dir={folder}: this folder holds no run, but has {', '.join(taken)}, which a run would write over. Choose another "
                "run.dir, or delete what is there if it is the remains of a run."
            )
        place = folder.absolute()
        while not os.path.lexists(place):
            place = place.parent
    except OSError as error:  # a name that is too long, a file where a folder should be
        raise UserError(
            f"run.dir={folder}: the run folder cannot be written ({error.strerror or error}). {REMEDY}"
        ) from None
    if resume:
        _check_manifest(folder / MANIFEST)
    if not place.is_dir():
        raise UserError(f"run.dir={folder}: the run folder cannot be written ({place} is not a folder). {REMEDY}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={folder}: the run folder cannot be written ({place} is not writable). {REMEDY}")


def _check_manifest(path: Path) -> None:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(described["run_id"], str) and isinstance(described["resumed"], list)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"{path}: the file is damaged, so that the run cannot be continued. Restore it, or start a new run in another run.dir."
        )
