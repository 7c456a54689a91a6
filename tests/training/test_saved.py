"""A checkpoint as a model: what is put together from the ranks' files is, to the bit, what the ranks themselves export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.cluster.network import free_port
from rlhf.config import Settings, UserError, show
from rlhf.training.saved import export_saved, open_saved
from tests.training.test_sharded import EXPERTS, GROUPED, SIZES

pytestmark = pytest.mark.engine
CASES: dict[str, dict[str, Any]] = {
    "one-0-bf16": {"zero_stage": 0, "dtype": "bf16"},
    "one-0-fp32": {"zero_stage": 0},
    "one-1-bf16": {"zero_stage": 1, "dtype": "bf16"},
    "one-3-bf16": {"zero_stage": 3, "dtype": "bf16"},
    "two-1-bf16": {"zero_stage": 1, "dtype": "bf16", "ranks": 2},
    "two-2-fp32-lora": {"zero_stage": 2, "ranks": 2, "lora": {"rank": 2}},
    "two-2-fp32": {"zero_stage": 2, "ranks": 2},
    "two-3-bf16": {"zero_stage": 3, "dtype": "bf16", "ranks": 2},
    "two-3-bf16-lora": {"zero_stage": 3, "dtype": "bf16", "ranks": 2, "lora": {"rank": 2}},
    "two-3-bf16-buffer": {"zero_stage": 3, "dtype": "bf16", "ranks": 2, "model": "buffer"},
    "two-3-fp32": {"zero_stage": 3, "ranks": 2},
}
"""The tiny model has tied weights; `buffer` has untied ones, experts, and a buffer in its files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_settings: Callable[..., Settings]) -> Path:
    """Checkpoints and exports of all cases, written by one rank, and by two."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(**SIZES, **EXPERTS, **GROUPED, num_hidden_layers=2, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "buffer")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_model / file, folder / "buffer" / file)
    for name, policy in CASES.items():
        model = {"model": str(folder / policy["model"])} if "model" in policy else {}
        settings = tiny_settings(
            policy={"learning_rate": 1e-2} | policy | model,
            run={"dir": str(folder / name)},
            reward={"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"},
        )
        (folder / name).mkdir()
        (folder / name / "run.yaml").write_text(show(settings))
    environment, root = os.environ | {"OMP_NUM_THREADS": "1"}, Path(__file__).parents[2]
    processes = []
    for ranks in (1, 2):
        port = str(free_port())
        for rank in range(ranks):
            command = [sys.executable, "-m", "tests.training.saved_ranks", str(rank), str(ranks), port, str(folder)]
            processes.append(subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_the_export_is_the_runs_own_to_the_bit(folder: Path, case: str, tmp_path: Path) -> None:
    saved = open_saved(folder / case / "checkpoints" / "step-000002")
    export_saved(saved, saved.settings.model, tmp_path / "out")
    ours, theirs = files(tmp_path / "out"), files(folder / case / "export")
    assert ours == theirs
    before = load_file(Path(saved.settings.model) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(after[name].float(), before[name].float()) for name in after), "something was learned"
    assert ("adapter/adapter_model.safetensors" in ours) == ("lora" in case)


def test_a_model_that_has_moved_is_named_and_another_one_is_refused(folder: Path, tmp_path: Path) -> None:
    saved = open_saved(folder / "one-0-fp32" / "checkpoints" / "step-000002")
    shutil.copytree(saved.settings.model, tmp_path / "moved")
    export_saved(saved, str(tmp_path / "moved"), tmp_path / "out")
    assert files(tmp_path / "out") == files(folder / "one-0-fp32" / "export")
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the model that the run .* started from.*--model"):
        export_saved(saved, str(tmp_path / "moved"), tmp_path / "again")


def test_what_is_no_checkpoint_of_a_policy_is_refused(folder: Path, tmp_path: Path) -> None:
    source = folder / "one-0-fp32" / "checkpoints" / "step-000002"
    copy = shutil.copytree(source, tmp_path / "step-000002")
    file = copy / "policy" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"mp_rank_00_model_states\.pt: the file is damaged"):
        open_saved(copy)
    state = json.loads((source / "state.json").read_text())
    (copy / "SHA256SUMS").unlink()
    for broken in ({}, {"run": {"settings": {"policy": {"model": "m", "knob": 1}}}}):
        (copy / "state.json").write_text(json.dumps({"step": state["step"], **broken}))
        with pytest.raises(UserError, match="version"):
            open_saved(copy)
