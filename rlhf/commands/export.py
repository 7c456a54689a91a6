"""`rlhf export`: a checkpoint of a run becomes a model folder, as the run's own export at its end; other commands take it as a model.

Owns what may be named as a checkpoint: a step's folder, the folder of checkpoints, or the run folder, of which the last complete one is
taken. Starts neither Ray nor an engine. How the weights are put together is in `rlhf.training.saved`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlhf.config import UserError
from rlhf.data.model_folder import FolderError, find_model

CHECKPOINTS, STATE, EXPORT = "checkpoints", "state.json", "export"


def export(checkpoint: str, out: str | None, model: str | None) -> Path:
    """Write the model that a checkpoint holds; returns its folder.

    Args:
        out: a folder that is not there yet, or empty; None: `export-STEP` in the run folder.
        model: what the run started from, if it is not where the checkpoint says.

    Raises:
        UserError: there is no complete checkpoint, it is damaged, or the folder cannot be written.
    """
    folder = find_checkpoint(Path(checkpoint))
    target = Path(out) if out is not None else folder.parent.parent / f"{EXPORT}-{folder.name}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {target}: is there already, and not an empty folder. Name another one, or remove it")
    above = target.absolute().parent
    if not above.is_dir():
        raise UserError(f"--out {target}: its folder does not exist. Make it, or correct the path")
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=f".{target.name}-") as temporary:
            unfinished = Path(temporary) / "model"
            _write(folder, unfinished, model)
            if target.exists():
                target.rmdir()
            os.rename(unfinished, target)
    except OSError as error:
        raise UserError(
            f"--out {target}: cannot be written ({error.strerror or error}). Name another folder"
        ) from error
    return target


@contextmanager
def as_model(name: str, option: str) -> Iterator[str]:
    """Inside, `name` as a model that engines load: what it is already, or an export of the checkpoint that it is, removed afterwards.

    Args:
        option: what named it, for messages.

    Raises:
        UserError: a checkpoint that cannot be exported, or a path at which there is nothing.
    """
    path = Path(name)
    if not holds_checkpoints(path):
        find_model(name, option, weights=False)
        yield name
        return
    finished = path / EXPORT
    if not any((path / CHECKPOINTS).glob(f"step-*/{STATE}")) and (finished / "config.json").is_file():
        sys.stderr.write(f"{name} has no checkpoint; taking the export of its end, {finished}\n")
        yield str(finished)
        return
    folder = find_checkpoint(path)
    sys.stderr.write(f"{option}: putting together the model of {folder}\n")
    # Beside the checkpoints, because all nodes that hold engines must be able to read it.
    with ExitStack() as stack:
        try:
            temporary = tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix=".export-")
            whole = Path(stack.enter_context(temporary)) / "model"
            _write(folder, whole, None)
        except OSError as error:
            raise UserError(
                f"{option}: the model of {folder} cannot be written in {folder.parent.parent} ({error.strerror or error}). Write it "
                f"elsewhere with `rlhf export {folder} --out DIR`, and name that folder"
            ) from error
        yield str(whole)


def holds_checkpoints(path: Path) -> bool:
    """Whether the path is a run folder, or in one, rather than a model's folder."""
    return path.is_dir() and not (path / "config.json").is_file() and _step(path) is not None


def _step(path: Path) -> Path | None:
    """The folder of checkpoints, or of one step, that is meant."""
    if path.name.startswith("step-") or (path / STATE).is_file():
        return path
    if path.parent.name.startswith("step-") and (path.parent / STATE).is_file():  # what the ranks wrote in it
        return path.parent
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS
    if path.name == CHECKPOINTS or any(path.glob(f"step-*/{STATE}")):
        return path
    return path / CHECKPOINTS if (path / "manifest.json").is_file() else None


def find_checkpoint(path: Path) -> Path:
    """The step's folder that is meant by a path: the step itself, or the last complete one of its run.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: there is no such folder. Name a run folder, its `{CHECKPOINTS}` folder or one of the steps in that"
        )
    if (path / "config.json").is_file():
        raise UserError(f"{path}: is a model already, in Hugging Face format, and no checkpoint. It needs no export")
    found = _step(path)
    if found is None:
        raise UserError(
            f"{path}: is no checkpoint of a run. Name a run folder, its `{CHECKPOINTS}` folder or one of the steps in that"
        )
    if (found / STATE).is_file():
        return found
    complete = sorted(state.parent for state in found.glob(f"step-*/{STATE}"))
    if not complete:
        finished = found.parent / EXPORT
        hint = f" What the run exported at its end is in {finished}." if (finished / "config.json").is_file() else ""
        raise UserError(
            f"{path}: there is no complete checkpoint; a run writes them with checkpoint.every above 0, and what a crash leaves has no "
            f"{STATE}.{hint}"
        )
    return complete[-1]


def _write(folder: Path, out: Path, model: str | None) -> None:
    from rlhf.training.saved import export_saved, open_saved  # loads torch and DeepSpeed

    saved = open_saved(folder)
    try:
        base = find_model(model or saved.settings.model, "--model" if model else f"{folder}, `policy.model`")
    except FolderError as error:
        raise UserError(
            f"{error}. A checkpoint needs the model that its run started from: run this where that was, or name it with `rlhf export "
            "--model`"
        ) from error
    export_saved(saved, base, out)
