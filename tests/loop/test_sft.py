"""`rlhf sft` through the command line: it learns, a killed run goes on as if nothing had happened, and mistakes are named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main
from rlhf.config import ConfigError, show
from rlhf.config.sft_checks import load_sft
from tests.helpers import unknown_metrics

ROOT = Path(__file__).parents[2]
ANSWERS = {
    "sea": "Jaws",
    "ship": "Titanic",
    "toys": "Toy Story",
    "space": "Alien",
    "mafia": "The Godfather",
    "boxing": "Rocky",
}
ROWS = [{"prompt": f"A film about {what}?", "response": film} for what, film in ANSWERS.items()] + [
    {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you!"},
    ]},
    {"prompt": "Name a " + "very " * 60 + "long film.", "response": "Satantango"},
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    """A YAML file that memorises eight rows, of which one is too long."""
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "sft.yaml"
    path.write_text(f"""\
run:
  dir: {tmp_path / "run"}
data:
  examples: {examples}
  eval_examples: {examples}
  max_tokens: 64
  too_long: drop
policy:
  model: {tiny_model}
  dtype: fp32
  learning_rate: 1e-2
  schedule: linear
  warmup_steps: 2
  micro_batch_tokens: 64
training:
  epochs: 30
  batch_size: 3
  eval_every: 30
checkpoint:
  every: 5
cluster:
  device: cpu
  threads: 1
""")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rlhf.cli", "sft", str(config), "tracking.console=off", *overrides]
    threads = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # as here: others would sum in another order
    return subprocess.Popen(command, cwd=ROOT, env=threads, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen) -> None:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-4000:]


@pytest.mark.engine
def test_it_memorises_and_a_killed_run_equals_the_uninterrupted_one(config: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    here = ["sft", str(config), "tracking.console=off", "--debug"]
    assert main([*here, f"run.dir={whole}"]) == 0
    process = start(config, f"run.dir={killed}", "--debug")
    try:
        end = time.monotonic() + 240
        while not (killed / "metrics.jsonl").exists() or len(lines(killed / "metrics.jsonl")) < 12:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert len(lines(killed / "metrics.jsonl")) < 90, "it was killed under way"
    assert main([*here, f"run.dir={killed}", "--resume"]) == 0
    assert unknown_metrics(whole) == set()
    expected, got = lines(whole / "metrics.jsonl"), lines(killed / "metrics.jsonl")
    assert [line["step"] for line in got] == list(range(1, 91))
    for one, other in zip(got, expected, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
    assert [line["step"] for line in lines(killed / "evaluations.jsonl")] == [0, 30, 60, 90]
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (whole, killed)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])
    assert lines(whole / "evaluations.jsonl")[-1]["heldout/loss"] < 0.05
    assert answers(whole / "export") == ANSWERS


def answers(folder: Path) -> dict[str, str]:
    """What the export says, greedily, up to the end of sequence that it has learned to write."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = {}
    for what in ANSWERS:
        chat = [{"role": "user", "content": f"A film about {what}?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        whole = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert whole[-1] == tokenizer.eos_token_id
        said[what] = tokenizer.decode(whole[:-1])
    return said


@pytest.mark.engine
def test_lora_on_two_ranks_exports_a_merged_model_and_the_adapter(config: Path, tmp_path: Path) -> None:
    finish(start(config, "policy.ranks=2", "policy.lora.rank=4", "training.epochs=2", "checkpoint.every=0"))
    notes = lines(tmp_path / "run" / "evaluations.jsonl")
    assert notes[-1]["heldout/loss"] < notes[0]["heldout/loss"]
    assert (tmp_path / "run" / "export" / "adapter" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    placement = json.loads((tmp_path / "run" / "manifest.json").read_text())["placement"]
    assert "policy-0, policy-1" in placement[0]


def test_the_dry_run_says_what_would_be_learned(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sft", str(config), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "7 examples of up to" in shown and "1 left out (too_long)" in shown
    assert "90 optimizer steps: 30 epoch(s) of 3" in shown
    assert not (tmp_path / "run").exists()


def test_the_dry_run_refuses_weights_that_are_not_the_models(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, tiny_model: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main(["sft", str(config), "--dry-run", f"policy.model={model}"]) == 2
    assert "`model.norm.weight` is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.batchsize=3", "`training.batchsize` is not a known field. Did you mean `training.batch_size`?"),
        ("rollout.engines=2", "`rollout` is not a known section"),
        ("data.prompts=x", "`data.prompts` is not a known field"),
        ("data.max_tokens=none", "`data.max_tokens` must be a whole number"),
        ("policy.micro_batch_tokens=63", "`policy.micro_batch_tokens`: a budget of 63 tokens does not hold the longest example, of 64"),
        ("run.invariants=false", "`run.invariants` is unused by `rlhf sft`"),
        ("cluster.placement=colocated", "`cluster.placement` is unused by `rlhf sft`"),
        ("tracking.samples_per_step=1", "`tracking.samples_per_step` is unused by `rlhf sft`"),
        ("policy.lora.publish=adapter", "`policy.lora.publish` is unused by `rlhf sft`"),
        ("policy.lora.alpha=4", "`policy.lora.alpha`: nothing is adapted"),
        ("policy.offload_optimizer=cpu", "`policy.offload_optimizer`: with `cluster.device: cpu`"),
        ("data.eval_examples=null", "`training.eval_every`: a held-out loss every 30 steps needs held-out examples"),
        ("data.response_field=prompt", "`data.response_field`: prompt and response cannot both be the field `prompt`"),
        ("data.chat_template=false data.system_prompt=x", "`data.system_prompt` is a message of a chat"),
        ("cluster.policy_nodes=2", "`cluster.policy_nodes`"),
        ("cluster.node_resources={reward: big}", "`cluster.node_resources`: `rlhf sft` has the role policy only, not reward"),
    ],
)  # fmt: skip
def test_mistakes_are_named(config: Path, override: str, says: str) -> None:
    parts = override.split(" ") if "{" not in override else [override]
    with pytest.raises(ConfigError) as caught:
        load_sft(config, parts)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.examples=nowhere.jsonl", "nowhere.jsonl: no such file. Set data.examples"),
        ("policy.model=./nowhere", "`policy.model`: there is no folder `./nowhere`"),
        ("data.too_long=error", "examples.jsonl:8: the example has"),
        ("policy.warmup_steps=91", "a warm-up of 91 optimizer steps never ends, because the examples make 90 of them"),
        ("data.max_tokens=1000 policy.micro_batch_tokens=1000", "`data.max_tokens`: examples of up to 1000 tokens"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, says: str
) -> None:
    for options in ([], ["--dry-run"]):
        assert main(["sft", str(config), *override.split(), *options]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_settings_survive_a_round_trip(config: Path, tmp_path: Path) -> None:
    settings = load_sft(config, ["policy.lora.rank=8"])
    (tmp_path / "again.yaml").write_text(show(settings))
    assert load_sft(tmp_path / "again.yaml") == settings


def test_the_demo_configuration_is_valid() -> None:
    settings = load_sft(ROOT / "configs" / "movie_reviews" / "sft.yaml")
    assert settings.data.response_field == "snippet"
