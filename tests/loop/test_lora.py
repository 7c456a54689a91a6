"""LoRA through the whole loop: what the engines sample from is what the trainer trained, however the weights reach them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.loop.test_methods import train

pytestmark = pytest.mark.engine
LORA = ["policy.lora.rank=8", "policy.learning_rate=1e-2"]


@pytest.mark.parametrize(
    ("method", "publish"),
    [("online_dpo", "merged"), ("online_dpo", "adapter"), ("ppo", "adapter"), ("xpo", "merged")],
)
def test_engines_and_trainer_agree_and_the_policy_moves(method: str, publish: str, tmp_path: Path) -> None:
    more = ["algorithm.reference=previous"] if method == "xpo" else []
    steps = train(method, tmp_path / "run", *LORA, f"policy.lora.publish={publish}", *more)
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[0]["policy/kl"] == pytest.approx(0, abs=1e-6), "policy and reference start as one"
    assert evaluations[-1]["policy/kl_k3"] > 1e-3
    assert all(math.isfinite(step["policy/loss"]) and step["policy/grad_norm"] > 0 for step in steps)
    assert all(step["policy/logprob_gap"] < 1e-4 for step in steps)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    more = [*LORA, "policy.lora.publish=adapter"]
    whole = train("iterative_dpo", tmp_path / "whole", *more)
    train("iterative_dpo", tmp_path / "run", *more, "loop.steps=2", "checkpoint.every=2")
    resumed = train("iterative_dpo", tmp_path / "run", *more, "checkpoint.every=2", resume=True)
    for one, other in zip(resumed, whole, strict=True):
        for name in ("reward/mean", "policy/loss", "policy/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), (one["step"], name)
