"""Whatever stands in a file of data, it is read, or refused with its place: never an error of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.data import DataSettings
from rlhf.config.loader import UserError
from rlhf.config.sft import SftDataSettings
from rlhf.data.conversations import read_conversations
from rlhf.data.prompts import load_prompts
from rlhf.data.tiny import tiny_tokenizer
from rlhf.reward.serving.canaries import load_canaries
from rlhf.reward.training.reader import read_data

TOKENIZER = tiny_tokenizer()
FIELDS = (
    "prompt",
    "messages",
    "chosen",
    "rejected",
    "response",
    "text",
    "rating",
    "ratings",
    "responses",
    "good",
    "bad",
)

texts = st.sampled_from(
    ["", " ", "a", "b", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a", "a<|end|>", "\u0000", "\ud83d"]
)
roles = st.sampled_from(["user", "assistant", "system", "developer", "tool", "human", "gpt", "wizard", "", 3, None])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
turn = st.fixed_dictionaries(
    {}, optional={"role": roles, "content": texts | scalars, "tool_calls": scalars}
) | st.fixed_dictionaries({"from": roles, "value": texts})
chats = st.lists(turn, max_size=4)
good_chats = st.lists(texts.filter(str.strip), min_size=1, max_size=4).map(
    lambda said: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=6
)
rows = st.dictionaries(st.sampled_from(FIELDS), texts | chats | good_chats | values, max_size=5)
READERS = {
    "prompts": lambda path: load_prompts(path, TOKENIZER, DataSettings(prompts=path), None),
    "pairs": lambda path: load_prompts(path, TOKENIZER, DataSettings(prompts=path), 99),
    "columns": lambda path: load_prompts(
        path,
        TOKENIZER,
        DataSettings(prompts=path, columns={"prompt": "text", "k": "ratings.a", "messages": None}),
        None,
    ),
    "examples": lambda path: read_conversations(path, "data.examples", TOKENIZER, SftDataSettings(examples=path)),
    "preferences": read_data,
    "canaries": load_canaries,
}


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(rows, max_size=2))
def test_any_row_is_read_or_refused(tmp_path: Path, reader: str, content: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    try:
        READERS[reader](str(path))
    except UserError as error:
        assert "rows.jsonl" in str(error)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=30) | st.text('[]{}",:\\ntrue1e9-. \n\ufeff', max_size=30).map(str.encode))
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_any_file_is_read_or_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="rows"):
        load_prompts(str(tmp_path / name), TOKENIZER, DataSettings(prompts=name), None)
