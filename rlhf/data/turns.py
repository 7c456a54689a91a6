"""What a chat in a row of data must look like, whatever it is for: a list of {role, content}, each with a known role and some words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.errors import DataError

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool", "function", "ipython")
"""Who may speak. A template writes an unknown role as it is, and the model has never seen it."""
WHOSE = {"system": "the system", "developer": "the system", "user": "the user", "assistant": "the assistant"}
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}
SPEAKER = re.compile(r"\n\n(Human|Assistant):")

Messages = list[dict[str, Any]]


def without_nulls(value: Any) -> Any:
    """The same without fields that are null, at any depth: in a table every row has every field, and null means "not given"."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_turns(where: str, field: str, value: Any, form: str) -> Messages:
    """The turns of a chat, without fields that are null.

    A turn may also be {from, value} (ShareGPT), and one that calls a tool may be without content.

    Args:
        where: the row's place, for messages.
        field: of the row that holds the chat.
        form: what it must be, in words.

    Raises:
        DataError: it is no chat, a role is unknown, or there are two system messages.
    """
    turns = without_nulls(value)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: field `{field}` must be {form}")
    turns = [_turn(turn) for turn in turns]
    for number, turn in enumerate(turns):
        if isinstance(turn.get("content"), list):
            raise DataError(
                f"{where}: {field}[{number}] has a list of parts as its content. Only text is read: write the text itself, or leave the "
                "row out if it has images."
            )
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise DataError(
                f"{where}: field `{field}` must be {form}; {field}[{number}] needs `role` and `content`, both text."
            )
        _require_known(f"{where}: {field}[{number}]", turn["role"])
    if sum(turn["role"] in SYSTEM_ROLES for turn in turns) > 1:
        raise DataError(f"{where}: field `{field}` has two system messages. Join them into one.")
    return turns


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with `role` and `content`, where it is written otherwise."""
    if "from" in turn and "value" in turn and not turn.keys() & {"role", "content"}:
        role = turn["from"]
        named = {"role": OTHER_NAMES.get(role, role) if isinstance(role, str) else role, "content": turn["value"]}
        return named | {name: inner for name, inner in turn.items() if name not in ("from", "value")}
    if turn.get("tool_calls") and "content" not in turn:
        return turn | {"content": ""}
    return turn


def _require_known(place: str, role: str) -> None:
    if role not in ROLES:
        meant = OTHER_NAMES.get(role.lower())
        remedy = f"Rename it to `{meant}`" if meant else "Rename it"
        raise DataError(f"{place} has the role {role!r}; known are {', '.join(ROLES)}. {remedy}.")


def said(turns: Sequence[Mapping[str, Any]], system: bool = True) -> list[tuple[str, str]]:
    """Who says what, to compare conversations.

    Args:
        system: with the system message.
    """
    return [(turn["role"], turn["content"]) for turn in turns if system or turn["role"] not in SYSTEM_ROLES]


def dialogue(text: Any) -> Messages | None:
    """The turns of a text in the form of HH-RLHF, which begins with Human's turn and ends with Assistant's; None: it is another text."""
    if not isinstance(text, str):
        return None
    before, *parts = SPEAKER.split("\n\n" + text.lstrip("\n"))
    if before or len(parts) < 4 or parts[0] != "Human" or parts[-2] != "Assistant":
        return None
    return [
        {"role": "user" if who == "Human" else "assistant", "content": words.strip()}
        for who, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def require_words(where: str, field: str, turns: Messages) -> None:
    """Raises DataError if a turn is empty, unless it is a call of a tool, or what a tool gave back."""
    for number, turn in enumerate(turns):
        speaker = WHOSE.get(turn["role"])
        if speaker is not None and not turn["content"].strip() and not turn.get("tool_calls"):
            raise DataError(f"{where}: {field}[{number}], a turn of {speaker}, is empty. Remove the turn, or the row.")
