"""The plan: its arithmetic is the run's, and what cannot work is refused in words before any weights are read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.algorithms import Algorithm, make
from rlhf.config import Settings, UserError, load, yamls
from rlhf.data.assets import resolve
from rlhf.preflight.plan import describe

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def tiny(*overrides: str) -> Settings:
    return load(TINY, ["run.dir=runs/none-of-this-name", *overrides])


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
        "runs/none-of-this-name",
    ):
        assert words in plan


def with_method(tmp_path: Path, algorithm: dict[str, Any], *overrides: str) -> Settings:
    """The tiny run with another method."""
    raw = yamls.parse(Path(TINY).read_text()) | {"algorithm": algorithm}
    path = tmp_path / "run.yaml"
    path.write_text(yamls.dump(raw))
    return load(path, overrides)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (
            {"name": "online_dpo", "samples_per_prompt": 4, "pairing": "all"},
            ["4 by the policy", "at most 48 pairs", "34 + 4 x 16 = 98 tokens", "the starting policy, unchanged"],
        ),
        (
            {"name": "ipo_md"},
            [
                "2 by the mixture policy^0.875 reference^0.125",
                "a second model beside the policy, the reference",
                "for two models",
            ],
        ),
        (
            {"name": "nash_ema"},
            [
                "1 by the policy, 1 by the partner",
                "a partner: an average of the policy, of which 0.999 stays",
                "partner 0.4 MiB",
            ],
        ),
        (
            {"name": "ppo", "critic_warmup_steps": 2},
            [
                "critic: starts from the policy's body with a fresh head; in the first 2 steps only it learns",
                "critic 1.3 MiB",
            ],
        ),
        (
            {"name": "iterative_dpo", "reference_every": 2},
            ["the policy at the start of the round; 3 rounds of 2 steps"],
        ),
        (
            {"name": "selm", "ranked_with": "samples", "reference": "extrapolated"},
            ["1 by the policy, greedily, 2 by the policy", "moved on by 0.3 of its last change; 5 rounds of 1 step"],
        ),
        ({"name": "xpo"}, ["1 by the policy, 1 by the reference", "1e-05 x log pi"]),
        (
            {"name": "tests.preflight.test_plan:own"},
            ["an algorithm of your own", "of which your algorithm makes its items"],
        ),
    ],
)
def test_each_method_in_words(tmp_path: Path, algorithm: dict[str, Any], words: Sequence[str]) -> None:
    plan = describe(with_method(tmp_path, algorithm))
    for word in words:
        assert word in plan


def test_prompts_that_take_the_place_of_others_are_counted(tmp_path: Path) -> None:
    plan = describe(with_method(tmp_path, {"name": "online_dpo"}, "loop.refill=2"))
    assert "sampled in a step: at most 768 response tokens" in plan, "three times 8 prompts x 2 x 16"
    assert "prompts drawn: 40 = 1.00 times the file, and at most 80 in place of those" in plan


def own(settings: Settings) -> Algorithm:
    """A user's algorithm: online DPO as it stands."""
    return replace(make(load(TINY)), name="mine")


def test_an_own_algorithm_that_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algorithm\.name.*no_such_module"):
        describe(with_method(tmp_path, {"name": "no_such_module:f"}))


def test_a_method_that_needs_pairs_says_so_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny-prompts.*:1: no fields `chosen` and `rejected`.*ranked_with=samples"):
        describe(with_method(tmp_path, {"name": "selm"}))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(f'{{"prompt": "p{i}", "chosen": "yes", "rejected": "no"}}' for i in range(8)))
    settings = with_method(tmp_path, {"name": "iterative_dpo", "pairs": "dataset"}, f"data.prompts={path}")
    plan = describe(settings)
    assert "responses to each prompt: the data set's chosen and rejected" in plan and "judged by none" in plan


def test_the_critics_reward_model_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algorithm\.critic_model`: there is no folder"):
        describe(with_method(tmp_path, {"name": "ppo", "critic_model": str(tmp_path / "none")}))
    model = Path(resolve("asset:tiny-llama"))
    with pytest.raises(UserError, match=r"a llama of hidden size 64 with 2 labels.*critic_model: null"):
        describe(with_method(tmp_path, {"name": "ppo", "critic_model": str(model)}))
    config = json.loads((model / "config.json").read_text()) | {"num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    critic = {"name": "ppo", "critic_model": str(tmp_path)}
    with pytest.raises(UserError, match=r"`algorithm\.critic_model`: .* is a LlamaForCausalLM"):
        describe(with_method(tmp_path, critic))
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(tmp_path)
    assert f"starts from {tmp_path}" in describe(with_method(tmp_path, critic))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"`algorithm\.critic_model`: .*`score\.weight` is missing"):
        describe(with_method(tmp_path, critic))


def test_a_pairwise_function_is_looked_at(tmp_path: Path) -> None:
    good = ["reward.kind=pairwise_function", "reward.path=rlhf.reward.functions:prefers_more_letter_a"]
    assert "the pairwise function rlhf.reward.functions:prefers_more_letter_a" in describe(tiny(*good))
    with pytest.raises(UserError, match=r"must take 4 arguments"):
        describe(tiny(*good, "reward.path=rlhf.reward.functions:share_of_letter_a"))


def test_canaries_are_looked_at(tmp_path: Path) -> None:
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text('{"good": "a", "bad": "b"}\n')
    describe(tiny(f"reward.canaries={canaries}"))
    canaries.write_text('{"good": "a"}\n')
    with pytest.raises(UserError, match=r"canaries\.jsonl:1: a pair needs"):
        describe(tiny(f"reward.canaries={canaries}"))


def test_every_prompt_has_what_the_verifier_needs(tmp_path: Path) -> None:
    lines = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4"}]
    prompts = tmp_path / "sums.jsonl"
    overrides = ("reward.kind=verifier", "reward.path=math", f"data.prompts={prompts}", "loop.prompts_per_step=2")
    settings = tiny(*overrides, "data.eval_prompts=null", "loop.eval_every=0")
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "the verifier math" in describe(settings)
    del lines[1]["answer"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"sums\.jsonl: prompt \w{16} \(`2\+2\?`\): field `answer`: missing"):
        describe(settings)


def test_an_llm_judges_tokenizer_is_looked_at(tmp_path: Path) -> None:
    judge = resolve("asset:tiny-llama")
    settings = tiny("reward.kind=llm_judge", f"reward.path={judge}")
    assert f"the LLM judge {judge}" in describe(settings)
    question = tmp_path / "question.txt"
    question.write_text("{prompt} {a}?")
    with pytest.raises(UserError, match=r"has no \{b\}"):
        describe(tiny("reward.kind=llm_judge", f"reward.path={judge}", f"reward.judge_prompt={question}"))


def test_debug_mode_has_one_of_each() -> None:
    plan = describe(tiny(), debug=True)
    assert "1 x vLLM engine" in plan and "1 x DeepSpeed rank" in plan and "debug mode" in plan


def copy_of_the_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve("asset:tiny-llama"), tmp_path / "model"))


def test_no_weights_are_read_but_their_headers(tmp_path: Path) -> None:
    """Files with a header and nothing but holes behind it are enough for a plan."""
    model = copy_of_the_model(tmp_path)
    file = model / "model.safetensors"
    size, (length,) = file.stat().st_size, struct.unpack("<Q", file.read_bytes()[:8])
    os.truncate(file, 8 + length)
    with pytest.raises(UserError, match=r"`policy\.model`: .*model\.safetensors is truncated"):
        describe(tiny(f"policy.model={model}"))
    os.truncate(file, size)
    assert "policy and reference" in describe(tiny(f"policy.model={model}"))
    file.unlink()
    with pytest.raises(UserError, match=r"`policy\.model`: there are no weights in"):
        describe(tiny(f"policy.model={model}"))


def test_the_weights_must_be_those_of_the_model(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.extra"] = weights.pop("model.norm.weight")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"`model\.norm\.weight` is missing; `model\.layers\.0\.extra` is not part of the model"
    ):
        describe(tiny(f"policy.model={model}"))


def test_every_token_must_have_an_embedding(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(100)])
    tokenizer.save_pretrained(model)
    describe(tiny(f"policy.model={model}"))  # nothing writes those that are too many
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"<99> {number}"}) + "\n" for number in range(8)))
    with pytest.raises(
        UserError, match=r"`policy\.model`: the tokenizer of .* `<99>` is number \d+, and the embedding has 320 rows"
    ):
        describe(tiny(f"policy.model={model}", f"data.prompts={prompts}"))


@pytest.mark.parametrize("target", ["no_such_layer", "lm_head", "embed_tokens"])
def test_layers_that_cannot_be_adapted_are_refused(target: str) -> None:
    describe(tiny("policy.lora.rank=2", "policy.lora.target_modules=[q_proj]"))
    with pytest.raises(UserError, match=rf"policy\.lora\.target_modules: .*{target}"):
        describe(tiny("policy.lora.rank=2", f"policy.lora.target_modules=[{target}]"))


def test_an_architecture_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    sinks = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    gpt = config | {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]} | sinks
    (model / "config.json").write_text(json.dumps(gpt))
    with pytest.raises(UserError, match=r"`policy\.model`: .* cannot be trained here: GptOssAttention needs s_aux"):
        describe(tiny(f"policy.model={model}"))


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
