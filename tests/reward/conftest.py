"""A tiny encoder and a tiny classifier with random weights, and rollouts made of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.types import Completion, Prompt, Rollout

SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session")
def encoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT encoder with the byte tokenizer of the tiny model."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT sequence classifier with one label."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_text_rollout(tiny_model: Path) -> Callable[..., Rollout]:
    """`make(texts, keep=...)`: a rollout of responses with an end-of-sequence token; `keep` makes the reference."""
    from transformers import AutoTokenizer

    from rlhf.cluster import LocalRef

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(
        texts: Sequence[str], keep: Callable = LocalRef, cut: Sequence[int] = (), prompt: str = "Say it."
    ) -> Rollout:
        completions = []
        for index, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if index not in cut:
                ids = [*ids, tokenizer.eos_token_id]
            ids = np.array(ids, np.int32)
            reason = "length" if index in cut else "stop"
            completions.append(Completion.of_one_version("p", ids, np.zeros(len(ids), np.float32), 0, reason))
        return Rollout(Prompt("p", (1,), prompt, {"n": 3}), tuple(c.info() for c in completions), keep(completions))

    return make
