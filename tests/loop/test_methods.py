"""Every method through the whole loop: the real vLLM and DeepSpeed in one process, on the tiny model."""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.algorithms import make
from rlhf.config import Settings, load
from rlhf.config.algorithm import METHODS
from rlhf.loop.run import Training
from tests.helpers import unknown_metrics

pytestmark = pytest.mark.engine
STEPS = 3

CONFIG = """
data: {{prompts: asset:tiny-prompts.jsonl, eval_prompts: asset:tiny-prompts.jsonl, max_prompt_tokens: 128}}
policy: {{model: asset:tiny-llama, dtype: fp32, learning_rate: 1e-3, micro_batch_tokens: 2048}}
rollout: {{max_tokens: 12, cpu_kv_cache_gb: 0.1, enforce_eager: true}}
reward: {{kind: function, path: "tests.helpers:mean_byte"}}
loop: {{steps: {steps}, prompts_per_step: 6, eval_limit: 4}}
tracking: {{console: "off"}}
checkpoint: {{every: 0, export: false}}
cluster: {{device: cpu, threads: 1}}
algorithm: {{name: {method}}}
"""

# Away from the defaults where these would hide what the method does.
OPTIONS: dict[str, list[str]] = {
    "iterative_dpo": ["algorithm.samples_per_prompt=3", "loop.updates_per_step=2", "loop.epochs_per_step=2"],
    "ipo_md": ["algorithm.mixture=0.5"],
    "selm": ["algorithm.ranked_with=samples", "algorithm.fresh_samples=3", "algorithm.alpha=0.1"],
    "xpo": ["algorithm.alpha=0.01"],
    "ppo": ["algorithm.kl_target=0.5", "algorithm.critic_learning_rate=1e-3", "loop.updates_per_step=2"],
    "grpo": ["algorithm.samples_per_prompt=4", "algorithm.entropy_coef=0.01"],
    "nash_ema": ["algorithm.opponent_decay=0.5"],
}


def settings(method: str, folder: Path, *more: str) -> Settings:
    path = folder.with_suffix(".yaml")
    path.write_text(CONFIG.format(steps=STEPS, method=method))
    return load(path, [f"run.dir={folder}", *OPTIONS.get(method, []), *more])


def train(method: str, folder: Path, *more: str, resume: bool = False) -> list[dict[str, Any]]:
    """The metrics of each step."""
    asyncio.run(Training(settings(method, folder, *more), debug=True, resume=resume).run())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[dict[str, Any]]]]:
    """A method's run: its folder, and the metrics of each step."""

    @functools.cache
    def once(method: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(method) / "run"
        return folder, train(method, folder)

    return once


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_and_moves_the_policy(whole: Callable, method: str, tmp_path: Path) -> None:
    folder, steps = whole(method)
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    assert evaluations[0]["policy/kl"] == pytest.approx(0, abs=1e-6), "policy and reference start as one"
    assert evaluations[-1]["policy/kl"] != 0
    assert unknown_metrics(folder) == set()
    assert all(math.isfinite(step["policy/loss"]) and step["policy/grad_norm"] > 0 for step in steps)
    for step in steps:
        gaps = [step.get(f"policy/{name}", 0.0) for name in ("logprob_gap", "probe_gap", "probe_gap_partner")]
        assert all(gap < 1e-4 for gap in gaps), "engine and trainer agree after each publication"
        assert "policy/logprob_gap" in step or "policy/probe_gap" in step, "on what was learned from, or on a probe"
        assert ("policy/probe_gap_partner" in step) == make(settings(method, tmp_path / "again")).mixes


@pytest.mark.parametrize("method", ["online_dpo", "selm"])
def test_the_first_loss_of_the_logistic_link_is_that_of_no_preference(whole: Callable, method: str) -> None:
    """At pi = ref: log 2."""
    assert whole(method)[1][0]["policy/loss"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("method", ["online_ipo", "ipo_md"])
def test_the_first_loss_of_the_square_link_is_that_of_no_preference(method: str, tmp_path: Path) -> None:
    """At pi = ref: 1/(4 tau^2) with hard labels."""
    first = train(method, tmp_path / "run", "loop.steps=1", "algorithm.labels=hard", "algorithm.tau=0.5")[0]
    assert first["policy/loss"] == pytest.approx(1.0, rel=1e-4)


def test_a_reference_that_moves_is_published_to_the_engines_that_sample_from_it(tmp_path: Path) -> None:
    """XPO's second response is the reference's, here that of a policy that moved far in the first step, or of the start."""
    options = ["algorithm.alpha=0", "policy.learning_rate=1e-2"]
    fixed = train("xpo", tmp_path / "fixed", *options)
    moved = train("xpo", tmp_path / "moved", *options, "algorithm.reference=previous")
    assert moved[0]["rollout/logprob"] == fixed[0]["rollout/logprob"], "the first step has one reference in both runs"
    assert moved[1]["rollout/logprob"] != fixed[1]["rollout/logprob"]
    assert moved[1]["policy/loss"] == pytest.approx(math.log(2), rel=1e-4), "policy and reference are one in each round"
    assert fixed[1]["policy/loss"] != pytest.approx(math.log(2), rel=1e-2)


@pytest.mark.parametrize("method", ["iterative_dpo", "ppo", "nash_ema"])
def test_a_resumed_run_equals_the_uninterrupted_one(whole: Callable, method: str, tmp_path: Path) -> None:
    """With what moves besides the policy: a reference, a critic and an adaptive KL, an average in the engines."""
    _, expected = whole(method)
    train(method, tmp_path / "run", "loop.steps=2", "checkpoint.every=2")
    resumed = train(method, tmp_path / "run", "checkpoint.every=2", resume=True)
    for one, other in zip(resumed, expected, strict=True):
        for name in ("reward/mean", "policy/loss", "policy/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), (one["step"], name)
