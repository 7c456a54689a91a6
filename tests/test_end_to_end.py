"""The whole system through the command line, on the tiny model with the real vLLM, DeepSpeed and Ray.

Runs with Ray are processes of their own, as a user starts them; those in one process (`--debug`) are calls of the same `main` here, which
spares each the seconds that vLLM and DeepSpeed take to import.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from tests.helpers import unknown_metrics

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent
STEPS = 5
UNEVALUATED = ("data.eval_prompts=null", "loop.eval_every=0")


def arguments(folder: Path, *overrides: str) -> list[str]:
    plain = ("tracking.console=plain", f"run.dir={folder}", "cluster.device=cpu")
    return ["train", str(ROOT / "configs" / "tiny.yaml"), *plain, *overrides]


def train(folder: Path, *overrides: str) -> None:
    """A run with all roles in this process."""
    assert main(arguments(folder, "cluster.threads=1", *overrides, "--debug")) == 0


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    """What is said of a run that a user can put right."""
    capsys.readouterr()
    assert main(arguments(folder, *overrides)) == 2
    return capsys.readouterr().err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e") / "debug"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands of docs/getting_started.md were given, in their order, with the output that it shows."""
    folder = tmp_path_factory.mktemp("walk")
    shutil.copytree(ROOT / "configs", folder / "configs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "getting_started.md").read_text(), re.DOTALL):
        for command, shown in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", block, re.MULTILINE):
            # The answers of one engine are those of two, and each of the two models would start as many.
            fewer = " rollout.engines=1" if command.startswith("rlhf eval ") else ""
            done = subprocess.run(
                command + fewer,
                shell=True,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            refused = shown.startswith("rlhf: ")
            assert done.returncode == (2 if refused else 0), f"{command}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
            said = done.stderr if refused else done.stdout
            assert says(said, shown), f"{command} does not say what is shown:\n{said[-6000:]}"
    return folder


def plain(text: str) -> str:
    """Any figure is as good as another, and so is the width of a column."""
    return re.sub(r"[ ]+", " ", re.sub(r"[+-]?\d[\d.,]*(e-?\d+)?", "0", text))


def says(said: str, shown: str) -> bool:
    """Whether the output is what a page shows, where `...` stands for any lines."""
    parts = [re.escape(part) for part in plain(shown).split("...\n")]
    return re.search("(?:.*\n)*?".join(parts), plain(said)) is not None


@pytest.fixture(scope="module")
def ray_run(walked: Path) -> Path:
    """Two rollout engines and two policy ranks as Ray actors."""
    return walked / "runs" / "tiny"


def test_the_run_folder_is_complete(ray_run: Path) -> None:
    assert [line["step"] for line in lines(ray_run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(ray_run / "evaluations.jsonl")] == [0, STEPS]
    assert unknown_metrics(ray_run) == set()
    manifest = json.loads((ray_run / "manifest.json").read_text())
    assert (manifest["seed"], manifest["dtype"]) == (0, "fp32: as `policy.dtype` says")
    assert (ray_run / "checkpoints" / f"step-{STEPS:06d}" / "state.json").exists()
    assert (ray_run / "export" / "model.safetensors").exists()
    assert len(lines(ray_run / "heldout_before.jsonl")) == len(lines(ray_run / "heldout_after.jsonl")) > 0
    versions = {line["step"]: line["weight_version"] for line in lines(ray_run / "samples.jsonl")}
    assert versions == {step: step - 1 for step in range(1, STEPS + 1)}, "every step samples from the weights before it"


def test_the_first_step_shows_what_theory_says(ray_run: Path, debug_run: Path) -> None:
    for folder in (ray_run, debug_run):
        first = lines(folder / "metrics.jsonl")[0]
        assert first["policy/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["policy/kl"] == pytest.approx(0, abs=1e-6)
        for line in lines(folder / "metrics.jsonl"):
            assert line["policy/logprob_gap"] < 1e-4, "the engine and the trainer agree after each publish"
        assert lines(folder / "metrics.jsonl")[-1]["policy/kl"] != 0
    assert all(line["policy/probe_gap"] < 1e-4 for line in lines(ray_run / "metrics.jsonl")), "each of the two engines"


def test_the_last_checkpoint_of_two_ranks_is_exported_as_the_run_exported_it(ray_run: Path) -> None:
    written, own = (
        {file.name: file.read_bytes() for file in (ray_run / name).iterdir()}
        for name in (f"export-step-{STEPS:06d}", "export")
    )
    assert written == own


def test_ray_and_debug_mode_are_the_same_run(ray_run: Path, debug_run: Path) -> None:
    """Two engines and two ranks, or one of each in one process: the same seed gives the same samples and nearly the same numbers."""
    for one, other in zip(lines(ray_run / "metrics.jsonl"), lines(debug_run / "metrics.jsonl"), strict=True):
        for name in ("reward/mean", "rollout/tokens", "policy/loss", "policy/kl", "policy/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=1e-5), (one["step"], name)
    responses = [[row["response"] for row in lines(folder / "samples.jsonl")] for folder in (ray_run, debug_run)]
    assert responses[0] == responses[1]


def test_mixtures_are_the_same_run_in_ray_and_debug_mode(tmp_path: Path) -> None:
    """From two ranks and an engine with two models. That a critic learns the same on two ranks is shown in tests/policy, and what two
    receivers make of weights for one of two models in tests/rollout/test_mixture.py."""
    options = ("algorithm.name=ipo_md", "reward.path=tests.helpers:mean_byte", "rollout.engines=1")
    quick = (*options, *UNEVALUATED, "loop.steps=3", "checkpoint.every=0", "checkpoint.export=false")
    command = [sys.executable, "-m", "rlhf.cli", *arguments(tmp_path / "ray", *quick)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-6000:]}"
    train(tmp_path / "debug", *quick)
    both = zip(*(lines(tmp_path / mode / "metrics.jsonl") for mode in ("ray", "debug")), strict=True)
    for one, other in both:
        assert max(line[f"policy/probe_gap{half}"] for line in (one, other) for half in ("", "_partner")) < 1e-4
        for name in ("reward/mean", "rollout/tokens", "policy/loss", "policy/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=1e-5), (one["step"], name)


def test_a_resumed_run_equals_the_uninterrupted_one(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(folder, "loop.steps=3", "checkpoint.every=3")
    assert "already holds a run" in refused(capsys, folder, "--debug")
    train(folder, "--resume")
    for one, other in zip(lines(folder / "metrics.jsonl"), lines(debug_run / "metrics.jsonl"), strict=True):
        for name in ("reward/mean", "policy/loss", "policy/grad_norm", "loop/epoch"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
    assert "run.seed" in refused(capsys, folder, "--debug", "--resume", "run.seed=1")


def test_online_dpo_learns(tmp_path: Path) -> None:
    """The share of the letter a in held-out responses, which random weights put near chance, becomes most of them."""
    folder = tmp_path / "run"
    train(folder, "loop.steps=60", "loop.prompts_per_step=16", "checkpoint.every=0", "checkpoint.export=false")
    before, after = (line["reward/mean"] for line in lines(folder / "evaluations.jsonl"))
    assert before < 0.05
    assert after > 0.3


def test_rewards_that_fail_stop_the_run_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, tmp_path / "run", "--debug", "reward.path=tests.helpers:broken_reward")
    assert "responses got no verdict" in said
    assert "reward.max_failed_fraction" in said
    assert "the reward is broken" in said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.prompts=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("policy.model=nowhere", "policy.model"),
        ("reward.path=rlhf.reward.functions:nothing", "reward.path"),
        ("loop.prompts_per_step=1000", "loop.prompts_per_step"),
        ("data.max_prompt_tokens=8", "data.max_prompt_tokens=8"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    assert says in refused(capsys, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_generate_and_eval_from_the_export(walked: Path, ray_run: Path) -> None:
    rows = lines(walked / "answers.jsonl")
    assert [row["prompt"] for row in rows] == ["Name bread."] * 2 + ["Name tea."] * 2
    assert all(0 < row["length"] <= 8 for row in rows)
    result = json.loads((walked / "figures.json").read_text())
    assert 0 <= result["win_rate_interval"][0] <= result["win_rate"] <= result["win_rate_interval"][1] <= 1
    after = lines(ray_run / "evaluations.jsonl")[-1]
    assert result["policy"]["reward"] == pytest.approx(after["reward/mean"], abs=1e-6), "the export is the policy"
    before = lines(ray_run / "evaluations.jsonl")[0]
    assert result["baseline"]["reward"] == pytest.approx(before["reward/mean"], abs=1e-6)
