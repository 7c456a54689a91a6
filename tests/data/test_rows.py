"""Where rows come from: every source gives the same, and says what is wrong with it."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import DataSettings
from rlhf.config.sft import SftDataSettings
from rlhf.data.conversations import read_conversations
from rlhf.data.errors import DataError
from rlhf.data.prompts import load_prompts, load_tokenizer
from rlhf.data.rows import identity, read_rows
from rlhf.types import content_id

ROWS = [
    {"prompt": "hello", "answer": 4, "response": "yes", "chosen": None, "rejected": None},
    {"prompt": "name one", "answer": None, "response": "no", "chosen": "good", "rejected": "bad"},
]


def rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    return list(read_rows(path, "Look elsewhere.", "words"))


def write_parquet(path: Path, content: list[dict[str, Any]]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
    return str(path)


def save_to_disk(folder: Path, content: list[dict[str, Any]], **splits: int) -> str:
    """A data set, or with `splits` one for each name with so many of the rows."""
    datasets = pytest.importorskip("datasets")
    make = datasets.Dataset.from_list
    saved = datasets.DatasetDict({name: make(content[:n]) for name, n in splits.items()}) if splits else make(content)
    saved.save_to_disk(folder)
    return f"hf:{folder}"


@pytest.fixture(params=["jsonl", "parquet", "hf", "split"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """`ROWS` from one of the sources."""
    if request.param == "parquet":
        return write_parquet(tmp_path / "rows.parquet", ROWS)
    if request.param == "hf":
        return save_to_disk(tmp_path / "rows", ROWS)
    if request.param == "split":
        return save_to_disk(tmp_path / "rows", ROWS, train=1, test=2) + ":test"
    lines = [json.dumps({name: value for name, value in row.items() if value is not None}) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines))
    return str(tmp_path / "rows.jsonl")


def test_all_sources_give_the_same_rows(source: str) -> None:
    (first, one), (second, two) = rows(source)
    assert one == {"prompt": "hello", "answer": 4, "response": "yes"}
    assert two == {"prompt": "name one", "response": "no", "chosen": "good", "rejected": "bad"}
    tail = (":1", ":3") if source.endswith(".jsonl") else (", row 1", ", row 2")
    assert (first, second) == (source + tail[0], source + tail[1])


def test_null_counts_as_missing_in_json_lines_too(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row for _, row in rows(str(tmp_path / "rows.jsonl"))] == [
        {"prompt": "hello", "answer": 4, "response": "yes"},
        {"prompt": "name one", "response": "no", "chosen": "good", "rejected": "bad"},
    ]


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row for _, row in rows(str(tmp_path / "rows.jsonl"))] == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r'{"prompt": "half an emoji \ud83d"}', r"rows\.jsonl:2: field `prompt` holds half of a character"),
        (r'{"prompt": "a", "more": [{"x": "\udc4d"}]}', "field `more` holds half of a character"),
        ('{"prompt": "a", "prompt": "b"}', "the field `prompt` is there twice"),
        ('{"prompt": "a", "more": {"x": 1, "x": 2}}', "the field `x` is there twice"),
        ('{"prompt": "a", "score": NaN}', "not JSON: NaN is no number"),
        ('{"prompt": "a", "score": -Infinity}', "not JSON: -Infinity is no number"),
        ('{"n": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
    ids=["half", "half-inside", "twice", "twice-inside", "nan", "infinity", "digits", "deep"],
)
def test_lines_that_are_no_data_are_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a whole emoji \\ud83d\\udc4d"}\n' + line)
    with pytest.raises(DataError, match=says):
        rows(str(tmp_path / "rows.jsonl"))


def test_prompts_and_examples_are_read_from_all_sources(source: str, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    prompts = load_prompts(source, tokenizer, DataSettings(prompts=source))
    assert [prompt.text for prompt in prompts] == ["hello", "name one"] and prompts[0].payload["answer"] == 4
    examples = read_conversations(source, "data.examples", tokenizer, SftDataSettings(examples=source))
    assert len(examples.conversations) == 2


def test_a_split_is_named_and_exists(tmp_path: Path) -> None:
    several, one = save_to_disk(tmp_path / "several", ROWS, train=2, test=1), save_to_disk(tmp_path / "one", ROWS)
    assert len(rows(several)) == 2, "train, if none is named"
    with pytest.raises(DataError, match="no split `valid`. It has train, test"):
        rows(f"{several}:valid")
    with pytest.raises(DataError, match="has no splits. Write `hf:"):
        rows(f"{one}:train")


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_text("nothing")
    (tmp_path / "table").write_bytes(b"PAR1\xff\xfe")
    for path, words in (
        (tmp_path / "none.jsonl", "none.jsonl: no such file. Look elsewhere."),
        (tmp_path / "no.parquet", "not a Parquet file"),
        (tmp_path / "table", "not UTF-8 text .* must end in .parquet"),
    ):
        with pytest.raises(DataError, match=words):
            rows(str(path))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"")
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs the package datasets\. Install it with .*\.\[datasets\]"):
        rows("hf:someone/something")
    with pytest.raises(DataError, match="needs the package pyarrow"):
        rows(str(tmp_path / "d.parquet"))


def test_a_value_that_no_payload_can_have_is_named(tmp_path: Path, tiny_model: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": "a", "when": datetime.datetime(2026, 1, 1)}])
    with pytest.raises(DataError, match=r"d\.parquet, row 1: a column holds .*datetime.* Convert or remove it"):
        load_prompts(path, load_tokenizer(str(tiny_model)), DataSettings(prompts=path))
    assert identity("here", {"a": 1}) == content_id({"a": 1})
