"""Where rows of data come from: JSON lines, a JSON array, a Parquet file, or a data set of the package `datasets`.

Each row comes with its place for messages, and with its columns under the names that the settings give them. What a row must hold is for
the reader of prompts, of examples, of ratings to say.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf.config.data import HUB, Columns
from rlhf.data.errors import DataError
from rlhf.data.tables import hub_rows, parquet_rows
from rlhf.types import content_id

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a character, with or without its other half."""
MOST_NESTED = 200
"""Levels of objects and lists in a row; more would exhaust the stack of whoever reads it later."""
SPACE = re.compile(r"\s*")
OTHER_FILES = {
    b"\x1f\x8b": "a gzip archive. Give the file in it: `gunzip`.",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Give the file in it: `unzstd`.",
    b"PK\x03\x04": "a zip archive. Give the file in it: `unzip`.",
    b"PAR1": "a Parquet file. Its name must end in .parquet.",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8.",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8.",
}
"""How files begin that are no JSON, and what to do."""
NAMES = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}

Placed = tuple[str, dict[str, Any]]
"""Where a row stands, `FILE:LINE` or `FILE, row N`, and the row."""


def identity(where: str, value: Any) -> str:
    """`content_id` of what was read at `where`.

    Raises:
        DataError: a column of a table holds what JSON has no form for, such as a date.
    """
    try:
        return content_id(value)
    except TypeError as error:
        raise DataError(f"{where}: a column holds what JSON has no form for ({error}). Convert or remove it.") from None


def read_rows(path: str, missing: str, wanted: str, columns: Columns | None = None) -> Iterator[Placed]:
    """The rows of `hf:NAME[@CONFIG][:SPLIT]`, of a file that ends in .parquet, or of any other file as JSON, blank lines left out.

    In a table every row has every column, so a column without a value counts as missing; so does a field that is null in JSON,
    which pandas and `datasets` write from tables.

    Args:
        missing: what to do if there is no such file.
        wanted: what each row has, in words.
        columns: our name -> the column's own, a field inside one (`reward_model.ground_truth`), or None to leave it out.

    Raises:
        DataError: nothing there, or not what it should be; with the place and the remedy.
    """
    for where, row in _placed(path, missing, wanted):
        renamed = _renamed(where, row, columns) if columns else row
        yield where, {name: value for name, value in renamed.items() if value is not None}


def _placed(path: str, missing: str, wanted: str) -> Iterator[Placed]:
    if path.startswith(HUB):
        return _table(path, hub_rows(path))
    try:
        if Path(path).is_dir():
            raise DataError(
                f"{path}: a folder, not a file. Name a file in it, or a data set that it holds: `{HUB}{path}`."
            )
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file. {missing}")
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise DataError(f"{path:.200}: cannot be opened ({error.strerror}). {missing}") from None
    return _table(path, parquet_rows(path)) if path.endswith(".parquet") else _json(path, wanted)


def _json(path: str, wanted: str) -> Iterator[Placed]:
    try:
        with Path(path).open("rb") as file:
            head = file.read(4)
        for magic, what in OTHER_FILES.items():
            if head.startswith(magic):
                raise DataError(f"{path}: not UTF-8 text but {what}")
        # With or without the byte order mark that Windows writes.
        with Path(path).open(encoding="utf-8-sig") as lines:
            numbered = enumerate(lines, start=1)
            first = next(((number, line) for number, line in numbered if line.strip()), None)
            if first is None:
                return
            if first[1].lstrip().startswith("["):
                yield from _array(path, first[1] + lines.read(), wanted)
                return
            for number, line in chain([first], numbered):
                if line.strip():
                    yield _line(f"{path}:{number}", line, wanted)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error}). Save it as UTF-8; a Parquet file must end in .parquet."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


def _after_space(text: str, start: int) -> int:
    found = SPACE.match(text, start)
    assert found is not None, "it matches nothing at all too"
    return found.end()


def _line(where: str, line: str, wanted: str) -> Placed:
    row, end = _value(where, line, _after_space(line, 0))
    if line[end:].strip():
        raise DataError(f"{where}: not JSON: more follows the first value. Each line must be one JSON object.")
    return where, _object(where, row, line, wanted)


def _array(path: str, text: str, wanted: str) -> Iterator[Placed]:
    """The rows of a file that is one JSON array."""
    at, number = _after_space(text, text.index("[") + 1), 0
    ended = text[at : at + 1] == "]"
    while not ended:
        number += 1
        where = f"{path}, row {number}"
        row, end = _value(where, text, at)
        yield where, _object(where, row, text[at:end], wanted)
        at = _after_space(text, end)
        ended = text[at : at + 1] == "]"
        if not ended:
            if text[at : at + 1] != ",":
                raise DataError(f"{where}: not JSON: a comma or the end of the array must follow.")
            at = _after_space(text, at + 1)
    if text[at + 1 :].strip():
        raise DataError(
            f"{path}: not JSON: more follows the array. A file is one array of objects, or has one object in each line."
        )


def _value(where: str, text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends."""
    decoder = json.JSONDecoder(
        object_pairs_hook=functools.partial(_once, where), parse_constant=_no_number, parse_float=_finite
    )
    try:
        return decoder.raw_decode(text, at)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # not JSON, or a whole number of thousands of digits
        hint = (
            " A .csv file is no JSON: convert it with pandas, `to_json(orient='records', lines=True)`."
            if ".csv" in where
            else ""
        )
        raise DataError(
            f"{where}: not JSON: {error}. Each line must be one JSON object, or the whole file one array of objects.{hint}"
        ) from None


def _object(where: str, row: Any, text: str, wanted: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {NAMES.get(type(row), 'a number')}, not an object with {wanted}. Write each row as one JSON object, or remove it."
        )
    if text.count("{") + text.count("[") > MOST_NESTED and _depth(row) > MOST_NESTED:
        raise _too_deep(where)
    if SURROGATE.search(text) is not None:
        _require_text(where, row)
    return row


def _too_deep(where: str) -> DataError:
    return DataError(f"{where}: nested too deeply (more than {MOST_NESTED} levels). Flatten the row, or remove it.")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inner(outer)]:
        depth += 1
    return depth


def _inner(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: the field `{twice}` is there twice. Remove one.")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits:.20} is too large")
    return number


def _require_text(where: str, row: dict[str, Any]) -> None:
    """Raises DataError if a text holds half of a character, as it comes from cutting in the middle of an emoji."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: field `{name}` holds half of a character (a lone surrogate, such as \\ud83d). Cut texts between characters."
            ) from None


def _table(path: str, rows: Iterator[dict[str, Any]]) -> Iterator[Placed]:
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        for name, value in row.items():
            if _not_finite(value):
                raise DataError(
                    f"{where}: the column `{name}` holds NaN or an infinity, which is no number in JSON. Write null for a missing value "
                    "(pandas: `df.astype(object).where(df.notna(), None)`), or remove the row."
                )
        yield where, row


def _not_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, dict | list) and any(map(_not_finite, _inner(value)))


def _renamed(where: str, row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The row with its columns under our names."""
    moved = {name: _column(where, row, name, column) for name, column in columns.items() if column is not None}
    gone = {column for column in columns.values() if column is not None} | (columns.keys() - moved.keys())
    rest = {name: value for name, value in row.items() if name not in gone}
    clash = next((name for name in moved if rest.get(name) is not None), None)
    if clash is not None:
        raise DataError(
            f"{where}: `columns` reads `{columns[clash]}` as `{clash}`, but the row has a column `{clash}` too. Give that one another "
            f"name: {{own_{clash}: {clash}}}."
        )
    if "instruction" in gone and rest.get("input"):
        raise DataError(
            f"{where}: has an `input` beside its `instruction`, which would be left out. Join the two in the data, or set "
            "`columns` to {input: null} besides."
        )
    return rest | moved


def _column(where: str, row: Mapping[str, Any], name: str, column: str) -> Any:
    """A column by its name, or a field inside one."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(
                f"{where}: there is no column `{column}`, which `columns` reads as `{name}`. The row has "
                f"{', '.join(sorted(row)) or 'none'}."
            )
        value = value[part]
    return value
