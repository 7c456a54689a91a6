"""The files that people's judgements come in: JSONL, Parquet, or a data set of the package `datasets`, row by row.

Owns where rows come from and how a row is named in an error. What a row must hold is checked by `dataset`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.reward.errors import RewardError

HUB = "hf:"
EXTRA = 'Install it with `pip install "rlhf[datasets]"`, or convert the data to JSONL.'


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, as an error names it ("ratings.jsonl, line 3")."""

    place: str
    fields: Mapping[str, Any]

    def error(self, field: str, problem: str) -> RewardError:
        return RewardError(f"{self.place}, field `{field}`: {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there. In a table every row has every column, so an empty cell counts as missing."""
        return self.fields.get(name) is not None

    def field(self, name: str) -> Any:
        if not self.has(name):
            raise self.error(name, f"missing. The row has {', '.join(n for n in self.fields if self.has(n))}.")
        return self.fields[name]

    def text(self, name: str) -> str:
        return self.as_text(name, self.field(name))

    def as_text(self, name: str, value: Any) -> str:
        """The text; of a chat, what is said last."""
        if _is_chat(value):
            value = value[-1]["content"]
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, f"must be text that is not empty, not {value!r:.60}.")
        return value

    def prompt(self) -> str | None:
        """What the row's texts answer: its `prompt`, or the turn before the last one of a chat.

        As in the loop, a reward model does not read earlier turns.
        """
        if self.has("prompt"):
            return self.text("prompt")
        responses = self.fields.get("responses")
        answers = [responses[0]] if isinstance(responses, list) and responses else []
        answers += [self.fields.get(name) for name in ("text", "chosen")]
        chat = next((answer for answer in answers if _is_chat(answer) and len(answer) > 1), None)
        return None if chat is None else self.as_text("prompt", chat[-2]["content"])

    def number(self, name: str) -> float:
        return self.as_number(name, self.field(name))

    def as_number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, f"must be a finite number, not {value!r:.60}.")
        return float(value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "content" in m for m in value)


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a file that ends in .parquet, of `hf:NAME[:SPLIT]`, or of any other file as JSONL; empty lines are left out.

    Raises:
        RewardError: nothing there, or not what it should be; with the place and the remedy.
    """
    if path.startswith(HUB):
        return _hub(path)
    if not Path(path).is_file():
        raise RewardError(f"there is no data file {path}.")
    return _parquet(path) if path.endswith(".parquet") else _jsonl(path)


def _jsonl(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RewardError(f"{place}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise RewardError(f"{place}: a {type(row).__name__}; each line must be a JSON object.")
            yield Row(place, row)


def _parquet(path: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RewardError(f"{path}: reading Parquet needs the package pyarrow. {EXTRA}") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RewardError(f"{path}: not a Parquet file that can be read ({error}).") from None
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", row)


def _hub(path: str) -> Iterator[Row]:
    """NAME is a folder that `save_to_disk` wrote, or what `datasets.load_dataset` takes."""
    try:
        import datasets
    except ImportError:
        raise RewardError(f"{path}: this needs the package datasets. {EXTRA}") from None
    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        data = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises what it likes; all of it means that it cannot be read
        raise RewardError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Without a network, save the data set with "
            f"`save_to_disk` where there is one, and name that folder: `{HUB}FOLDER[:SPLIT]`."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data and (split or "train" not in data):
            raise RewardError(f"{path}: there is no split `{split or 'train'}`. It has {', '.join(data)}.")
        data = data[split or "train"]
    elif split:
        raise RewardError(f"{path}: has no splits. Write `{HUB}{name}`.")
    for number, row in enumerate(data, 1):
        yield Row(f"{path}, row {number}", row)
