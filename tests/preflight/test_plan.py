"""The plan: its arithmetic is the run's, and what cannot work is refused in words before any weights are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import Settings, UserError, load
from rlhf.data.assets import resolve
from rlhf.preflight.memory import engine_weights, model_shape, policy_memory
from rlhf.preflight.plan import describe

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def tiny(*overrides: str) -> Settings:
    return load(TINY, overrides)


def test_the_plan_spells_out_the_arithmetic() -> None:
    plan = describe(tiny("loop.prompts_per_step=12", "loop.updates_per_step=2", "loop.epochs_per_step=3"))
    for words in (
        "12 prompts x 4 responses = 48 responses, at most 12 pairs",
        "12 prompts / (2 updates x 2 ranks) = about 3 prompts per rank",
        "5 steps x 2 updates x 3 epochs = 30 optimizer steps",
        "at most 768 response tokens, 384 per engine",
        "2 x vLLM engine",
        "2 x DeepSpeed rank (fp32, ZeRO 1)",
        "wandb: off",
        "runs/tiny",
    ):
        assert words in plan


def test_debug_mode_has_one_of_each() -> None:
    plan = describe(tiny(), debug=True)
    assert "1 x vLLM engine" in plan and "1 x DeepSpeed rank" in plan and "debug mode" in plan


def test_no_weights_are_read(tmp_path: Path) -> None:
    """A folder with a configuration and a tokenizer but no weights is enough for a plan."""
    for file in Path(resolve("asset:tiny-llama")).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "policy and reference" in describe(tiny(f"policy.model={tmp_path}"))


def test_parameters_are_counted_as_the_real_model_counts_them() -> None:
    path = resolve("asset:tiny-llama")
    real = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(path).parameters())
    assert model_shape(AutoConfig.from_pretrained(path)).parameters == real


def test_memory_follows_precision_and_sharding() -> None:
    shape = model_shape(AutoConfig.from_pretrained(resolve("asset:tiny-llama")))
    plain = policy_memory(shape, tiny("policy.zero_stage=0").policy)
    assert plain.policy == plain.reference == plain.gradients == 4 * shape.parameters
    assert plain.optimizer == 8 * shape.parameters and plain.host == 0
    sharded = policy_memory(shape, tiny("policy.zero_stage=3").policy)
    for part in ("policy", "reference", "gradients", "optimizer"):
        assert getattr(sharded, part) == getattr(plain, part) / 2
    bf16 = policy_memory(shape, tiny("policy.dtype=bf16", "policy.ranks=1").policy)
    assert bf16.policy == 2 * shape.parameters and bf16.optimizer == 12 * shape.parameters
    offloaded = policy_memory(shape, tiny("policy.offload_optimizer=cpu").policy)
    assert offloaded.optimizer == 0 and offloaded.host == 4 * shape.parameters
    checkpointed = policy_memory(shape, tiny("policy.gradient_checkpointing=true").policy)
    assert checkpointed.activations < plain.activations
    settings = tiny("rollout.dtype=bf16", "rollout.tensor_parallel_size=2")
    assert engine_weights(shape, settings.rollout, settings.policy) == shape.parameters


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.model=./no/such/folder"], ["`policy.model`", "there is no folder"]),
        (["policy.model=asset:tiny-lama"], ["asset:tiny-llama"]),
        (["data.prompts=none.jsonl"], ["none.jsonl"]),
        (["data.max_prompt_tokens=3"], ["data.max_prompt_tokens"]),
        (["loop.prompts_per_step=1000"], ["`loop.prompts_per_step`", "holds 40"]),
        (["rollout.max_tokens=4000", "policy.micro_batch_tokens=9000"], ["`rollout.max_tokens`", "context"]),
        (["reward.path=no_such_module:f"], ["`reward.path`", "no_such_module"]),
        (["reward.path=rlhf.reward.functions:nothing"], ["`reward.path`", "nothing"]),
        (["reward.kind=model", "reward.path=no/model"], ["`reward.path`", "rlhf reward train"]),
        (["algorithm.name=no_such_module:f"], ["algorithm.name", "no_such_module"]),
    ],
)
def test_what_cannot_work_is_refused(overrides: Sequence[str], words: Sequence[str]) -> None:
    with pytest.raises(UserError) as caught:
        describe(tiny(*overrides))
    for word in words:
        assert word in str(caught.value)


def test_a_model_folder_must_be_a_causal_language_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.model"):
        describe(tiny(f"policy.model={tmp_path}"))
    tiny_model = Path(resolve("asset:tiny-llama"))
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny_model / "config.json").read_text()) | {"model_type": "vit", "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"policy\.model"):
        describe(tiny(f"policy.model={tmp_path}"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_missing_gpus_are_named() -> None:
    with pytest.raises(UserError, match=r"needs 4 GPU\(s\).*--debug"):
        describe(tiny("cluster.device=cuda", "rollout.cpu_kv_cache_gb=1"))
