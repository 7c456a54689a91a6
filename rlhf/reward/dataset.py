"""Data for training a reward model: rated texts or preference pairs from JSONL, checked line by line.

Rated rows have `text` and `rating`; paired rows have `chosen` and `rejected`; both may have a `prompt`. Knows nothing
of models.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.reward.errors import RewardError
from rlhf.reward.models import Example, Input

KINDS = {"rated": ("text", "rating"), "paired": ("chosen", "rejected")}


@dataclass(frozen=True)
class PreferenceData:
    """Texts, and what people said about them.

    Attributes:
        examples: all texts; a paired row k owns 2k (chosen) and 2k+1 (rejected).
        ratings: float64 [n_examples] for rated data, None for paired.
        input: "conversation" if the rows have prompts, else "response".
    """

    examples: list[Example]
    ratings: np.ndarray | None
    input: Input

    @property
    def n_rows(self) -> int:
        return len(self.examples) if self.ratings is not None else len(self.examples) // 2

    def rows(self, chosen: np.ndarray) -> PreferenceData:
        """These rows only."""
        if self.ratings is not None:
            return PreferenceData([self.examples[i] for i in chosen], self.ratings[chosen], self.input)
        return PreferenceData([self.examples[2 * i + k] for i in chosen for k in (0, 1)], None, self.input)

    def divide(self, fraction: float, rng: np.random.Generator) -> tuple[PreferenceData, PreferenceData]:
        """The rest, and about `fraction` of the rows. Rows with the same prompt stay together."""
        step = 1 if self.ratings is not None else 2
        first = self.examples[::step]
        keys = [example.prompt if self.input == "conversation" else str(i) for i, example in enumerate(first)]
        names = sorted(set(keys))
        taken = {names[i] for i in rng.permutation(len(names))[: max(1, round(fraction * len(names)))]}
        mask = np.array([key in taken for key in keys])
        return self.rows(np.flatnonzero(~mask)), self.rows(np.flatnonzero(mask))

    def pairs(self, margin: float, limit: int, rng: np.random.Generator) -> np.ndarray:
        """[n_pairs, 2] indices of examples, winner first. From ratings: `limit` pairs more than `margin` apart."""
        if self.ratings is None:
            return np.arange(len(self.examples)).reshape(-1, 2)
        winner, loser = np.nonzero(self.ratings[:, None] - self.ratings[None, :] > margin)
        if len(winner) > limit:
            kept = rng.choice(len(winner), limit, replace=False)
            winner, loser = winner[kept], loser[kept]
        return np.stack([winner, loser], axis=1)


def read_data(path: str) -> PreferenceData:
    """Read a JSONL file of rated or paired rows; the first row decides which.

    Raises:
        RewardError: with the file, the line, the field and what is wrong with it.
    """
    if not Path(path).is_file():
        raise RewardError(f"there is no data file {path}.")
    rows: list[tuple[int, dict[str, Any]]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append((number, _parse(path, number, line)))
    if not rows:
        raise RewardError(f"{path} has no rows.")
    kind = _kind(path, *rows[0])
    with_prompt = "prompt" in rows[0][1]
    examples: list[Example] = []
    ratings: list[float] = []
    for number, row in rows:
        if ("prompt" in row) != with_prompt:
            raise RewardError(f"{path}, line {number}, field `prompt`: give it in every row or in none.")
        prompt = _text(path, number, row, "prompt") if with_prompt else ""
        if kind == "rated":
            examples.append(Example(prompt, _text(path, number, row, "text")))
            ratings.append(_number(path, number, row, "rating"))
            continue
        chosen, rejected = (_text(path, number, row, name) for name in KINDS["paired"])
        if chosen == rejected:
            raise RewardError(
                f"{path}, line {number}, field `rejected`: equal to `chosen`. Remove the row; it says nothing."
            )
        examples += [Example(prompt, chosen), Example(prompt, rejected)]
    return PreferenceData(
        examples, np.array(ratings) if kind == "rated" else None, "conversation" if with_prompt else "response"
    )


def _parse(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RewardError(f"{path}, line {number}: not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise RewardError(f"{path}, line {number}: a {type(row).__name__}; each line must be a JSON object.")
    return row


def _kind(path: str, number: int, row: dict[str, Any]) -> str:
    for kind, fields in KINDS.items():
        if any(name in row for name in fields):
            return kind
    raise RewardError(
        f"{path}, line {number}: has the fields {', '.join(row) or '(none)'}. Rated rows need `text` and "
        "`rating`, paired rows `chosen` and `rejected`."
    )


def _text(path: str, number: int, row: dict[str, Any], name: str) -> str:
    value = _field(path, number, row, name)
    if not isinstance(value, str) or not value.strip():
        raise RewardError(f"{path}, line {number}, field `{name}`: must be text that is not empty, not {value!r:.60}.")
    return value


def _number(path: str, number: int, row: dict[str, Any], name: str) -> float:
    value = _field(path, number, row, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RewardError(f"{path}, line {number}, field `{name}`: must be a finite number, not {value!r:.60}.")
    return float(value)


def _field(path: str, number: int, row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise RewardError(f"{path}, line {number}, field `{name}`: missing. The row has {', '.join(row)}.")
    return row[name]
