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
        ('{"prompt": "a", "score": 1e999}', "not JSON: the number 1e999 is too large"),
        ('{"n": ' + "[" * 201 + "]" * 201 + "}", r"nested too deeply \(more than 200 levels\)"),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
    ids=["half", "half-inside", "twice", "twice-inside", "nan", "infinity", "digits", "large", "too-deep", "deep"],
)
def test_lines_that_are_no_data_are_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a whole emoji \\ud83d\\udc4d"}\n' + line)
    with pytest.raises(DataError, match=says):
        rows(str(tmp_path / "rows.jsonl"))


def test_brackets_in_a_text_are_not_nesting(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "[{" * 500, "deep": [[[["x"]]]]}))
    assert rows(str(tmp_path / "rows.jsonl"))[0][1]["deep"] == [[[["x"]]]]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_row_by_row(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\ufeff\n " + json.dumps(ROWS, indent=indent) + "\n\n")
    assert rows(str(path)) == [
        (f"{path}, row 1", {"prompt": "hello", "answer": 4, "response": "yes"}),
        (f"{path}, row 2", {"prompt": "name one", "response": "no", "chosen": "good", "rejected": "bad"}),
    ]
    path.write_text("[ ]")
    assert rows(str(path)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1} {"a": 2}]', "row 1: not JSON: a comma or the end"),
        ('[{"a": 1},]', "row 2: not JSON: "),
        ('[{"a": 1}', "row 1: not JSON: a comma or the end"),
        ('[{"a": 1}]\n[{"a": 2}]', "not JSON: more follows the array"),
        ('[{"a": 1}, {"a": 2, "a": 3}]', "row 2: the field `a` is there twice"),
        ('[{"a": "\\ud83d"}]', "row 1: field `a` holds half of a character"),
        ('[{"a": 1}, 2]', "row 2: a number, not an object with words"),
        ("[", "row 1: not JSON"),
        ('{"a": 1}{"a": 2}', ":1: not JSON: more follows the first value"),
        ('{\n"a": 1}', ":1: not JSON: .*or the whole file one array"),
    ],
)
def test_a_json_file_that_is_none_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=r"rows\.json.*" + says):
        rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip archive"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16 text. Save it as UTF-8"),
        (b"PAR1....", "Parquet file. Its name must end in .parquet"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 text"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=says):
        rows(str(tmp_path / "rows.jsonl"))


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\na,b\n")
    for path, says in (
        (str(tmp_path), "a folder, not a file.*`hf:"),
        ("x" * 5000, "cannot be opened .*too long"),
        ("a\0b", "no such file"),
        (str(tmp_path / "rows.csv"), r"rows\.csv:1: not JSON: .*to_json"),
    ):
        with pytest.raises(DataError, match=says):
            rows(path)


def test_nan_in_a_table_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": "a", "s": 1.0}, {"prompt": "b", "s": float("nan")}])
    with pytest.raises(DataError, match=r"d\.parquet, row 2: the column `s` holds NaN"):
        rows(path)
    inside = write_parquet(tmp_path / "e.parquet", [{"prompt": "a", "s": [{"x": float("inf")}]}])
    with pytest.raises(DataError, match="row 1: the column `s` holds NaN or an infinity"):
        rows(inside)


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="the column `prompt` is there twice"):
        rows(str(tmp_path / "d.parquet"))


def test_a_configuration_of_a_data_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the hub: gsm8k has `main` and `socratic`, of which one must be chosen."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    for name in ("main", "socratic"):
        lines = "".join(json.dumps({"question": f"{name} {n}"}) + "\n" for n in range(3))
        (folder / f"{name}.jsonl").write_text(lines)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for path, texts in (
        (f"hf:{folder}@main", ["main 0", "main 1", "main 2"]),
        (f"hf:{folder}@socratic:train", ["socratic 0", "socratic 1", "socratic 2"]),
        (f"hf:{folder}@main:train[:2]", ["main 0", "main 1"]),
    ):
        read = read_rows(path, "", "", {"prompt": "question"})
        assert list(read) == [(f"{path}, row {n}", {"prompt": text}) for n, text in enumerate(texts, start=1)]
    with pytest.raises(DataError, match=r"main.*socratic.*`hf:NAME@CONFIG\[:SPLIT\]`"):
        rows(f"hf:{folder}")
    with pytest.raises(DataError, match="no split `test`. It has train"):
        rows(f"hf:{folder}@main:test")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q"}, {"prompt": "a", "x": {"y": {"z": 1}}, "answer": "b"}),
        ({"prompt": "q", "z": "x.y.z"}, {"prompt": "a", "x": {"y": {"z": 1}}, "answer": "b", "z": 1}),
        ({"prompt": "q", "answer": None, "x": None}, {"prompt": "a"}),
        ({"prompt": "answer", "answer": "q"}, {"prompt": "b", "answer": "a", "x": {"y": {"z": 1}}}),
        ({"prompt": "q", "none": "none", "inside": "none.x"}, {"prompt": "a", "x": {"y": {"z": 1}}, "answer": "b"}),
        ({"absent": None}, {"q": "a", "x": {"y": {"z": 1}}, "answer": "b"}),
    ],
)
def test_columns_get_other_names(tmp_path: Path, columns: dict[str, str | None], expected: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "a", "x": {"y": {"z": 1}}, "answer": "b", "none": None}))
    ((_, row),) = read_rows(str(tmp_path / "rows.jsonl"), "", "", columns)
    assert row == expected


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"prompt": "question"},
            r"rows\.jsonl:1: there is no column `question`.* as `prompt`. The row has answer, q, x",
        ),
        ({"prompt": "x.b"}, "no column `x.b`"),
        ({"prompt": "q.b"}, "no column `q.b`"),
        ({"answer": "q"}, r"reads `q` as `answer`, but the row has a column `answer` too.*\{own_answer: answer\}"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path: Path, columns: dict[str, str | None], says: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "a", "x": {"y": 1}, "answer": "b"}))
    with pytest.raises(DataError, match=says):
        list(read_rows(str(tmp_path / "rows.jsonl"), "", "", columns))


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
