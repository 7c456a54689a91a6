"""Prompt files: what is read, and how each mistake is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import DataSettings
from rlhf.data.prompts import DataError, load_prompts, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def load(tmp_path: Path, tokenizer: Any, *rows: Any, **settings: Any) -> list[Any]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return load_prompts(str(path), tokenizer, DataSettings(prompts=str(path), **settings))


def test_text_and_chat_and_payload(tmp_path: Path, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "ok"}]
    first, second = load(tmp_path, tokenizer, {"prompt": "hello", "answer": 4}, {"messages": chat})
    assert (first.text, first.payload) == ("hello", {"answer": 4})
    assert tokenizer.decode(first.token_ids) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert second.text == "ok"
    assert first.id != second.id


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
        ({"text": "a"}, r"exactly one of the fields `prompt` and `messages`; it has \['text'\]"),
        ({"prompt": "a", "messages": []}, "exactly one"),
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
