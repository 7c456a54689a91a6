"""Bit for bit, with the real vLLM, DeepSpeed and Ray: a replay is its recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import load
from rlhf.loop.replay import UNRECORDED, compare
from rlhf.loop.run import train
from rlhf.tracking import jsonl
from rlhf.tracking.responses import read_step

pytestmark = pytest.mark.engine
STEPS = 3
CONFIG = """
data: {prompts: asset:tiny-prompts.jsonl, max_prompt_tokens: 128}
policy: {model: asset:tiny-llama, dtype: fp32, learning_rate: 1e-3, micro_batch_tokens: 256}
rollout: {max_tokens: 12, cpu_kv_cache_gb: 0.1, enforce_eager: true}
reward: {kind: function, path: "tests.helpers:coin"}
loop: {steps: 3, prompts_per_step: 6, refill: 1}
tracking: {console: "off", responses: true}
checkpoint: {every: 0}
cluster: {device: cpu, threads: 1}
algorithm: {name: online_dpo}
"""
AHEAD = (
    "loop.staleness=2",
    "rollout.engines=2",
    "policy.ranks=2",
    "reward.path=tests.helpers:mean_byte",
    "loop.refill=0",
)
NOT_LEARNED = ("time", "idle/", "throughput/", "loop/ready")


def run(folder: Path, *overrides: str, debug: bool = True, replay: Path | None = None) -> Path:
    """A run in this folder, from its configuration or from that of the run that is replayed."""
    config = folder.with_suffix(".yaml")
    config.write_text(CONFIG if replay is None else (replay / "config.yaml").read_text())
    settings = load(config, [f"run.dir={folder}", *overrides])
    train(settings, debug=debug, replay=None if replay is None else str(replay))
    return folder


def learned(folder: Path, without: tuple[str, ...] = NOT_LEARNED) -> Any:
    """All metrics that do not tell the time, and the exported weights."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith(without)}
        for line in jsonl.read(folder / "metrics.jsonl")
    ]
    assert len(lines) == STEPS and lines[-1]["policy/loss"] != lines[0]["policy/loss"]
    return lines, (folder / "export" / "model.safetensors").read_bytes()


def recorded(folder: Path) -> list[bytes]:
    """What the steps took, in their order."""
    files = sorted((folder / "responses").glob("*.npz"))
    assert len(files) == STEPS and all(read_step(folder, step) for step in range(1, STEPS + 1))
    return [file.read_bytes() for file in files]


def test_an_asynchronous_run_of_two_engines_and_two_ranks_is_replayed(tmp_path: Path) -> None:
    """In Ray; the replay has two ranks and nobody else."""
    ahead = run(tmp_path / "ahead", *AHEAD, debug=False)
    lines = jsonl.read(ahead / "metrics.jsonl")
    assert max(line["staleness/max"] for line in lines) > 0 and all(line["staleness/max"] <= 2 for line in lines)
    again = run(tmp_path / "again", replay=ahead, debug=False)
    there = json.loads((again / "manifest.json").read_text())["placement"]
    assert [line.partition(": ")[2] for line in there] == ["policy-0, policy-1"]
    without = (*NOT_LEARNED, *UNRECORDED)
    assert learned(again, without) == learned(ahead, without)
    assert recorded(again) == recorded(ahead)
    assert compare(str(ahead), str(again)).endswith("and every byte of the exported weights")
