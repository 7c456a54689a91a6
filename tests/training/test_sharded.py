"""Loading under ZeRO-3 on two ranks: no rank holds the whole model at any time, and what is loaded and learned is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.cluster.network import free_port
from tests.training.divided import ON_TWO_RANKS
from tests.training.sharded_ranks import PORTION

KINDS = ("tied", "untied", "experts", "buffer", "latent", "twice")
SIZES: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
GROUPED = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
LATENT |= dict(head_dim=8, num_key_value_heads=2)


def configurations() -> dict[str, Any]:
    return {
        "tied": transformers.LlamaConfig(**SIZES, num_hidden_layers=10, tie_word_embeddings=True),
        "untied": transformers.LlamaConfig(**SIZES, num_hidden_layers=10, tie_word_embeddings=False),
        "experts": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=8, num_experts=4),
        "buffer": transformers.Glm4MoeConfig(**SIZES, **EXPERTS, **GROUPED, num_hidden_layers=8),
        "latent": transformers.DeepseekV3Config(**SIZES | EXPERTS | GROUPED | LATENT, num_hidden_layers=8),
    }


def change(source: Path, folder: Path, **more: torch.Tensor | None) -> None:
    """A copy of a model with other tensors; None leaves one out."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()} | more
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    for kind, config in configurations().items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, tensor in model.state_dict().items():
            if tensor.dim() >= 2 or name.endswith("bias"):
                tensor.normal_(std=0.1)
        model.save_pretrained(folder / kind, max_shard_size="300KB")
        (folder / kind / "generation_config.json").unlink()
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tied", num_labels=1)
    classifier.save_pretrained(folder / "critic")
    head = load_file(next((folder / "tied").glob("*1-of-*")))["model.embed_tokens.weight"]
    # A tied tensor that is there twice, and an old buffer, which nobody wants, as a portion of its own.
    harmless = {"lm_head.weight": head.clone(), "model.f.rotary_emb.inv_freq": torch.zeros(PORTION)}
    change(folder / "tied", folder / "twice", **harmless)
    change(folder / "tied", folder / "different", **{"lm_head.weight": head + 1})
    change(folder / "untied", folder / "nohead", **{"lm_head.weight": None})
    change(
        folder / "untied", folder / "unfinite", **{"model.layers.9.mlp.up_proj.weight": torch.full((96, 64), torch.inf)}
    )
    port, environment = str(free_port()), os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.sharded_ranks"]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, str(folder)], cwd=root, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, error = rank.communicate(timeout=300)
        assert rank.returncode == 0, error[-3000:]
    return folder


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_ever_holds_the_whole_model(folder: Path, kind: str) -> None:
    for rank, report in enumerate(reports(folder)):
        loaded = report["loaded"][kind]
        assert loaded["resident"] < 0.51 * loaded["whole"]
        portion = max(4 * PORTION, loaded["largest"])
        # Rank 0 has a portion as it was read, as it was fused, and on the device; the others have it on the device alone.
        assert loaded["peak"] < loaded["resident"] + (4 if rank == 0 else 2) * portion
        assert loaded["peak"] < 0.85 * loaded["whole"]


def test_an_unsharded_load_would_have_been_seen(folder: Path) -> None:
    for report in reports(folder):
        assert report["unsharded"] > report["loaded"]["untied"]["whole"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_an_unsharded_load(folder: Path, kind: str) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    expected, loaded = plain.state_dict(), load_file(folder / f"loaded-{kind}.safetensors")
    if kind in ("tied", "twice"):
        del expected["lm_head.weight"]
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_training_step_is_that_of_stage_2(folder: Path, trained: str) -> None:
    two, three = (load_file(folder / f"{trained}-{stage}.safetensors") for stage in (2, 3))
    before = load_file(folder / "loaded-buffer.safetensors")
    assert two.keys() == three.keys() == before.keys()
    # Where a gradient is nearly zero, Adam makes rounding as large as a step.
    moved = sum((two[name] - before[name]).abs().sum() for name in two)
    assert moved > 1 and sum((two[name] - three[name]).abs().sum() for name in two) < 1e-4 * moved
    assert all(torch.allclose(two[name], three[name], atol=5e-4) for name in two)


def test_every_rank_refuses_with_the_same_words(folder: Path) -> None:
    one, two = (report["refused"] for report in reports(folder))
    assert one == two
    assert "`model.layers.9.mlp.up_proj.weight` holds numbers that are not finite" in one["unfinite"]
    assert "`lm_head.weight` is missing" in one["nohead"]
    assert "are one tensor by its config.json" in one["different"]


def test_the_critic_has_the_reward_models_head(folder: Path) -> None:
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "critic").score.weight.tolist()
    assert all(report["head"] == expected for report in reports(folder))


def test_two_ranks_divide_their_gradient_at_the_end(folder: Path) -> None:
    """As one rank does in test_divided.py."""
    for report in reports(folder):
        assert report["divided"] == [[0, 0]] * len(ON_TWO_RANKS)
