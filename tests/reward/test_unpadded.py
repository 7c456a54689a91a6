"""Reward models without padding: the same outputs as with it, of every architecture, or the padded way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlhf.reward.folders import Description
from rlhf.reward.models import RewardModel, load_any_model, new_model
from rlhf.reward.modules import Classifier
from rlhf.reward.reading import Example
from rlhf.reward.unpadded import without_padding
from tests.reward.conftest import SIZES

TEXTS = ["Good.", "A film that one forgets on the way home.", "", "Great fun, " * 8]
CAUSAL = {"num_key_value_heads": 1, "head_dim": 8}


def random_classifier(name: str, tokenizer: Any, **sizes: Any) -> RewardModel:
    """A random classifier of this architecture."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id} | sizes
    config = getattr(transformers, f"{name}Config")(**sizes)
    module = getattr(transformers, f"{name}ForSequenceClassification")(config)
    for matrix in (parameter for parameter in module.parameters() if parameter.dim() > 1):
        torch.nn.init.normal_(matrix, std=0.5)  # so that what is read shows in the output
    return RewardModel(Classifier(module).eval(), tokenizer, Description("classifier", "response", 100))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def scores(model: RewardModel) -> np.ndarray:
    return model.score([Example((), text) for text in TEXTS])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Bert", {}),
        ("Llama", CAUSAL),
        ("Qwen2", CAUSAL),
        ("Mistral", CAUSAL | {"sliding_window": 16}),
        ("DistilBert", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}),
    ],
)
def test_outputs_do_not_change(name: str, sizes: dict[str, Any], tokenizer: Any) -> None:
    model = random_classifier(name, tokenizer, **sizes)
    before, fingerprint = scores(model), model.fingerprint()
    assert np.ptp(before) > 0.1, "the texts must differ, or any outputs would do"
    assert without_padding(model)
    np.testing.assert_allclose(scores(model), before, rtol=1e-4, atol=1e-4)
    assert model.fingerprint() == fingerprint


@pytest.mark.parametrize("layers", ["last", "all"])
def test_pooled_states_do_not_change(layers: str, encoder: Path, tmp_path: Path) -> None:
    description = Description("encoder_with_head", "response", 100)
    model = new_model(encoder, description, 1, whole=False)
    if layers == "last":
        model.module.layers = model.module.layers[-1:]
        model.module.head = torch.nn.Linear(SIZES["hidden_size"], 1)
    before = scores(model)
    read = count_tokens(model.module.encoder)
    assert without_padding(model)
    read.clear()
    np.testing.assert_allclose(scores(model), before, rtol=1e-4, atol=1e-5)
    assert read == [sum(max(1, len(ids)) for ids in model.ids([Example((), text) for text in TEXTS]))]


def count_tokens(body: torch.nn.Module) -> list[int]:
    """Filled with the tokens that each forward computes."""
    read: list[int] = []
    body.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    return read


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Roberta", {"pad_token_id": 1}),  # its positions do not begin at 0
        ("ModernBert", {"local_attention": 8, "global_attn_every_n_layers": 2}),  # a window in both directions
        ("DebertaV2", {"relative_attention": True, "position_biased_input": False}),  # attention of its own
    ],
)
def test_what_cannot_do_without_stays_as_it_is(name: str, sizes: dict[str, Any], tokenizer: Any) -> None:
    model = random_classifier(name, tokenizer, **sizes)
    before = scores(model)
    assert not without_padding(model)
    np.testing.assert_array_equal(scores(model), before)


def test_a_served_model_is_one_of_these(classifier: Path) -> None:
    """A folder as `rlhf reward serve` loads it."""
    model = load_any_model(str(classifier))
    model.read("response")
    before = scores(model)
    assert without_padding(model)
    np.testing.assert_allclose(scores(model), before, rtol=1e-4, atol=1e-5)
