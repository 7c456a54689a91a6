"""The data set's own pairs: the fields `chosen` and `rejected` of a prompt's line. Whether a method needs pairs is not known here."""

from __future__ import annotations

from typing import Any

from rlhf.data.errors import DataError
from rlhf.data.rendering import Renderer
from rlhf.data.turns import SYSTEM_ROLES, Messages, read_turns, said

FIELDS = ("chosen", "rejected")

Pair = tuple[str, str]
"""Chosen and rejected response, as text."""


def read_pair(where: str, row: dict[str, Any], messages: Messages) -> Pair | None:
    """Take the pair out of a line's fields; None if it has none.

    Args:
        where: the line's place, for messages.
        row: the line's fields; `chosen` and `rejected` are removed.
        messages: the prompt as a chat, system message included, which a response given as a chat must continue.

    Raises:
        DataError: one without the other, or not a response to this prompt.
    """
    given = [field for field in FIELDS if field in row]
    if not given:
        return None
    if len(given) == 1:
        other = FIELDS[1 - FIELDS.index(given[0])]
        raise DataError(f"{where}: field `{given[0]}` without `{other}`. A pair needs both; add it, or remove the one.")
    chosen, rejected = (_response(where, field, row.pop(field), messages) for field in FIELDS)
    return chosen, rejected


def tokenise_pair(
    where: str, pair: Pair | None, messages: Messages, renderer: Renderer
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of both responses to the chat `messages`, each as the policy would have sampled it (see `Renderer.response`).

    Raises:
        DataError: there is no pair, or it cannot be rendered.
    """
    if pair is None:
        raise DataError(
            f"{where}: no fields `chosen` and `rejected`, but algorithm.name is a method that learns from the data set's pairs, "
            "as the settings stand. Add both to every line of data.prompts, or let the method sample its own: "
            "algorithm.ranked_with=samples (selm), algorithm.pairs=sampled (iterative_dpo)."
        )
    chosen, rejected = (tuple(renderer.response(where, messages, text)) for text in pair)
    return chosen, rejected


def _response(where: str, field: str, value: Any, messages: Messages) -> str:
    if isinstance(value, str):
        return value
    form = "a text, or a list of {role, content} that ends with the assistant's turn"
    turns = read_turns(where, field, value, form)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: field `{field}` must be {form}")
    before = turns[:-1]
    # A chat may leave out the prompt's system message, but not bring one that the prompt has not.
    own_system = any(turn["role"] in SYSTEM_ROLES for turn in before)
    if before and said(before) != said(messages, system=own_system):
        raise DataError(
            f"{where}: field `{field}` answers another conversation than the prompt. Give the assistant's turn alone, or the "
            "prompt's own turns before it."
        )
    return turns[-1]["content"]
