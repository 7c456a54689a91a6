"""What cannot be trained is refused from configuration, tokenizer and headers, with the field, the folder and a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from rlhf.config.loader import UserError
from rlhf.training.model import ModelError
from rlhf.training.trainable import check_attention, check_policy, check_vocabulary

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
EXPERTS = dict(head_dim=16, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
GROUPED = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
TRAINABLE = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": dict(sliding_window=8),
    "Qwen3Moe": EXPERTS | dict(num_experts=4),
    "Glm4Moe": EXPERTS | GROUPED,
    "DeepseekV3": EXPERTS | GROUPED | LATENT | dict(head_dim=8),
    "Gemma2": dict(head_dim=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "Gemma3Text": dict(head_dim=16),
    "GPTNeoX": {},
    "OPT": dict(ffn_dim=32, word_embed_proj_dim=32),
}
UNTRAINABLE = {
    "GptOss": (dict(head_dim=16, num_local_experts=4), "GptOssAttention needs s_aux"),
    "Cohere": ({}, "changes its logits .`logit_scale: 0.0625`"),
    "Bloom": ({}, "not every layer of BloomForCausalLM attends"),
    "Mamba": ({}, "MambaForCausalLM"),
    "Qwen3Next": (dict(head_dim=16, num_experts=4), "has layers of linear_attention"),
    "StableLm": ({}, "StableLmAttention is not told where the sequences of a packed row begin"),
    "Bert": ({}, "BertSelfAttention attends to later tokens"),
}


def config_of(kind: str, **more: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**SIZES | more)


def check(config: Any) -> None:
    model = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    check_attention(model, config, "FOLDER", "`policy.model`")


@pytest.mark.parametrize("kind", TRAINABLE)
def test_these_architectures_can_be_trained(kind: str) -> None:
    check(config_of(kind, **TRAINABLE[kind]))


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_these_cannot(kind: str) -> None:
    more, reason = UNTRAINABLE[kind]
    with pytest.raises(ModelError, match=f"`policy.model`: `FOLDER` cannot be trained here: .*{reason}"):
        check(config_of(kind, **more))


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_whole_model_is_accepted(tiny_model: Path) -> None:
    config = check_policy(str(tiny_model))
    check_vocabulary(transformers.AutoTokenizer.from_pretrained(tiny_model), config, str(tiny_model))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 0}, "`hidden_size: 0`, but it must be a whole number at least 1"),
        ({"hidden_size": -64}, "`hidden_size: -64`"),
        ({"hidden_size": "many"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "integer modulo by zero"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads: 0`"),
        ({"num_hidden_layers": 10**9}, "from 1 to 1000"),
        ({"vocab_size": -4}, "`vocab_size: -4`"),
        ({"vocab_size": None}, "'vocab_size' expected int"),
        ({"vocab_size": 256, "pad_token_id": None}, r"`model.embed_tokens.weight` has the shape \[320, 64\] instead of \[256, 64\]"),
        ({"pad_token_id": 400}, "`pad_token_id: 400`, but there are 320 tokens"),
        ({"hidden_act": "magic"}, "KeyError: 'magic'"),
        ({"model_type": "unheard-of"}, "of the type `unheard-of`"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "brings code of its own"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "holds a LlamaForSequenceClassification, not a LlamaForCausalLM"),
        ({"architectures": ["LlamaForRewardModelWithGating"]}, "holds a LlamaForRewardModelWithGating"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal language model"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused(folder: Path, fields: dict[str, Any], words: str) -> None:
    edit(folder, **fields)
    with pytest.raises(UserError, match=words) as refused:
        check_policy(str(folder))
    assert str(refused.value).startswith("`policy.model`: ") and str(folder) in str(refused.value)


def test_a_folder_without_a_readable_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is no JSON"):
        check_policy(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        check_policy(str(folder))


def test_tokens_beyond_the_embedding_are_refused(tiny_model: Path) -> None:
    config = check_policy(str(tiny_model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([f"<{number}>" for number in range(320 - len(tokenizer))])
    check_vocabulary(tokenizer, config, "FOLDER", token_ids=[319])
    tokenizer.add_tokens(["<think>", "</think>"])
    check_vocabulary(tokenizer, config, "FOLDER", token_ids=[319])  # nothing writes them
    words = r"1 token\(s\) .* `</think>` is number 321, and the embedding has 320 rows"
    with pytest.raises(ModelError, match=words) as refused:
        check_vocabulary(tokenizer, config, "FOLDER", token_ids=[5, 321])
    assert "resize_token_embeddings(322)" in str(refused.value)
    tokenizer.chat_template += "<think>"
    with pytest.raises(ModelError, match="`<think>` is number 320"):
        check_vocabulary(tokenizer, config, "FOLDER")
    tokenizer.chat_template = None
    tokenizer.pad_token = "</think>"
    with pytest.raises(ModelError, match="`</think>` is number 321"):
        check_vocabulary(tokenizer, config, "FOLDER")
