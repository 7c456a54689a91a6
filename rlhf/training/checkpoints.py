"""Checkpoints: which one is complete and unharmed, which come to be deleted. DeepSpeed writes the weights; who drives the run writes its
state.

`checkpoints/step-000050/` holds what the ranks wrote; `SHA256SUMS` in it has the checksum of every file, for the command `sha256sum -c`
too; `state.json` is written last, at once, and makes the folder complete. A folder without it is the remains of a crash and is never
read. Nothing is loaded from a checkpoint before `read_checkpoint` has compared all its files. Whether a run may go on from one is for
`resume` to say.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from rlhf.config.loader import UserError

log = logging.getLogger(__name__)

STATE, SUMS = "state.json", "SHA256SUMS"
FILES = "files"
"""Key of the state that holds the size in bytes of every file that the ranks wrote, by its path inside the folder."""
CHECKSUMS = "checksums"
"""Key of the state that names the file with the checksums; an earlier version wrote none."""
REMEDY = "Restore the folder, or take another checkpoint."
HASHING_THREADS = 16
SAID_FROM_GB = 10
"""Size of a checkpoint from which its comparison is announced, because it takes a while."""


class Stateful(Protocol):
    """A part of a run that a checkpoint must hold. Only the part knows what is in its state; who collects the parts knows their names."""

    def state(self) -> Any:
        """All that the part has to remember, as JSON."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave, also where an earlier version gave less."""
        ...


def sha256(file: Path) -> str:
    """Checksum of a file, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_checkpoint(folder: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """What the run wrote into a complete checkpoint, after every file in it has been compared with its checksum. Nothing is loaded.

    A checksum tells a damaged file, not a forged one: who can write the folder can write both. That is why `torch_files.read` executes
    nothing either.

    Args:
        remedy: how an error ends.

    Raises:
        UserError: the folder is no complete checkpoint; a file is missing, damaged, or none of the run's.
    """
    if not (folder / STATE).is_file():
        raise UserError(f"{folder}: is no complete checkpoint, it has no {STATE}. {remedy}")
    try:
        text = (folder / STATE).read_bytes()
        sums = _read_sums(folder / SUMS) if (folder / SUMS).exists() else None
        if sums is not None and sums.pop(STATE, None) != hashlib.sha256(text).hexdigest():
            raise _Damaged(STATE, f"the file is damaged: its checksum is not the one in {SUMS}")
        state = _parsed(text)
        sizes = state.pop(FILES, None)
        if sums is not None:
            _compare(folder, sizes, sums)
        elif CHECKSUMS in state:
            raise _Damaged(SUMS, "the file is missing from the checkpoint")
        else:
            _compare_earlier(folder, sizes)
    except (_Damaged, OSError) as error:
        file, what = error.args if isinstance(error, _Damaged) else (STATE, f"cannot be read ({error})")
        raise UserError(f"{folder / file}: {what}. {remedy}") from error
    return state


class _Damaged(Exception):
    """File of the folder, and what is wrong with it."""


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damaged(STATE, f"cannot be read ({error})") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0 or not _sound(state):
        raise _Damaged(STATE, "is not what a run writes there")
    return state


def _sound(state: Mapping[str, Any]) -> bool:
    """Whether the sizes are those of files; an earlier version wrote none."""
    sizes = state.get(FILES)
    if sizes is None:
        return CHECKSUMS not in state
    return isinstance(sizes, dict) and all(type(size) is int and "\0" not in name for name, size in sizes.items())


def _read_sums(file: Path) -> dict[str, str]:
    """Checksum of each file, by its path inside the folder."""
    sums = {}
    for line in file.read_bytes().decode(errors="replace").removesuffix("\n").split("\n"):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise _Damaged(SUMS, "the file is damaged: a line is not a checksum and a name")
        sums[name] = digest
    return sums


def _compare(folder: Path, sizes: Mapping[str, int], sums: Mapping[str, str]) -> None:
    """Every file is there, no other one, and each is what was written; the quick questions first."""
    _require_files(folder, sums)
    for name in _names(folder):
        if name not in sums and name not in (STATE, SUMS):
            raise _Damaged(name, "the file is none of the checkpoint's own; remove it if it is yours")
    _compare_sizes(folder, sizes)
    total = sum(sizes.values()) / 1e9
    if total >= SAID_FROM_GB:
        log.warning("%s: comparing its %.0f GB with their checksums", folder, total)
    for name, digest in zip(sums, _digests(folder / name for name in sums), strict=True):
        if digest != sums[name]:
            raise _Damaged(name, f"the file is damaged: its checksum is not the one in {SUMS}")


def _compare_earlier(folder: Path, sizes: Mapping[str, int] | None) -> None:
    """What an earlier version's checkpoint lets one see: sizes, or at least that torch's files are whole archives."""
    if sizes is not None:
        _require_files(folder, sizes)
        _compare_sizes(folder, sizes)
        return
    for file in sorted(folder.rglob("*.pt")):
        if not zipfile.is_zipfile(file):
            raise _Damaged(str(file.relative_to(folder)), "the file is damaged")


def _require_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise _Damaged(name, "the file is missing from the checkpoint")


def _compare_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if (found := (folder / name).stat().st_size) != size:
            raise _Damaged(name, f"the file is damaged: it has {found:,} bytes, and {size:,} were written")


def _digests(files: Iterable[Path]) -> Iterable[str]:
    """Checksums, several at a time: hashing leaves Python's lock alone."""
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(sha256, files))


def _names(folder: Path) -> list[str]:
    """Paths inside the folder of everything in it but folders."""
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir()]


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
        tag = _tag(step)
        if (self.folder / tag).exists():
            shutil.rmtree(self.folder / tag)
        return tag

    def complete(self, tag: str, state: dict[str, Any], written: Mapping[str, str] | None = None) -> None:
        """Mark a checkpoint whose weights are written as complete, then delete those that are too old.

        Args:
            written: checksums that the ranks have made of their files, by the path inside the folder; of others they are made here.
        """
        folder = self.folder / tag
        names, sums = _names(folder), dict(written or {})
        others = [name for name in names if name not in sums]
        sums |= dict(zip(others, _digests(folder / name for name in others), strict=True))
        sizes = {name: (folder / name).stat().st_size for name in names}
        text = json.dumps(state | {FILES: sizes, CHECKSUMS: SUMS})
        sums[STATE] = hashlib.sha256(text.encode()).hexdigest()
        _write(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        _write(folder / STATE, text)
        for old in self._complete()[: -self._keep]:
            (old / STATE).unlink()
            shutil.rmtree(old)

    def latest(self) -> tuple[str, dict[str, Any]] | None:
        """Tag and state of the newest complete checkpoint, its files compared (`read_checkpoint`); None if there is none.

        Raises:
            UserError: its state cannot be read, or a file of it is missing, damaged or foreign.
        """
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        state = read_checkpoint(folder, self._remedy(folder))
        if folder.name != _tag(state["step"]):
            raise UserError(
                f"{folder}: the run saved it after step {state['step']}, so the name is another's. Rename it to {_tag(state['step'])}"
            )
        return folder.name, state

    def _remedy(self, folder: Path) -> str:
        before = [path.name for path in self._complete() if path.name < folder.name]
        if before:
            return f"Restore it, or delete the folder {folder} to resume from the checkpoint before, {before[-1]}."
        return (
            f"Restore it; {folder.name} is the only complete checkpoint. Otherwise start a new run in another run.dir."
        )

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}"))


def _tag(step: int) -> str:
    return f"step-{step:06d}"


def _write(target: Path, text: str) -> None:
    """All of it, or nothing."""
    temporary = target.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
