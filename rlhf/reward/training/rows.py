"""What people said of texts, row by row: each of its fields with the checks that any field needs, and its place for errors.

What a row must hold is checked by `dataset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.data.rows import read_rows
from rlhf.reward.errors import RewardError


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, as an error names it ("ratings.jsonl:3")."""

    place: str
    fields: Mapping[str, Any]

    def error(self, field: str, problem: str) -> RewardError:
        return RewardError(f"{self.place}, field `{field}`: {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there, and holds something."""
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


def read_preferences(path: str) -> list[Row]:
    """The rows of a file, as `rlhf.data.rows` reads it.

    Raises:
        DataError: nothing there, or not what it should be; with the place and the remedy.
    """
    return [
        Row(where, row)
        for where, row in read_rows(path, "Name the file of ratings or pairs.", "what people said of texts")
    ]
