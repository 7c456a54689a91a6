"""Where rows of data come from: JSON lines, a Parquet file, or a data set of the package `datasets`; each with its place for messages.

What a row must hold is for the reader of prompts, of examples, of ratings to say.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config.data import HUB
from rlhf.config.extras import remedy
from rlhf.data.errors import DataError
from rlhf.types import content_id

EXTRA = f"{remedy('datasets')} Or convert the data to JSONL, which needs no package."

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a character, with or without its other half."""

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


def read_rows(path: str, missing: str, wanted: str) -> Iterator[Placed]:
    """The rows of `hf:NAME[:SPLIT]`, of a file that ends in .parquet, or of any other file as JSON lines, blank ones left out.

    In a table every row has every column, so a column without a value counts as missing; so does a field that is null in JSON lines,
    which pandas and `datasets` write from tables.

    Args:
        missing: what to do if there is no such file.
        wanted: what each row has, in words.

    Raises:
        DataError: nothing there, or not what it should be; with the place and the remedy.
    """
    if path.startswith(HUB):
        return _table(path, _from_hub(path))
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file. {missing}")
    return _table(path, _from_parquet(path)) if path.endswith(".parquet") else _lines(path, wanted)


def _lines(path: str, wanted: str) -> Iterator[Placed]:
    try:
        # With or without the byte order mark that Windows writes.
        with Path(path).open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(f"{path}:{number}", line, wanted)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). A Parquet file must end in .parquet.") from None


def _object(where: str, line: str, wanted: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=functools.partial(_once, where), parse_constant=_no_number)
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be read. Flatten the row, or remove it.") from None
    except ValueError as error:  # not JSON, or a whole number of thousands of digits
        raise DataError(f"{where}: not JSON: {error}. Each line must be one JSON object.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object with {wanted}")
    if SURROGATE.search(line) is not None:
        _require_text(where, row)
    return _given(row)


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: the field `{twice}` is there twice. Remove one.")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _require_text(where: str, row: dict[str, Any]) -> None:
    """Raises DataError if a text holds half of a character, as it comes from cutting in the middle of an emoji."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: field `{name}` holds half of a character (a lone surrogate, such as \\ud83d). Cut texts between characters."
            ) from None


def _given(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _table(path: str, rows: Iterator[dict[str, Any]]) -> Iterator[Placed]:
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _given(row)


def _from_parquet(path: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow. {EXTRA}") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}).") from None
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _from_hub(path: str) -> Iterator[dict[str, Any]]:
    """NAME is a folder that `save_to_disk` wrote, or what `datasets.load_dataset` takes."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: this needs the package datasets. {EXTRA}") from None
    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        data = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises what it likes; all of it means that it cannot be read
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Without a network, save the data set with "
            f"`save_to_disk` where there is one, and name that folder: `{HUB}FOLDER[:SPLIT]`."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data and (split or "train" not in data):
            raise DataError(f"{path}: there is no split `{split or 'train'}`. It has {', '.join(data)}.")
        data = data[split or "train"]
    elif split:
        raise DataError(f"{path}: has no splits. Write `{HUB}{name}`.")
    yield from data
