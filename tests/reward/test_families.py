"""A reward model says of a batch what transformers says of its texts one by one, in every family, whatever stands for padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from rlhf.reward.models import load_model
from rlhf.reward.reading import Example
from rlhf.reward.unpadded import without_padding
from rlhf.types import Turn

SPECIAL = ["<bos>", "<eos>", "<turn>", "<pad>", "<cls>", "<sep>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<eos>{% endfor %}"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "num_labels": 1,
}
CAUSAL = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": CAUSAL,
    "Qwen2": CAUSAL,
    "Qwen3": CAUSAL,
    "Mistral": CAUSAL | {"sliding_window": 16},
    "Gemma2": CAUSAL | {"sliding_window": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "GPTNeoX": {},
    "Bert": {},
    "DistilBert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "Roberta": {"max_position_embeddings": 772},
    "ModernBert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "DebertaV2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
}
OWN_PADDING = ("Roberta",)
"""Families that count positions by the padding's id and cannot be without."""

PROMPT = (Turn("system", "Be kind."), Turn("user", "Which film?"), Turn("assistant", "A sad one?"), Turn("user", "No."))
TEXTS = [
    Example((Turn("user", "Hi"),), "Good."),
    Example(PROMPT, "A film that one forgets on the way home."),
    Example(PROMPT, ""),
    Example(PROMPT[1:], "It ends <eos> and goes on<eos>"),
    Example((Turn("user", "<pad> Which? <pad>"),), "Alien. " * 9 + "<pad>"),
]


def make_tokenizer(**special: Any) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[(name, core.token_to_id(name)) for name in ("<cls>", "<sep>")]
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", **special)
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, family: str, tokenizer: Any, padding: int | None, **sizes: Any) -> None:
    """A random classifier whose configuration calls this token padding."""
    torch.manual_seed(0)
    given = FAMILIES[family] if family != "GPT2" else FAMILIES[family] | {"vocab_size": 300}
    common = SIZES if family != "GPT2" else {"num_labels": 1}
    ends = {"bos_token_id": 256, "eos_token_id": 257, "cls_token_id": 260, "sep_token_id": 261}
    config = getattr(transformers, f"{family}Config")(**common | ends | given | sizes | {"pad_token_id": padding})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        torch.nn.init.normal_(matrix, std=0.3)  # so that what is read shows in the output
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one_by_one(folder: Path, texts: list[Example]) -> np.ndarray:
    """What transformers alone makes of each text; with soft-caps by the family's own attention, since sdpa leaves them out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    for text in texts:
        turns = [turn.message() for turn in (*text.prompt, Turn("assistant", text.response))]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits.item())
    return np.array(found)


PADDING: dict[str, tuple[dict[str, Any], int | None]] = {
    "none": ({}, None),
    "none, as the tokenizer's is its EOS": ({"pad_token": "<eos>"}, None),
    "of its own": ({"pad_token": "<pad>", "padding_side": "left"}, 259),
    "of the configuration: EOS": ({}, 257),
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_texts_one_by_one(family: str, padding: str, tmp_path: Path) -> None:
    special, id_ = PADDING[padding]
    if id_ is None and family in OWN_PADDING:
        pytest.skip("this family cannot be without a padding token")
    save(tmp_path, family, make_tokenizer(bos_token="<bos>", **special), id_)
    expected = one_by_one(tmp_path, TEXTS)
    assert np.ptp(expected) > 0.05, "the texts must differ, or any rewards would do"
    model = load_model(str(tmp_path), what="conversation")
    np.testing.assert_allclose(model.score(TEXTS), expected, atol=2e-4)
    without_padding(model)  # where it can
    np.testing.assert_allclose(model.score(TEXTS), expected, atol=2e-4)
