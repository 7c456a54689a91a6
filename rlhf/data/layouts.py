"""The layouts in which prompts are found: a text or a chat under `prompt`, `messages`, or two conversations that begin alike.

Each becomes the turns that a response answers, and the row's other fields.
"""

from __future__ import annotations

from typing import Any

from rlhf.data.errors import DataError
from rlhf.data.pairs import FIELDS
from rlhf.data.turns import Messages, dialogue, read_turns, require_words, said

FORM = "a list of {role, content} that ends with the user's turn"
OTHER_COLUMNS = {
    **dict.fromkeys(("instruction", "question", "query", "problem", "input", "text", "goal"), "prompt"),
    **dict.fromkeys(("conversations", "conversation"), "messages"),
}
"""Columns that often hold the prompt, and the name it has here."""


def read_prompt(where: str, row: dict[str, Any]) -> tuple[Messages, dict[str, Any]]:
    """The turns of a row's prompt, and its other fields. Of two conversations, `chosen` and `rejected` become the responses alone.

    Raises:
        DataError: there is no prompt, there are two, or it cannot be used.
    """
    if "prompt" in row:
        turns = prompt_turns(where, row["prompt"])
        if "messages" in row:
            require_continuation(where, turns, row["messages"])
        return turns, _without(row, "prompt")
    if "messages" in row:
        return _chat(where, "messages", row["messages"]), _without(row, "messages")
    if all(field in row for field in FIELDS):
        return _implicit(where, row)
    column = next((name for name in OTHER_COLUMNS if name in row), None)
    remedy = f"{{{OTHER_COLUMNS[column]}: {column}}}" if column is not None else "{prompt: COLUMN}"
    raise DataError(
        f"{where}: needs a field `prompt` or `messages`, or conversations as `chosen` and `rejected`; it has {sorted(row)}. Name the "
        f"column that holds the prompt: data.columns={remedy}."
    )


def prompt_turns(where: str, prompt: Any) -> Messages:
    """The field `prompt`, a text or a chat, as turns.

    Raises:
        DataError: it is neither.
    """
    if isinstance(prompt, list):
        return _chat(where, "prompt", prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: field `prompt` must be a text that is not empty, or {FORM}")
    return [{"role": "user", "content": prompt}]


def require_continuation(where: str, prompt: Messages, messages: Any) -> None:
    """Make sure that `messages` is a conversation that goes on from the prompt, as in UltraFeedback and UltraChat, and no other prompt.

    Raises:
        DataError: it is another.
    """
    turns = messages if isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages) else []
    given, asked = ([(turn.get("role"), turn.get("content")) for turn in part] for part in (turns, prompt))
    goes_on = len(given) > len(asked) and given[: len(asked)] == asked and given[len(asked)][0] == "assistant"
    if not goes_on:
        raise DataError(
            f"{where}: has `prompt` and `messages`, and `messages` is not the prompt with an answer. Keep exactly one of them: "
            "data.columns={messages: null} leaves the other out."
        )


def _chat(where: str, field: str, value: Any) -> Messages:
    turns = read_turns(where, field, value, FORM)
    if turns[-1]["role"] != "user":
        answered = turns[-1]["role"] == "assistant"
        remedy = (
            " Leave out the assistant's last turn, which the policy is to write; `rlhf sft` learns from it."
            if answered
            else ""
        )
        raise DataError(f"{where}: field `{field}` must be {FORM}.{remedy}")
    require_words(where, field, turns)
    return turns


def _implicit(where: str, row: dict[str, Any]) -> tuple[Messages, dict[str, Any]]:
    """The prompt that two conversations have in common; only their last turn, the response, may differ."""
    chosen, rejected = (_conversation(where, field, row[field]) for field in FIELDS)
    if said(chosen[:-1]) != said(rejected[:-1]):
        raise DataError(
            f"{where}: `chosen` and `rejected` differ before their last turn, so they have no prompt in common. Cut both after the first "
            "turn that differs, or remove the row."
        )
    turns = _chat(where, "chosen", chosen[:-1])
    return turns, row | {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _conversation(where: str, field: str, value: Any) -> Messages:
    form = "a conversation, prompt included, that ends with the assistant's turn, as there is no field `prompt`"
    turns = read_turns(where, field, dialogue(value) or value, form)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise DataError(
            f"{where}: field `{field}` must be {form}. Add the prompt to the row, or the turns before the response."
        )
    return turns


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {field: value for field, value in row.items() if field != name}
