"""Models from their files and back: nothing is made up, nothing is left out, and what was not learned comes out as it went in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.data.model_folder import find_model
from rlhf.data.weight_files import WeightsError, read_headers
from rlhf.training.loading import load_causal_lm, save_causal_lm
from rlhf.training.model import ModelError
from rlhf.training.weights import described_weights, whole_weights

SIZES = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
EXPERTS = dict(head_dim=16, num_experts_per_tok=2, moe_intermediate_size=16)
GROUPED = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
LATENT |= dict(head_dim=8, num_key_value_heads=2)
KINDS = {
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "experts": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4),
    "buffer": transformers.Glm4MoeConfig(**SIZES, **EXPERTS, **GROUPED, tie_word_embeddings=False),
    "latent": transformers.DeepseekV3Config(**SIZES | EXPERTS | GROUPED | LATENT),
}
ROW = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    """Folder of a model with sharp weights, buffers that are not zero, and the tiny model's tokenizer."""

    def make(kind: str, **options: str) -> Path:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(KINDS[kind])
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.dim() >= 2 or name.endswith("bias"):
                    tensor.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder, **options)
        transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return folder

    return make


def export(source: Path, folder: Path, dtype: str = "fp32") -> Path:
    model = load_causal_lm(str(source), dtype)
    weights = {name: tensor.clone() for name, tensor in whole_weights(model)}
    assert described_weights(model) == [(name, t.dtype, tuple(t.shape)) for name, t in weights.items()]
    save_causal_lm(model, weights, str(source), str(folder))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one-file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_learned_comes_out_as_it_went_in(
    made: Callable[..., Path], kind: str, options: dict[str, str], tmp_path: Path
) -> None:
    source = made(kind, **options)
    assert (len(list(source.glob("*.safetensors"))) > 1) == bool(options)
    before, after = tensors(source), tensors(export(source, tmp_path / "export"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    one, two = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "export")
    )
    with torch.no_grad():
        assert torch.equal(one(ROW).logits, two(ROW).logits)


def test_tokenizer_template_and_generation_settings_are_kept(made: Callable[..., Path], tmp_path: Path) -> None:
    source = made("untied")
    # transformers reads these settings and refuses to write them.
    settings = {"eos_token_id": [257, 300], "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(settings))
    exported = export(source, tmp_path / "export")
    assert json.loads((exported / "generation_config.json").read_text()) == settings
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, exported))
    assert after.chat_template == before.chat_template is not None
    turns = [{"role": "user", "content": "Ucayali?"}]
    assert after.apply_chat_template(turns, tokenize=False) == before.apply_chat_template(turns, tokenize=False)
    assert after.get_vocab() == before.get_vocab()


def test_generation_settings_of_a_hubs_model_are_kept(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that is named, not a folder: as a hub's cache holds it."""
    cached = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(made("untied"), cached / "snapshots" / "0")
    (cached / "snapshots" / "0" / "generation_config.json").write_text('{"eos_token_id": [257, 300]}')
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = find_model("owner/name", "`policy.model`")
    model = load_causal_lm(found, "fp32")
    save_causal_lm(model, dict(whole_weights(model)), found, str(tmp_path / "export"))
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == {"eos_token_id": [257, 300]}


def test_the_exports_type_is_the_trained_one(made: Callable[..., Path], tmp_path: Path) -> None:
    exported = export(made("buffer"), tmp_path / "export", "bf16")
    headers = read_headers(exported, "here")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {tensor.dtype for name, tensor in headers.items() if name != bias} == {"BF16"}
    assert headers[bias].dtype == "F32", "the architecture keeps it in fp32"
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "name"), [("untied", "lm_head.weight"), ("buffer", "model.layers.1.mlp.gate.e_score_correction_bias")]
)
def test_missing_and_unfinite_weights_are_refused_by_name(made: Callable[..., Path], kind: str, name: str) -> None:
    folder = made(kind)
    weights = tensors(folder)
    weights[name].view(-1)[1] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=f"policy.model: .*`{name}` holds numbers that are not finite"):
        load_causal_lm(str(folder), "fp32")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=f"policy.model: .*`{name}` is missing"):
        load_causal_lm(str(folder), "fp32")


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="policy.model: cannot load a causal language model from"):
        load_causal_lm(str(tmp_path / "nothing"), "fp32")
