"""Which checkpoint counts: only a complete one, the newest, and old ones go."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.loader import UserError
from rlhf.training.checkpoints import Checkpoints


def write(checkpoints: Checkpoints, step: int, complete: bool = True) -> str:
    tag = checkpoints.tag(step)
    (checkpoints.folder / tag).mkdir(parents=True)
    (checkpoints.folder / tag / "weights").write_text(str(step))
    if complete:
        checkpoints.complete(tag, {"step": step})
    return tag


def test_the_newest_complete_one_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        write(checkpoints, step)
    write(checkpoints, 20, complete=False)
    assert checkpoints.latest() == ("step-000015", {"step": 15})
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step-000010", "step-000015", "step-000020"]


def test_the_remains_of_a_crash_are_overwritten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    write(checkpoints, 5, complete=False)
    assert write(checkpoints, 5) == "step-000005"
    assert checkpoints.latest() == ("step-000005", {"step": 5})


def test_a_torn_state_names_the_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    tag = write(checkpoints, 5)
    (checkpoints.folder / tag / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: cannot be read.*Delete"):
        checkpoints.latest()
