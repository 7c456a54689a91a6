"""Bit for bit, with the real vLLM and DeepSpeed: the loop at `loop.staleness` 0 is the synchronous one, a replay its recorded run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config import load
from rlhf.loop import run as running
from rlhf.loop.judged import JudgedRollout
from rlhf.loop.online import OnlineLoop
from rlhf.loop.replay import UNRECORDED, compare
from rlhf.loop.run import train
from rlhf.tracking import jsonl
from rlhf.tracking.responses import read_step
from tests.loop.test_synchronous import plain_step

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
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
NORMALISED = "reward.transforms=[{name: normalise}]"
AHEAD = (
    "loop.staleness=2",
    "rollout.engines=2",
    "policy.ranks=2",
    "reward.path=tests.helpers:mean_byte",
    "loop.refill=0",
)
NOT_LEARNED = ("time", "idle/", "throughput/", "loop/ready", "warnings")


def run(folder: Path, *overrides: str, replay: Path | None = None) -> Path:
    """A run in this folder and process, from its configuration or from that of the run that is replayed."""
    settings = load(configured(folder, replay), [f"run.dir={folder}", *overrides])
    train(settings, debug=True, replay=None if replay is None else str(replay))
    return folder


def run_in_ray(folder: Path, *overrides: str, replay: Path | None = None) -> Path:
    """The same by the command, in a Ray of its own: this process may be in the one of other tests."""
    again = [] if replay is None else ["--replay", str(replay)]
    command = [sys.executable, "-m", "rlhf.cli", "train", str(configured(folder, replay)), f"run.dir={folder}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *overrides, *again], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def configured(folder: Path, replay: Path | None) -> Path:
    config = folder.with_suffix(".yaml")
    config.write_text(CONFIG if replay is None else (replay / "config.yaml").read_text())
    return config


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


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run(tmp_path_factory.mktemp("synchronous") / "run", NORMALISED)
    assert any(line["refill/prompts"] for line in jsonl.read(folder / "metrics.jsonl"))
    return folder


class Plain(OnlineLoop):
    """The same roles under the plain statement of the synchronous step, which does not watch whether the run learns anything."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.progress = SimpleNamespace(require=lambda: None, require_any=lambda: None)

    @asynccontextmanager
    async def producing(self) -> AsyncIterator[None]:
        yield

    async def step(self) -> list[JudgedRollout]:
        return await plain_step(self)


def test_at_staleness_0_the_loop_is_the_plain_one(
    synchronous: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "OnlineLoop", Plain)
    plain = run(tmp_path / "plain", NORMALISED, "tracking.responses=false")
    assert learned(plain) == learned(synchronous)


def test_a_synchronous_run_is_replayed(synchronous: Path, tmp_path: Path) -> None:
    again = run(tmp_path / "again", replay=synchronous)
    assert learned(again) == learned(synchronous)
    assert recorded(again) == recorded(synchronous)


def test_an_asynchronous_run_of_two_engines_and_two_ranks_is_replayed(tmp_path: Path) -> None:
    """In Ray; the replay has two ranks and nobody else."""
    ahead = run_in_ray(tmp_path / "ahead", *AHEAD)
    lines = jsonl.read(ahead / "metrics.jsonl")
    assert max(line["staleness/max"] for line in lines) > 0 and all(line["staleness/max"] <= 2 for line in lines)
    again = run_in_ray(tmp_path / "again", replay=ahead)
    there = json.loads((again / "manifest.json").read_text())["placement"]
    assert [line.partition(": ")[2] for line in there] == ["policy-0, policy-1"]
    without = (*NOT_LEARNED, *UNRECORDED)
    assert learned(again, without) == learned(ahead, without)
    assert recorded(again) == recorded(ahead)
    assert compare(str(ahead), str(again)).endswith("and every byte of the exported weights")
