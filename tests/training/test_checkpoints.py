"""Which checkpoint counts: only a complete one, the newest, and old ones go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

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


def test_a_torn_state_names_the_file_and_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    write(checkpoints, 5)
    state = checkpoints.folder / write(checkpoints, 6) / "state.json"
    for text in ("{", "[]", '{"ledger": {}}'):
        state.write_text(text)
        with pytest.raises(
            UserError, match=r"step-000006/state\.json.*delete the folder .*step-000006 to resume from .*step-000005"
        ):
            checkpoints.latest()
    shutil.rmtree(checkpoints.folder / "step-000005")
    with pytest.raises(UserError, match="step-000006 is the only complete checkpoint.*a new run in another run.dir"):
        checkpoints.latest()


@pytest.mark.parametrize(
    ("damage", "says"), [("missing", "is missing"), ("short", "it has 1 bytes, and 5 were written")]
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, says: str) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    checkpoints.tag(5)
    file = checkpoints.folder / "step-000005" / "policy" / "shard.pt"
    file.parent.mkdir(parents=True)
    file.write_text("whole")
    checkpoints.complete("step-000005", {"step": 5})
    assert checkpoints.latest() == ("step-000005", {"step": 5})
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("w")
    with pytest.raises(UserError, match=rf"policy/shard\.pt: .*{says}.*only complete checkpoint"):
        checkpoints.latest()


def test_a_checkpoint_of_an_earlier_version_has_whole_archives(tmp_path: Path) -> None:
    """It does not say how large its files are."""
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    folder = checkpoints.folder / write(checkpoints, 5)
    (folder / "state.json").write_text('{"step": 5}')
    torch.save({"w": torch.ones(9)}, folder / "shard.pt")
    assert checkpoints.latest() == ("step-000005", {"step": 5})
    (folder / "shard.pt").write_bytes((folder / "shard.pt").read_bytes()[:300])
    with pytest.raises(UserError, match=r"shard\.pt: the file is damaged"):
        checkpoints.latest()
