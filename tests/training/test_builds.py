"""Builds that somebody has left behind."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.training.builds import ABANDONED_S, remove_abandoned_locks


def test_only_an_old_lock_is_removed(tmp_path: Path) -> None:
    old, new, other = (
        tmp_path / name for name in ("py311_cpu/shm/lock", "py311_cpu/adam/lock", "py311_cpu/shm/shm.so")
    )
    for path, age in ((old, ABANDONED_S + 1), (new, ABANDONED_S - 1), (other, 1e6)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert remove_abandoned_locks(tmp_path, now=1e9) == [old]
    assert new.exists() and other.exists()
    assert remove_abandoned_locks(tmp_path, now=1e9) == []


def test_where_nothing_was_built_nothing_is_wrong(tmp_path: Path) -> None:
    assert remove_abandoned_locks(tmp_path / "missing") == []
