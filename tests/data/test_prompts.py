"""Prompt files: what is read, and how each mistake is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import DataSettings
from rlhf.data.prompts import DataError, load_prompts, load_tokenizer
from rlhf.types import Prompt, Turn


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def load(tmp_path: Path, tokenizer: Any, *rows: Any, pair_tokens: int | None = None, **settings: Any) -> list[Any]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return load_prompts(str(path), tokenizer, DataSettings(prompts=str(path), **settings), pair_tokens)


def test_text_and_chat_and_payload(tmp_path: Path, tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "ok"},
    ]
    first, second = load(tmp_path, tokenizer, {"prompt": "hello", "answer": 4}, {"messages": chat})
    assert (first.text, first.payload) == ("hello", {"answer": 4})
    assert tokenizer.decode(first.token_ids) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert second.text == "ok"
    assert first.id != second.id


def test_a_prompt_holds_its_whole_conversation(tmp_path: Path, tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "ok"},
    ]
    single, several = load(tmp_path, tokenizer, {"prompt": "hello"}, {"messages": chat})
    assert single.conversation == (Turn("user", "hello"),) == Prompt("p", (1,), "hello").conversation
    assert several.conversation == (Turn("user", "hi"), Turn("assistant", "yo"), Turn("user", "ok"))
    (told,) = load(tmp_path, tokenizer, {"messages": chat}, system_prompt="Be brief.")
    assert told.conversation == (Turn("system", "Be brief."), *several.conversation)


def test_ids_depend_on_content_alone(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "k": 1}]
    ids = [p.id for p in load(tmp_path, tokenizer, *rows)]
    assert ids == [p.id for p in reversed(load(tmp_path, tokenizer, *reversed(rows)))]
    assert len(set(ids)) == 3
    assert [p.id for p in load(tmp_path, tokenizer, *rows, *rows)] == ids, "equal prompts count once"


def test_the_system_prompt_and_raw_text(tmp_path: Path, tokenizer: Any) -> None:
    (plain,) = load(tmp_path, tokenizer, {"prompt": "a"})
    (with_system,) = load(tmp_path, tokenizer, {"prompt": "a"}, system_prompt="Be brief.")
    (raw,) = load(tmp_path, tokenizer, {"prompt": "a"}, chat_template=False)
    assert "Be brief." in tokenizer.decode(with_system.token_ids)
    assert tokenizer.decode(raw.token_ids) == "a"
    assert len(plain.token_ids) > len(raw.token_ids)


def test_too_long_is_an_error_or_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "a" * 200}]
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .*data\.max_prompt_tokens=60.*data\.too_long=drop"):
        load(tmp_path, tokenizer, *rows, max_prompt_tokens=60)
    assert len(load(tmp_path, tokenizer, *rows, max_prompt_tokens=60, too_long="drop")) == 1
    with pytest.raises(DataError, match="no prompt is left"):
        load(tmp_path, tokenizer, rows[1], max_prompt_tokens=60, too_long="drop")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{broken", r"prompts\.jsonl:2: not JSON"),
        ([1], r"prompts\.jsonl:2: a list"),
        ({"text": "a"}, r"it has \['text'\]. .* data\.columns={prompt: text}"),
        ({"prompt": "a", "messages": []}, "exactly one of them: data.columns={messages: null}"),
        ({"prompt": "  "}, "`prompt` must be a text"),
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "ends with the user's turn"),
        ({"messages": [{"role": "user"}]}, "`messages` must be a list"),
    ],
)
def test_bad_rows_name_the_line_and_the_field(tmp_path: Path, tokenizer: Any, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, tokenizer, {"prompt": "fine"}, row)


def test_missing_and_empty_files(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no such file.*data\.prompts"):
        load_prompts(str(tmp_path / "no.jsonl"), tokenizer, DataSettings(prompts="no.jsonl"))
    with pytest.raises(DataError, match="no prompt is left"):
        load(tmp_path, tokenizer, "")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"policy\.model"):
        load_tokenizer(str(tmp_path))


PAIR = {"prompt": "a", "chosen": "yes", "rejected": "no"}


def test_a_pair_is_tokenised_as_if_it_had_been_sampled(tmp_path: Path, tokenizer: Any) -> None:
    """Prompt and response together are what the chat template makes of the whole conversation."""
    (prompt,) = load(tmp_path, tokenizer, PAIR, pair_tokens=9)
    for text, response in zip(("yes", "no"), prompt.pair, strict=True):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        assert list(prompt.token_ids + response) == tokenizer.apply_chat_template(turns, return_dict=False)
    assert prompt.payload == {}


def test_a_pair_may_be_given_as_chats(tmp_path: Path, tokenizer: Any) -> None:
    def chat(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]

    (text,) = load(tmp_path, tokenizer, PAIR, pair_tokens=9)
    (whole,) = load(tmp_path, tokenizer, {**PAIR, "chosen": chat("yes"), "rejected": chat("no")}, pair_tokens=9)
    (turn,) = load(tmp_path, tokenizer, {**PAIR, "chosen": chat("yes")[1:], "rejected": chat("no")[1:]}, pair_tokens=9)
    assert text == whole == turn


def test_the_pair_is_part_of_the_identity(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, PAIR, {**PAIR, "rejected": "never"}, {**PAIR, "chosen": "no", "rejected": "yes"}, PAIR]
    prompts = load(tmp_path, tokenizer, *rows)
    assert len({prompt.id for prompt in prompts}) == len(prompts) == 4
    assert all(prompt.pair is None for prompt in prompts), "tokenised only for a method that learns from them"
    with_pairs = load(tmp_path, tokenizer, *rows[1:], pair_tokens=9)
    assert [prompt.id for prompt in with_pairs] == [prompt.id for prompt in prompts[1:]]


def test_a_response_over_the_limit_is_an_error_or_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [PAIR, {**PAIR, "rejected": "x" * 9}]
    with pytest.raises(
        DataError, match=r"prompts\.jsonl:2: the rejected response has 10 tokens.*rollout\.max_tokens=9"
    ):
        load(tmp_path, tokenizer, *rows, pair_tokens=9)
    assert len(load(tmp_path, tokenizer, *rows, pair_tokens=9, too_long="drop")) == 1
    assert len(load(tmp_path, tokenizer, *rows, pair_tokens=10)) == 2
    assert len(load(tmp_path, tokenizer, *rows)) == 2, "nobody learns from it"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, r"prompts\.jsonl:2: no fields `chosen` and `rejected`.*algorithm\.ranked_with=samples"),
        ({"prompt": "a", "chosen": "b"}, r"prompts\.jsonl:2: field `chosen` without `rejected`"),
        ({"prompt": "a", "rejected": "b"}, "field `rejected` without `chosen`"),
        ({**PAIR, "chosen": 3}, "field `chosen` must be a text"),
        ({**PAIR, "rejected": []}, "field `rejected` must be a text"),
        ({**PAIR, "rejected": [{"role": "user", "content": "a"}]}, "ends with the assistant's turn"),
        (
            {**PAIR, "chosen": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
            "answers another conversation",
        ),
    ],
)
def test_bad_pairs_name_the_line_and_the_remedy(tmp_path: Path, tokenizer: Any, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, tokenizer, PAIR, row, pair_tokens=9)
    if "chosen" in row or "rejected" in row:
        with pytest.raises(DataError, match=says):
            load(tmp_path, tokenizer, PAIR, row)
