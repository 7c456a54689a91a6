"""How long an actor may take to start: by the bytes of the largest model, twice where they come from a hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config import Settings
from rlhf.data.loading_time import Weights, startup_deadline_s, weights, weights_in, with_startup_deadline


def sharded(folder: Path, sizes: list[int], total: float) -> Path:
    folder.mkdir(exist_ok=True)
    names = [f"model-{number}.safetensors" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        if size:
            with open(folder / name, "wb") as file:
                file.truncate(size)  # sparse: it takes no room
    index = {"metadata": {"total_size": total}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_documented_formula() -> None:
    assert startup_deadline_s([]) == 600
    assert startup_deadline_s([Weights(0.27e9)]) == 603, "whole seconds"
    assert startup_deadline_s([Weights(141e9), Weights(16e9, fetched=True)]) == 2010, "70B from a disk"
    assert startup_deadline_s([Weights(141e9, fetched=True)]) == 3420, "and from a hub"


def test_files_are_counted_where_they_are(tmp_path: Path) -> None:
    assert weights_in(sharded(tmp_path / "whole", [10**9, 10**9], 2e9)) == Weights(2e9)
    assert weights_in(sharded(tmp_path / "half", [10**9, 0], 2e9)) == Weights(2e9, fetched=True)
    (tmp_path / "single").mkdir()
    assert weights_in(tmp_path / "single") == Weights(5e9, fetched=True), (
        "no index and no file: one file, still elsewhere"
    )
    (tmp_path / "single" / "model.safetensors").write_bytes(b"12345")
    assert weights_in(tmp_path / "single") == Weights(5)
    (tmp_path / "single" / "model.safetensors.index.json").write_text("{")
    assert weights_in(tmp_path / "single") == Weights(0), "who loads it says what is wrong"
    assert weights("no-such-owner/no-such-model") == Weights(0)


def test_the_largest_model_of_a_run_counts_and_a_number_wins(
    tiny_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    judge = {"kind": "model", "path": str(sharded(tmp_path / "judge", [3 * 10**9], 3e9))}
    automatic = tiny_settings(reward=judge, cluster={"startup_deadline_s": "auto"})
    assert with_startup_deadline(automatic).cluster.startup_deadline_s == 630
    given = tiny_settings(reward=judge, cluster={"startup_deadline_s": 5.0})
    assert with_startup_deadline(given) is given
    critic = {"name": "ppo", "critic_model": str(sharded(tmp_path / "critic", [9 * 10**9], 9e9))}
    assert (
        with_startup_deadline(
            tiny_settings(algorithm=critic, cluster={"startup_deadline_s": "auto"})
        ).cluster.startup_deadline_s
        == 690
    )


def test_it_is_a_number_or_auto(tiny_settings: Callable[..., Settings]) -> None:
    for wrong in (0.0, -1.0, "soon"):
        with pytest.raises(ValueError, match="startup_deadline_s"):
            tiny_settings(cluster={"startup_deadline_s": wrong})
