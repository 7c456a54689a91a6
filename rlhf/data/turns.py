"""What a chat in a row of data must look like, whatever it is for: a list of {role, content}, each with a known role and some words."""

from __future__ import annotations

from typing import Any

from rlhf.data.errors import DataError

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool", "function", "ipython")
"""Who may speak. A template writes an unknown role as it is, and the model has never seen it."""
WHOSE = {"system": "the system", "developer": "the system", "user": "the user", "assistant": "the assistant"}
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}

Messages = list[dict[str, Any]]


def without_nulls(value: Any) -> Any:
    """The same without fields that are null, at any depth: in a table every row has every field, and null means "not given"."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_turns(where: str, field: str, value: Any, form: str) -> Messages:
    """The turns of a chat, without fields that are null.

    Args:
        where: the row's place, for messages.
        field: of the row that holds the chat.
        form: what it must be, in words.

    Raises:
        DataError: it is no chat, or a role is unknown.
    """
    turns = without_nulls(value)
    good = isinstance(turns, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in turns
    )
    if not good or not turns:
        raise DataError(f"{where}: field `{field}` must be {form}")
    for number, turn in enumerate(turns):
        role = turn["role"]
        if role not in ROLES:
            meant = OTHER_NAMES.get(role.lower())
            remedy = f"Rename it to `{meant}`" if meant else "Rename it"
            raise DataError(
                f"{where}: {field}[{number}] has the role {role!r}; known are {', '.join(ROLES)}. {remedy}."
            )
    return turns


def require_words(where: str, field: str, turns: Messages) -> None:
    """Raises DataError if a turn is empty, unless it is a call of a tool, or what a tool gave back."""
    for number, turn in enumerate(turns):
        speaker = WHOSE.get(turn["role"])
        if speaker is not None and not turn["content"].strip() and not turn.get("tool_calls"):
            raise DataError(f"{where}: {field}[{number}], a turn of {speaker}, is empty. Remove the turn, or the row.")
