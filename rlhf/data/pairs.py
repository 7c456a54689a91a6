"""The data set's own pairs: the fields `chosen` and `rejected` of a prompt's line.

A response is tokenised here, once, as it would have been sampled: it continues the chat template's generation prompt, and ends
with the token that the engine stops on. Whether a method needs pairs is not known here.
"""

from __future__ import annotations

from typing import Any

from rlhf.data.errors import DataError

FIELDS = ("chosen", "rejected")

Pair = tuple[str, str]
"""Chosen and rejected response, as text."""


def read_pair(where: str, row: dict[str, Any], messages: list[dict[str, str]]) -> Pair | None:
    """Take the pair out of a line's fields; None if it has none.

    Args:
        where: the line's place, for messages.
        row: the line's fields; `chosen` and `rejected` are removed.
        messages: the prompt as a chat, which a response given as a chat must continue.

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


def tokenise_pair(where: str, pair: Pair | None, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of both responses, each with its end-of-sequence token.

    Raises:
        DataError: there is no pair, or the tokenizer has no end-of-sequence token.
    """
    if pair is None:
        raise DataError(
            f"{where}: no fields `chosen` and `rejected`, but algorithm.name is a method that learns from the data set's pairs, "
            "as the settings stand. Add both to every line of data.prompts, or let the method sample its own: "
            "algorithm.ranked_with=samples (selm), algorithm.pairs=sampled (iterative_dpo)."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "policy.model: its tokenizer has no end-of-sequence token, with which the responses of data.prompts would end."
        )
    chosen, rejected = ((*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id) for text in pair)
    return chosen, rejected


def _response(where: str, field: str, value: Any, messages: list[dict[str, str]]) -> str:
    if isinstance(value, str):
        return value
    good = isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
    if not good or not value or value[-1].get("role") != "assistant":
        raise DataError(
            f"{where}: field `{field}` must be a text, or a list of {{role, content}} that ends with the assistant's turn"
        )
    before = [turn for turn in value[:-1] if turn.get("role") != "system"]
    asked = [turn for turn in messages if turn["role"] != "system"]
    if before and [(t.get("role"), t["content"]) for t in before] != [(t["role"], t["content"]) for t in asked]:
        raise DataError(
            f"{where}: field `{field}` answers another conversation than the prompt. Give the assistant's turn alone, or the "
            "prompt's own turns before it."
        )
    return value[-1]["content"]
