"""Adapters on small models, by independent formulas: where they start, what they add, what their gradient is, what leaves training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.config.policy import LoraSettings
from rlhf.training import lora
from rlhf.training.cpu_products import FastLinear
from rlhf.training.loading import load_causal_lm, save_causal_lm
from rlhf.training.model import LogProbModel, ModelError, checkpoint_activations
from rlhf.training.packing import pack
from rlhf.training.weights import described_weights, whole_weights
from rlhf.types import Assignment, TrainingItem
from tests.helpers import make_rollout

SETTINGS = LoraSettings(rank=4, alpha=6.0)
SCALING = 1.5
SIZES = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}
ROW = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tied embeddings; an output layer of its own and biases; matrices that are stored transposed."""
    if request.param == "llama":
        return str(tiny_model)
    made = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    if request.param == "qwen2":
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = Qwen2ForCausalLM(
            Qwen2Config(hidden_size=64, intermediate_size=96, tie_word_embeddings=False, **heads, **SIZES)
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=512, **SIZES))
    model.save_pretrained(made)
    return str(made)


def adapted(folder: str, settings: LoraSettings = SETTINGS, frozen: tuple[str, ...] = ()) -> torch.nn.Module:
    torch.manual_seed(3)
    model = load_causal_lm(folder, "fp32")
    lora.add_adapters(model, settings, frozen)
    return model


def move(model: torch.nn.Module, name: str = lora.POLICY) -> None:
    """As if the adapter had learned something."""
    for parameter in lora.adapter_parameters(model, name):
        torch.nn.init.normal_(parameter, std=0.2)


def plain(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logprobs(model: LogProbModel) -> torch.Tensor:
    rollout = make_rollout([[7, 8, 9, 10], [12, 13]], (1, 5, 9, 4))
    made = Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(2)))
    return model(pack([made], [rollout.completions.value], torch.device("cpu")))[0]


def test_a_fresh_adapter_is_the_base_and_only_it_learns(folder: str) -> None:
    model, base = adapted(folder), load_causal_lm(folder, "fp32")
    assert torch.equal(logprobs(LogProbModel(model, 4)), logprobs(LogProbModel(base, 4)))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    assert len(learning) == len(list(lora.adapter_parameters(model, lora.POLICY)))


def test_merged_weights_have_the_names_of_the_files_and_the_values_of_the_adapted_model(folder: str) -> None:
    model, base = adapted(folder), plain(folder)
    names = [(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in base.named_parameters()]
    assert described_weights(model) == names
    move(model)
    assert all(torch.equal(tensor, base.get_parameter(name)) for name, tensor in whole_weights(model))
    merged = dict(whole_weights(model, lora.POLICY))
    assert list(merged) == [name for name, *_ in names]
    for name, layer in lora.adapted_layers(model):
        product = layer.lora_B[lora.POLICY].weight @ layer.lora_A[lora.POLICY].weight * SCALING
        product = product.T if isinstance(base, GPT2LMHeadModel) else product
        assert torch.allclose(merged[f"{name}.weight"] - base.get_parameter(f"{name}.weight"), product, atol=1e-6)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base.get_parameter(name))}
    assert changed == {f"{name}.weight" for name, _ in lora.adapted_layers(model)}
    expected = logprobs(LogProbModel(model, 4))
    packed = load_causal_lm(folder, "fp32")
    packed.load_state_dict(merged, strict=False)
    assert torch.allclose(logprobs(LogProbModel(packed, 4)), expected, atol=1e-4)
    assert (logprobs(LogProbModel(load_causal_lm(folder, "fp32"), 4)) - expected).abs().max() > 0.1


def test_the_output_layer_and_embeddings_are_left_alone(folder: str) -> None:
    names = {name.rpartition(".")[2] for name, _ in lora.adapted_layers(adapted(folder))}
    assert names and not names & {"lm_head", "embed_tokens", "wte", "wpe"}


def test_the_gradient_is_the_projection_of_the_full_gradient(folder: str) -> None:
    """With W' = W + s B A and G = dL/dW': dL/dB = s G A^T and dL/dA = s B^T G."""
    model = adapted(folder)
    move(model)
    full = load_causal_lm(folder, "fp32")
    full.load_state_dict(dict(whole_weights(model, lora.POLICY)), strict=False)
    logprobs(LogProbModel(model, 4)).sum().backward()
    logprobs(LogProbModel(full, 4)).sum().backward()
    for name, layer in lora.adapted_layers(model):
        gradient = full.get_parameter(f"{name}.weight").grad
        gradient = gradient.T if isinstance(full, GPT2LMHeadModel) else gradient
        first, second = layer.lora_A[lora.POLICY].weight, layer.lora_B[lora.POLICY].weight
        scale = gradient.abs().max() * SCALING
        assert torch.allclose(second.grad, SCALING * gradient @ first.T, atol=1e-3 * scale), name
        assert torch.allclose(first.grad, SCALING * second.T @ gradient, atol=1e-3 * scale), name
    assert all(parameter.grad is None for parameter in lora.base_parameters(model))


def counted(model: LogProbModel) -> tuple[torch.Tensor, int]:
    """Log-probs, and how many numbers are kept for their gradient."""
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return logprobs(model), sum(sizes)


def test_checkpointed_activations_give_the_same_gradient(folder: str) -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = adapted(folder)
        move(model)
        if checkpointing:
            checkpoint_activations(model)
        made, size = counted(LogProbModel(model, 4))
        kept.append(size)
        made.sum().backward()
        gradients.append([parameter.grad for parameter in lora.adapter_parameters(model, lora.POLICY)])
    assert all(torch.allclose(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2, "activations are not kept"


def test_other_adapters_share_the_base_and_take_turns(tiny_model: Path) -> None:
    model = adapted(str(tiny_model), frozen=("reference",))
    head, base = LogProbModel(model, 4), logprobs(LogProbModel(load_causal_lm(str(tiny_model), "fp32"), 4))
    for mine, theirs in zip(
        lora.adapter_parameters(model, "reference"), lora.adapter_parameters(model, lora.POLICY), strict=True
    ):
        assert torch.equal(mine, theirs) and not mine.requires_grad
    move(model)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    policy = logprobs(head)
    with lora.adapter_in_use(model, None), torch.no_grad():
        assert torch.equal(logprobs(head), base)
    with lora.adapter_in_use(model, "reference"), torch.no_grad():
        assert torch.equal(logprobs(head), base), "its product is still zero"
    move(model, "reference")
    with lora.adapter_in_use(model, "reference"), torch.no_grad():
        other = logprobs(head)
    assert min((other - policy).abs().max(), (other - base).abs().max()) > 0.1
    assert torch.equal(logprobs(head), policy)
    assert learning == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    logprobs(head).sum().backward()
    assert all(parameter.grad is None for parameter in lora.adapter_parameters(model, "reference"))


def test_peft_reads_the_files_and_the_merged_export_is_an_ordinary_model(folder: str, tmp_path: Path) -> None:
    model = adapted(folder)
    move(model)
    merged = {name: tensor.clone() for name, tensor in whole_weights(model, lora.POLICY)}
    save_causal_lm(model, merged, folder, str(tmp_path))
    weights = {name: tensor.clone() for name, tensor in lora.adapter_weights(model)}
    assert lora.described_adapter(model) == [(n, t.dtype, tuple(t.shape)) for n, t in weights.items()]
    lora.save_adapter(tmp_path / "adapter", lora.adapter_config(SETTINGS, folder), weights)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (4, 6.0, folder)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == weights.keys()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain(folder), tmp_path / "adapter")(ROW).logits
        ours = plain(str(tmp_path))(ROW).logits
        base = plain(folder)(ROW).logits
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert (ours - base).abs().max() > 0.1


def test_bf16_merges_in_fp32_and_the_adapter_computes_like_the_rest(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), "bf16")
    lora.add_adapters(model, SETTINGS)
    move(model)
    name, layer = next(lora.adapted_layers(model))
    exact = layer.lora_B[lora.POLICY].weight.double() @ layer.lora_A[lora.POLICY].weight.double() * SCALING
    exact += layer.base_layer.weight.double()
    assert torch.equal(dict(whole_weights(model, lora.POLICY))[f"{name}.weight"], exact.bfloat16())
    assert all(
        isinstance(part, FastLinear) for part in (layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values())
    )


def test_some_layers_only(tiny_model: Path) -> None:
    model = adapted(str(tiny_model), LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    assert [name for name, _ in lora.adapted_layers(model)] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "no_such_layer"])
def test_layers_that_cannot_be_adapted_are_refused(tiny_model: Path, target: str) -> None:
    with pytest.raises(lora.LoraError, match=f"policy.lora.target_modules: .*{target}"):
        adapted(str(tiny_model), LoraSettings(rank=2, target_modules=[target]))


def test_experts_that_are_one_tensor_are_refused() -> None:
    """peft would wrap them in another way, and neither their product nor their names would reach the files."""
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    experts = dict(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, first_k_dense_replace=0)
    config = Glm4MoeConfig(**sizes, **experts)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        lora.LoraError, match="policy.lora.target_modules: all-linear matches the experts model.layers.0.mlp.experts"
    ):
        lora.add_adapters(model, SETTINGS)
    model = AutoModelForCausalLM.from_config(config)
    lora.add_adapters(model, LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    plain = AutoModelForCausalLM.from_config(config)
    assert described_weights(model) == described_weights(plain)


def test_four_bits_need_bitsandbytes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="policy.lora.quantize_base: bitsandbytes is not installed"):
        load_causal_lm(str(tiny_model), "bf16", "4bit")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_base_in_four_bits_is_merged_as_it_computes(tiny_model: Path, dtype: str, tmp_path: Path) -> None:
    """What is published and exported is the rounded base plus the product, not the original base plus the product."""
    pytest.importorskip("bitsandbytes")
    model = load_causal_lm(str(tiny_model), dtype, "4bit")
    lora.add_adapters(model, SETTINGS)
    move(model)
    original = load_causal_lm(str(tiny_model), dtype)
    names = [(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in original.named_parameters()]
    assert described_weights(model) == names
    rounded = dict(whole_weights(model))
    error = (rounded["model.norm.weight"] - original.model.norm.weight).abs().max()
    assert error == 0, "norms, embeddings and output layer keep their precision"
    name = "model.layers.0.mlp.up_proj.weight"
    error = (rounded[name] - original.get_parameter(name)).float().std() / original.get_parameter(name).float().std()
    assert 0.03 < error < 0.15
    merged = {name: tensor.clone() for name, tensor in whole_weights(model, lora.POLICY)}
    save_causal_lm(model, merged, str(tiny_model), str(tmp_path))
    exported = load_causal_lm(str(tmp_path), dtype)
    assert not hasattr(exported.config, "quantization_config")
    gap = (logprobs(LogProbModel(exported, 4)) - logprobs(LogProbModel(model, 4))).abs().max()
    assert gap < (1e-4 if dtype == "fp32" else 0.2)
    with torch.no_grad():
        ours = logprobs(LogProbModel(model, 4))
    assert torch.equal(ours, logprobs(LogProbModel(model, 4))), "the same with and without gradient"
