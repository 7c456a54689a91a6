"""Preference data, row by row: each of a row's fields with the checks that any field needs, and its place for errors.

What a row must hold is checked by `dataset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config.data import Columns
from rlhf.data.rows import read_rows
from rlhf.data.turns import dialogue, read_turns
from rlhf.reward.errors import RewardError
from rlhf.reward.reading import Conversation, as_text
from rlhf.types import Turn


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
            raise self.error(
                name,
                f"missing. Add it, or remove the row, which has {', '.join(filter(self.has, self.fields)) or 'nothing'}.",
            )
        return self.fields[name]

    def text(self, name: str) -> str:
        return self.as_text(name, self.field(name))

    def as_text(self, name: str, value: Any) -> str:
        """The text; of a chat, what is said last, by the assistant."""
        if _is_chat(value):
            last = self._turns(name, value)[-1]
            if last.role != "assistant":
                raise self.error(
                    name, f"ends with the turn of `{last.role}`; the last turn is the response, the assistant's."
                )
            value = last.content
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, f"must be text that is not empty, not {value!r:.60}.")
        return value

    def prompt(self) -> Conversation | None:
        """What the row's texts answer: its `prompt`, a text or a chat; or the turns before the last one of its chats."""
        given = None
        if self.has("prompt"):
            value = self.fields["prompt"]
            given = self._turns("prompt", value) if _is_chat(value) else as_text(self.text("prompt"))
            if given[-1].role == "assistant":
                raise self.error(
                    "prompt", "ends with the assistant's turn, which is the response. Move it to the text."
                )
        found = given
        for name, answer in self._answers():
            if not _is_chat(answer) or len(answer) < 2:
                continue
            turns = self._turns(name, answer)[:-1]
            # A prompt as text may be the last turn of what the chat holds whole.
            alike = found is None or turns == found or (found == given and as_text(turns[-1].content) == found)
            if not alike:
                raise self.error(
                    name,
                    "answers another conversation than the row's prompt or its other texts. Give one row for each.",
                )
            found = turns
        return found

    def _answers(self) -> list[tuple[str, Any]]:
        """The row's texts with the names of their fields."""
        responses = self.fields.get("responses")
        listed = responses if isinstance(responses, list) else []
        named = [(f"responses[{place}]", one) for place, one in enumerate(listed)]
        return named + [(name, self.fields.get(name)) for name in ("text", "chosen", "rejected")]

    def _turns(self, name: str, chat: list[dict[str, Any]]) -> Conversation:
        try:
            return tuple(map(Turn.of, read_turns(self.place, name, chat, "a text, or a list of {role, content}")))
        except TypeError as error:
            raise self.error(name, f"holds what JSON has no form for ({error}). Convert or remove it.") from None

    def number(self, name: str) -> float:
        return self.as_number(name, self.field(name))

    def as_number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, f"must be a finite number, not {value!r:.60}.")
        return float(value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def read_preferences(path: str, columns: Columns | None = None) -> list[Row]:
    """The rows of a file, as `rlhf.data.rows` reads it. In rows without a prompt, texts in the form of HH-RLHF become chats.

    Args:
        columns: names for its columns.

    Raises:
        DataError: nothing there, or not what it should be; with the place and the remedy.
    """
    rows = read_rows(path, "Name the file of ratings or pairs.", "what people said of texts", columns)
    return [Row(where, row if "prompt" in row else _dialogues(row)) for where, row in rows]


def _dialogues(row: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = {
        name: dialogue(row[name]) or row[name] for name in ("text", "chosen", "rejected") if name in row
    }
    if isinstance(row.get("responses"), list):
        read["responses"] = [dialogue(text) or text for text in row["responses"]]
    return row | read
