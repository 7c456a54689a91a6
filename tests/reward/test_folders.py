"""Folders of reward models: what they lack, or what they hold besides, is named before anything judges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config import UserError
from rlhf.config.reward import SourceSettings
from rlhf.reward.folders import HEAD, Description, check_reward_model, open_folder, own_length, read_base
from rlhf.reward.models import load_any_model, load_model, new_model
from rlhf.reward.pairwise_model import load_pairwise_model
from rlhf.reward.reading import as_text
from tests.reward.test_families import PROMPT, make_tokenizer, save

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, "Llama", make_tokenizer(bos_token="<bos>"), None)
    return tmp_path


def change(folder: Path, with_: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    with_(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def lost(tensors: Tensors) -> None:
    del tensors["score.weight"]


def renamed(tensors: Tensors) -> None:
    tensors["v_head.summary.weight"] = tensors.pop("score.weight")


def gated(tensors: Tensors) -> None:
    tensors["gating.weight"] = torch.zeros(3)


def wider(tensors: Tensors) -> None:
    tensors["score.weight"] = torch.zeros(1, 17)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lost, r"`score\.weight` is missing"),
        (renamed, r"`score\.weight` is missing; `v_head\.summary\.weight` is not part of the model"),
        (gated, r"`gating\.weight` is not part of the model"),
        (wider, r"`score\.weight` has the shape \[1, 17\] instead of \[1, 16\]"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(folder: Path, changed: Callable, says: str) -> None:
    """By the headers alone, as in the dry run; and by whatever loads the folder."""
    change(folder, changed)
    source = SourceSettings(kind="model", path=str(folder), input="conversation")
    with pytest.raises(UserError, match=rf"`reward\.members\[2\]\.path`.*{says}"):
        check_reward_model(source, str(folder), "`reward.members[2].path`", [])
    for load in (load_model, load_pairwise_model):
        with pytest.raises(UserError, match=rf"`reward\.path`.*{says}"):
            load(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    change(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(UserError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` holds numbers that are not finite"):
        load_model(str(folder))


def test_a_head_beside_its_encoder_is_looked_at(encoder: Path, tmp_path: Path) -> None:
    new_model(encoder, Description("classifier", "response", 64), 1, whole=False).save(tmp_path)
    assert load_any_model(str(tmp_path)).description.kind == "encoder_with_head"
    head = load_file(tmp_path / HEAD)
    save_file(head | {"bias": torch.full((1,), torch.nan)}, tmp_path / HEAD)
    with pytest.raises(UserError, match="the head in .*`bias` holds numbers that are not finite"):
        load_any_model(str(tmp_path))
    (tmp_path / HEAD).write_bytes((tmp_path / HEAD).read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{HEAD} is truncated"):
        open_folder(str(tmp_path))
    (tmp_path / HEAD).unlink()
    with pytest.raises(UserError, match=f"there is no {HEAD}"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"model_type": "internlm2x", "auto_map": {"AutoConfig": "configuration_x.XConfig"}},
            r"type `internlm2x`, which transformers does not know\. It brings code of its own \(`auto_map`\)",
        ),
        ({"architectures": ["LlamaForRewardModelWithGating"]}, "holds a LlamaForRewardModelWithGating, which gives no"),
        ({"architectures": ["LlamaOwnForSequenceClassification"]}, "holds a LlamaOwnForSequenceClassification, which"),
        ({"pad_token_id": 300}, r"the pad_token_id of config\.json .* is 300, and the model knows the tokens 0 to 299"),
        ({"model_type": None}, "has no `model_type`"),
    ],
)
def test_what_transformers_alone_cannot_run_is_refused(folder: Path, fields: dict[str, Any], says: str) -> None:
    configure(folder, **fields)
    with pytest.raises(UserError, match=says):
        open_folder(str(folder))


def test_a_padding_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos_token="<bos>")
    tokenizer.add_tokens([f"<{number}>" for number in range(40)])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    save(tmp_path, "Llama", tokenizer, None)
    with pytest.raises(UserError, match="the pad_token of .* is 302, and the model knows the tokens 0 to 299"):
        read_base(tmp_path)


def test_a_template_that_refuses_the_prompts_is_found_before_the_run(folder: Path) -> None:
    source = SourceSettings(kind="model", path=str(folder), input="conversation")
    check_reward_model(source, str(folder), "`reward.path`", [PROMPT, as_text("Hi")])
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template += "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"turns system, user, .*System role not supported.*`data\.system_prompt`"):
        check_reward_model(source, str(folder), "`reward.path`", [as_text("Hi"), PROMPT])
    check_reward_model(source, str(folder), "`reward.path`", [as_text("Hi")])
    check_reward_model(source.model_copy(update={"input": "response"}), str(folder), "`reward.path`", [PROMPT])


def test_only_a_new_head_starts_at_random(tiny_model: Path, encoder: Path, tmp_path: Path) -> None:
    """Training from a base: its own head is left out, an encoder may come without a pooler, and nothing else may be missing."""
    from shutil import copytree

    plain = Description("classifier", "response", 64)
    for name, base, prefix in (("causal", tiny_model, "model."), ("encoder", encoder, "")):
        new_model(base, plain, 1)
        copytree(base, tmp_path / name)
        last = f"{prefix}layers.1.mlp.up_proj.weight" if prefix else "encoder.layer.1.output.dense.weight"
        change(tmp_path / name, lambda tensors, last=last: tensors[last][0].fill_(torch.nan))
        with pytest.raises(UserError, match=r"^--model.*not finite"):
            new_model(tmp_path / name, plain, 1)
        change(tmp_path / name, lambda tensors, last=last: tensors.pop(last))
        for whole in (True, False):
            with pytest.raises(UserError, match=r"^--model.* is missing"):
                new_model(tmp_path / name, plain, 1, whole=whole)
    copytree(encoder, tmp_path / "bare")
    change(tmp_path / "bare", lambda tensors: [tensors.pop(f"pooler.dense.{one}") for one in ("weight", "bias")])
    for whole in (True, False):
        new_model(tmp_path / "bare", plain, 1, whole=whole)


def test_a_ready_head_must_be_there(classifier: Path, tmp_path: Path) -> None:
    import logging
    from shutil import copytree

    copytree(classifier, tmp_path / "model")
    change(tmp_path / "model", lambda tensors: tensors.pop("classifier.weight"))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with pytest.raises(UserError, match=r"^--model.*`classifier\.weight` is missing"):
            new_model(tmp_path / "model", Description("classifier", "response", 64), 1)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not said, "transformers' own report, in colours, before our line that says it"


@pytest.mark.parametrize(
    ("family", "sizes", "longest", "reads"),
    [
        ("Llama", {"max_position_embeddings": 8192}, None, 8192),
        ("Llama", {"max_position_embeddings": 8192}, 6000, 6000),
        ("GPT2", {"n_positions": 512}, None, 512),
        ("Roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, None, 512),
    ],
)
def test_a_model_reads_as_much_as_it_can(
    family: str, sizes: dict[str, Any], longest: int | None, reads: int, tmp_path: Path
) -> None:
    """Its own length, or its tokenizer's where that is less; RoBERTa's positions begin after the padding's."""
    tokenizer = make_tokenizer(**({} if longest is None else {"model_max_length": longest}))
    save(tmp_path, family, tokenizer, sizes.pop("pad_token_id", None), **sizes)
    model = load_model(str(tmp_path))
    assert model.description.max_tokens == reads
    assert own_length(*read_base(tmp_path), wanted=7) == 7
