"""The benchmarks' own arithmetic, and the driver's in miniature."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from rlhf.config import show
from rlhf.config.settings import Settings

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("script", ["driver"], indirect=True)
def test_the_loop_over_stand_ins_learns_from_every_prompt(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TOKEN_S", 1e-4)
    monkeypatch.setattr(script, "VERDICT_S", 1e-3)
    args = argparse.Namespace(engines=3, in_flight=30, staleness=2, steps=5)
    found = asyncio.run(script.measure(script.make_settings(args, tmp_path / "run")))
    assert found["completions"] == 5 * 10 * script.SAMPLES_PER_PROMPT
    assert found["cpu_s_per_completion"] * found["completions"] == pytest.approx(found["cpu_s"])
    assert 30 <= found["most_in_flight"] <= 30 + 3  # and each engine's probe
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["loop/prompts_trained"] for step in steps] == [10] * 5
    assert max(step["staleness/max"] for step in steps) <= 2


def span(who: str, what: str, start: float, stop: float, **facts: object) -> dict:
    return {"who": who, "what": what, "start": start, "stop": stop, "step": 3, **facts}


@pytest.mark.parametrize("script", ["ahead"], indirect=True)
def test_the_bubble_is_what_the_longer_part_idles(script: ModuleType) -> None:
    """Two counted steps between the seconds 10 and 30. The engine writes for 6 of them, the policy learns for 15."""
    steps = [{"step": step, "time": 10.0 * (step - 1), "rollout/tokens": 40} for step in range(1, 3)]
    steps += [{"step": 3, "time": 18.0, "rollout/tokens": 60}, {"step": 4, "time": 30.0, "rollout/tokens": 40}]
    spans = [
        span("engine-0", "sample", 8, 12, tokens=[10]),  # 2 of these seconds are before
        span("engine-0", "sample", 11, 14, tokens=[10]),
        span("engine-0", "sample", 25, 29, tokens=[30]),
        span("policy", "learn", 12, 18),
        span("policy", "learn", 20, 29),
        span("policy", "publish", 27, 29),  # 2 of the engine's seconds too
        span("policy", "learn", 30, 40),
    ]
    found = script.measured(steps, spans, 2)
    assert found["seconds_per_step"] == 10
    assert found["busy"] == pytest.approx({"engine": 6 / 20, "policy": 15 / 20})
    assert (found["longer"], found["bubble"]) == ("policy", pytest.approx(0.25))
    assert found["publish_seconds_per_step"] == 1
    assert found["tokens_per_s"] == 5
    assert [step["seconds"] for step in found["steps"]] == [8, 12]

    synchronous = found | {"seconds_per_step": 15.0, "bubble": 0.5, "busy_seconds_per_step": {"engine": 6, "policy": 8}}
    ratios = script.ratios({"staleness_0": synchronous, "staleness_1": found})
    assert ratios["staleness_1/seconds_over_synchronous"] == pytest.approx(10 / 15)
    assert ratios["staleness_1/step_over_longer_part"] == pytest.approx(4 / 3)
    assert ratios["staleness_1/step_over_longer_part_alone"] == pytest.approx(10 / 8)


@pytest.mark.parametrize("script", ["staleness_curves"], indirect=True)
def test_complete_runs_of_one_size_become_curves(script: ModuleType, tmp_path: Path) -> None:
    for bound, seed, reward in ((0, 0, 1.0), (0, 1, 2.0), (4, 0, 3.0)):
        folder = tmp_path / f"staleness-{bound}-seed-{seed}-2x3"
        folder.mkdir()
        settings = Settings.model_validate(
            {
                "run": {"seed": seed},
                "data": {"prompts": "asset:movie-reviews/train_prompts.jsonl"},
                "policy": {"model": "asset:smollm2-135m-instruct"},
                "reward": {"kind": "function", "path": "rlhf.data.tiny:reward"},
                "algorithm": {"name": "online_dpo"},
                "loop": {"staleness": bound},
            }
        )
        (folder / "config.yaml").write_text(show(settings))
        steps = [{"step": 1, "rollout/responses": 6.0, "time/step": 30.0}]
        steps += [{"step": 2, "rollout/responses": 6.0, "time/step": 30.0, "staleness/mean": float(bound)}]
        line = {"policy/kl": 0.1, "rollout/length": 5.0}
        evaluations = [{"step": 0, "reward/mean": 0.0, **line}, {"step": 2, "reward/mean": reward, **line}]
        for name, lines in (("metrics", steps), ("evaluations", evaluations)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    folder.joinpath("heldout_after.jsonl").touch()
    assert [one["staleness"] for one in script.read_runs(tmp_path, "2x3")] == [4], "the others are not complete"
    for other in tmp_path.iterdir():
        other.joinpath("heldout_after.jsonl").touch()
    runs = list(script.read_runs(tmp_path, "2x3"))
    assert not list(script.read_runs(tmp_path, "2x4"))
    assert [point["samples"] for point in runs[0]["curve"]] == [0, 12]
    assert "| 4 | 0 | 12 | 2.00 | +0.00 to +3.00 | 0.100 | 5.0 | 1.0 |" in script.table(runs)
    script.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
