"""Weights against the architecture that should hold them: what a loader would invent, ignore or break on is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.data.architecture import REPORTED, architecture_of, check_finite, check_folder, check_loaded
from rlhf.data.weight_files import SINGLE, WeightsError

SIZES = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
EXPERTS = dict(head_dim=8, num_experts_per_tok=2, moe_intermediate_size=16)
GLM = EXPERTS | dict(
    n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, partial_rotary_factor=0.5
)
CONFIGS = {
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "experts": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4),
    "buffer": transformers.Glm4MoeConfig(**SIZES, **GLM),
    "post-norms": transformers.Gemma2Config(**SIZES, head_dim=8),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a model, in as many files as asked for."""

    def make(kind: str, **options: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder, **options)
        return folder

    return make


def check(folder: Path, auto: type = transformers.AutoModelForCausalLM, **options: tuple[str, ...]) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    check_folder(folder, architecture_of(auto, config), config, "`policy.model`", **options)


def change(folder: Path, leave_out: str = "", **more: torch.Tensor) -> None:
    weights = load_file(folder / SINGLE) | more
    weights.pop(leave_out, None)
    save_file(weights, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one-file", "shards"])
def test_what_transformers_writes_is_whole(saved: Callable[..., Path], kind: str, options: dict[str, str]) -> None:
    folder = saved(kind, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
    check(folder)


def test_quantized_weights_are_the_quantizers_and_only_their_files_are_looked_at(saved: Callable[..., Path]) -> None:
    folder = saved("untied")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "mxfp4"}
    scale = torch.zeros(4, dtype=torch.float8_e8m0fnu)
    change(folder, "lm_head.weight", **{"lm_head.weight_blocks": torch.zeros(4, dtype=torch.uint8), "scale": scale})
    check_folder(folder, transformers.LlamaForCausalLM, config, "`reward.path`")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        check_folder(folder, transformers.LlamaForCausalLM, config, "`reward.path`")


MISSING = {
    "untied": "lm_head.weight",
    "tied": "model.embed_tokens.weight",
    "experts": "model.layers.0.mlp.experts.1.gate_proj.weight",
    "buffer": "model.layers.1.mlp.gate.e_score_correction_bias",
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_tensor_is_named(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    change(folder, leave_out=MISSING[kind])
    with pytest.raises(WeightsError, match=MISSING[kind]) as refused:
        check(folder)
    assert str(refused.value).startswith(f"`policy.model`: the weights in `{folder}` are not those of a ")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("extra.weight", (3,), "`extra.weight` is not part of the model"),
        ("model.norm.weight", (3,), r"`model.norm.weight` has the shape \[3\] instead of \[16\]"),
        (
            "model.layers.0.mlp.experts.1.down_proj.weight",
            (16, 3),
            r"experts.1.down_proj.weight` has the shape \[16, 3\]",
        ),
    ],
)
def test_other_tensors_are_named(saved: Callable[..., Path], name: str, shape: tuple[int, ...], words: str) -> None:
    folder = saved("experts")
    change(folder, **{name: torch.zeros(shape)})
    with pytest.raises(WeightsError, match=words):
        check(folder)


def test_old_buffers_are_harmless(saved: Callable[..., Path]) -> None:
    folder = saved("untied")
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    check(folder)


def test_what_is_new_may_be_missing(saved: Callable[..., Path]) -> None:
    folder, classifier = saved("tied"), transformers.AutoModelForSequenceClassification
    with pytest.raises(WeightsError, match="`score.weight` is missing"):
        check(folder, classifier)
    check(folder, classifier, new=("score.weight",))


def test_pickled_weights_are_compared_too(saved: Callable[..., Path]) -> None:
    folder = saved("untied")
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check(folder)
    del weights["lm_head.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="`lm_head.weight` is missing"):
        check(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(WeightsError, match="pytorch_model.bin cannot be read"):
        check(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_named(number: float, dtype: torch.dtype) -> None:
    good = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    check_finite([("good", good), ("none", good[:0]), ("count", torch.tensor(3))], "here")
    bad = good.clone()
    bad[3, 2] = number
    with pytest.raises(WeightsError, match="here: `bad` holds numbers that are not finite"):
        check_finite([("good", good), ("bad", bad)], "here")


def test_loaded_weights_are_checked_alike(saved: Callable[..., Path]) -> None:
    folder = saved("untied")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **REPORTED)
    check_loaded(model, info, folder, "here")
    change(folder, leave_out="lm_head.weight", **{"model.norm.weight": torch.zeros(3)})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **REPORTED)
    with pytest.raises(WeightsError, match="`lm_head.weight` is missing; `model.norm.weight` has the shape"):
        check_loaded(model, info, folder, "here")
