"""Which checkpoint counts: only a complete one, the newest, every file as it was written; and old ones go."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.config.loader import UserError
from rlhf.training.checkpoints import STATE, SUMS, Checkpoints, read_checkpoint


def write(checkpoints: Checkpoints, step: int, complete: bool = True) -> str:
    tag = checkpoints.tag(step)
    (checkpoints.folder / tag / "policy").mkdir(parents=True)
    (checkpoints.folder / tag / "policy" / "shard.pt").write_text("whole")
    (checkpoints.folder / tag / "weights").write_text(str(step))
    if complete:
        checkpoints.complete(tag, {"step": step})
    return tag


def found(step: int) -> tuple[str, dict]:
    return f"step-{step:06d}", {"step": step, "checksums": SUMS}


def test_the_newest_complete_one_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        write(checkpoints, step)
    write(checkpoints, 20, complete=False)
    assert checkpoints.latest() == found(15)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step-000010", "step-000015", "step-000020"]
    with pytest.raises(UserError, match=r"step-000020: is no complete checkpoint, it has no state\.json"):
        read_checkpoint(checkpoints.folder / "step-000020")


def test_the_remains_of_a_crash_are_overwritten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    write(checkpoints, 5, complete=False)
    assert write(checkpoints, 5) == "step-000005"
    assert checkpoints.latest() == found(5)


def test_the_checksums_are_those_of_the_usual_command(tmp_path: Path) -> None:
    """Also where the ranks have made them of what they wrote."""
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    folder = checkpoints.folder / write(checkpoints, 5, complete=False)
    checkpoints.complete(folder.name, {"step": 5}, {"weights": hashlib.sha256(b"5").hexdigest()})
    listed = [line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()]
    assert listed == ["policy/shard.pt", STATE, "weights"]
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True, capture_output=True)
    assert checkpoints.latest() == found(5)


def test_a_torn_state_names_the_file_and_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    write(checkpoints, 5)
    state = checkpoints.folder / write(checkpoints, 6) / STATE
    whole = state.read_text()
    for text in ("{", "[]", '{"ledger": {}}', whole.replace("6", "7")):
        state.write_text(text)
        for sums in (True, False):  # an earlier version wrote none
            if not sums:
                (state.parent / SUMS).rename(state.parent / "kept")
            with pytest.raises(
                UserError, match=r"step-000006/.*delete the folder .*step-000006 to resume from .*-000005"
            ):
                checkpoints.latest()
            if not sums:
                (state.parent / "kept").rename(state.parent / SUMS)
    state.write_text(whole)
    assert checkpoints.latest() == found(6)
    state.write_text("{")
    shutil.rmtree(checkpoints.folder / "step-000005")
    with pytest.raises(UserError, match=r"state\.json.*-000006 is the only complete checkpoint.*in another run.dir"):
        checkpoints.latest()


def flip(folder: Path, name: str) -> None:
    """One bit, in the middle."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "policy/shard.pt").unlink(), r"policy/shard\.pt: the file is missing"),
    "short": (lambda folder: (folder / "policy/shard.pt").write_text("w"), "it has 1 bytes, and 5 were written"),
    "flipped": (lambda folder: flip(folder, "policy/shard.pt"), r"policy/shard\.pt: the file is damaged: its checksum"),
    "extra": (
        lambda folder: (folder / "policy/more.pt").write_text("w"),
        r"policy/more\.pt: .* none of the checkpoint's",
    ),
    "pipe": (lambda folder: os.mkfifo(folder / "policy/more.pt"), r"policy/more\.pt: .* none of the checkpoint's"),
    "state": (lambda folder: flip(folder, STATE), r"state\.json: the file is damaged: its checksum"),
    "sums": (lambda folder: flip(folder, SUMS), "damaged|missing"),
    "no sums": (lambda folder: (folder / SUMS).unlink(), "SHA256SUMS: the file is missing"),
    "empty sums": (lambda folder: (folder / SUMS).write_text(""), "SHA256SUMS: the file is damaged"),
    "half the sums": (lambda folder: _halve(folder / SUMS), "SHA256SUMS: the file is damaged"),
    "binary sums": (lambda folder: (folder / SUMS).write_bytes(b"\xff\n"), "SHA256SUMS: the file is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    folder = checkpoints.folder / write(checkpoints, 5)
    assert checkpoints.latest() == found(5)
    harm, says = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError, match=rf"^{folder}/.*({says}).*only complete checkpoint"):
        checkpoints.latest()
    with pytest.raises(UserError, match=rf"^{folder}/.*({says}).*Restore the folder, or take another checkpoint"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", [STATE, SUMS, "policy/shard.pt"])
def test_no_flipped_bit_goes_unseen(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    file = checkpoints.folder / write(checkpoints, 5) / name
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(data))
        with pytest.raises(UserError):
            checkpoints.latest()
    file.write_bytes(whole)
    assert checkpoints.latest() == found(5)


def test_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    """One has no checksums, one not even sizes: then torch's files must be whole archives."""
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    folder = checkpoints.folder / write(checkpoints, 5)
    (folder / SUMS).unlink()
    shard = folder / "policy" / "shard.pt"
    (folder / STATE).write_text(json.dumps({"step": 5, "files": {"policy/shard.pt": 5}}))
    assert checkpoints.latest() == ("step-000005", {"step": 5})
    shard.write_text("w")
    with pytest.raises(UserError, match="it has 1 bytes, and 5 were written"):
        checkpoints.latest()
    (folder / STATE).write_text('{"step": 5}')
    torch.save({"w": torch.ones(9)}, shard)
    assert checkpoints.latest() == ("step-000005", {"step": 5})
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(UserError, match=r"shard\.pt: the file is damaged"):
        checkpoints.latest()
