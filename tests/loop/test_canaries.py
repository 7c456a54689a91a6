"""A run that is judged by a service elsewhere: the service goes wrong, and nothing is learned from that step."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from rlhf.config import Settings
from rlhf.loop.run import Training
from rlhf.reward.serving.canaries import CanaryAlarm
from tests.reward import sample_rewards
from tests.reward.services import TOKEN, reward_service

pytestmark = pytest.mark.engine


def test_a_service_that_changes_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_REWARD_TOKEN", TOKEN)
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text(json.dumps({"prompt": "canary", "good": "a longer one", "bad": "short"}) + "\n")
    sections = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"prompts": "asset:tiny-prompts.jsonl", "max_prompt_tokens": 128},
        "policy": {"model": "asset:tiny-llama", "dtype": "fp32", "micro_batch_tokens": 2048},
        "rollout": {"max_tokens": 8, "cpu_kv_cache_gb": 0.1, "enforce_eager": True},
        "loop": {"steps": 5, "prompts_per_step": 4},
        "tracking": {"console": "off"},
        "checkpoint": {"every": 0, "export": False},
        "cluster": {"device": "cpu", "threads": 1},
    }
    served = {"kind": "function", "path": "tests.reward.sample_rewards:tiring"}
    sample_rewards.CANARIES_SEEN[0] = 0
    with reward_service(Settings(**sections, reward=served)) as url:
        asked = {"kind": "remote", "url": url, "canaries": str(canaries), "canaries_every": 1}
        training = Training(Settings(**sections, reward=asked), debug=True, resume=False)
        with pytest.raises(CanaryAlarm, match=":1, good 'a longer one'"):
            asyncio.run(training.run())
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["reward/canary_accuracy"] == 1.0 and step["reward/canary_drift"] == 0.0 for step in steps)
    assert all(step["reward/mean"] > 0 and step["reward/failed"] == 0 for step in steps)
