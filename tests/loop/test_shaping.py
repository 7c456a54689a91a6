"""Transforms inside the real loop: a resumed run equals the uninterrupted one, and ranks among the reference's own responses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.cluster import LocalRuntime
from rlhf.commands import evaluate
from rlhf.config import load
from rlhf.loop.run import Training

pytestmark = pytest.mark.engine

CONFIG = """
data: {prompts: asset:tiny-prompts.jsonl, max_prompt_tokens: 128}
policy: {model: asset:tiny-llama, dtype: fp32, learning_rate: 1e-3, micro_batch_tokens: 2048}
rollout: {max_tokens: 12, cpu_kv_cache_gb: 0.1, enforce_eager: true}
reward: {kind: function, path: "tests.helpers:mean_byte"}
loop: {steps: 3, prompts_per_step: 6}
tracking: {console: "off"}
checkpoint: {every: 0, export: false}
cluster: {device: cpu, threads: 1}
algorithm: {name: rloo, samples_per_prompt: 4}
"""
NORMALISED = "reward.transforms=[{name: normalise}]"


def train(folder: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    """The metrics of each step."""
    path = folder.with_name(f"{folder.name}-train.yaml")
    path.write_text(CONFIG)
    settings = load(path, [f"run.dir={folder}", *overrides])
    asyncio.run(Training(settings, debug=True, resume=resume).run())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_normalises_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", NORMALISED)
    train(tmp_path / "run", NORMALISED, "loop.steps=2", "checkpoint.every=2")
    resumed = train(tmp_path / "run", NORMALISED, "checkpoint.every=2", resume=True)
    for one, other in zip(resumed, whole, strict=True):
        for name in ("reward/mean", "reward/shaped_mean", "reward/shaped_std", "policy/loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), (one["step"], name)
    assert whole[0]["reward/shaped_mean"] == pytest.approx(0, abs=1e-6), "the first step is normalised by itself"
    assert whole[0]["reward/shaped_std"] == pytest.approx(1, rel=1e-6)
    assert whole[2]["reward/shaped_std"] != pytest.approx(1, rel=1e-3), "the third by all three"


def test_the_reference_ranks_in_the_middle_of_its_own_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of 0 the policy stays the reference, so ranks are uniform: mean 1/2, standard deviation 0.289."""
    scores = tmp_path / "scores.jsonl"
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    ranked = ["reward.transforms=[{name: calibrate}]", f"reward.reference_scores={scores}"]
    # Engine and judge in this process, as in debug mode. That the command's own Ray starts them, `rlhf eval` shows in the end-to-end tests.
    monkeypatch.setattr(evaluate, "RayRuntime", lambda settings, actors: LocalRuntime())
    assert main(["reward", "calibrate", str(path), "--samples", "16", *ranked]) == 0
    steps = train(tmp_path / "run", *ranked, "policy.learning_rate=0", "algorithm.samples_per_prompt=8")
    mean = sum(step["reward/shaped_mean"] for step in steps) / 3  # of 144 responses
    assert mean == pytest.approx(0.5, abs=0.12)
    assert steps[0]["reward/shaped_std"] == pytest.approx(0.289, abs=0.1)
