"""Examples for supervised fine-tuning: conversations as tokens, with the mark of who wrote each.

The mask holds by construction: a conversation is cut into what the assistant wrote and what it was given, as text, and the pieces
are tokenised one by one. So the assistant's tokens begin exactly where the engine would begin to sample them, and end with the
token it stops on. Knows nothing of models and losses.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from rlhf.config.data import DataSource, listed
from rlhf.config.sft import SftDataSettings
from rlhf.data.assets import resolve
from rlhf.data.errors import DataError
from rlhf.data.layouts import prompt_turns, require_continuation
from rlhf.data.model_folder import find_model
from rlhf.data.order import Share
from rlhf.data.prompts import load_tokenizer
from rlhf.data.rendering import Renderer, control_tokens, encode
from rlhf.data.rows import read_rows
from rlhf.data.turns import Messages, read_turns, require_words

log = logging.getLogger(__name__)

OTHER_RESPONSES = ("completion", "output", "answer", "solution", "response")
"""Columns that often hold the response."""


@dataclass(frozen=True)
class Conversation:
    """One example.

    Attributes:
        token_ids: int32 [n_tokens], prompt and answers; the last answer ends with the token that ends a turn.
        learned: bool [n_tokens], True for the assistant's tokens, the token that ends each answer among them.
    """

    token_ids: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class ReadConversations:
    """The examples that were read, and how many were left out, by reason.

    Attributes:
        conversations: in file order, source by source.
        shares: of a mixture: how its sources share the draws (see `Order`).
    """

    conversations: list[Conversation]
    dropped: dict[str, int]
    shares: tuple[Share, ...] = ()

    @property
    def learned_tokens(self) -> int:
        """Tokens that a loss is taken of, over all examples."""
        return sum(int(conversation.learned.sum()) for conversation in self.conversations)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these examples from others."""
        digest = hashlib.sha256()
        for conversation in self.conversations:
            digest.update(conversation.token_ids.tobytes() + conversation.learned.tobytes())
        if self.shares:
            digest.update(repr([tuple(share) for share in self.shares]).encode())
        return digest.hexdigest()[:16]


def read_examples(model: str, data: SftDataSettings) -> tuple[ReadConversations, ReadConversations | None]:
    """Training and held-out examples, as the tokenizer of `model` (a folder, asset or hub name) reads them.

    Raises:
        UserError: a file or a row that cannot be used.
    """
    tokenizer = load_tokenizer(find_model(model, "`policy.model`", weights=False))
    examples = read_conversations(data.examples, "data.examples", tokenizer, data)
    if data.eval_examples is None:
        return examples, None
    return examples, read_conversations(data.eval_examples, "data.eval_examples", tokenizer, data)


def rendering(tokenizer: Any, data: SftDataSettings) -> Renderer:
    """As the settings of the examples say."""
    return Renderer(tokenizer, data.chat_template, data.system_prompt, data.template_arguments)


def read_conversations(
    sources: str | Sequence[DataSource], field: str, tokenizer: Any, data: SftDataSettings
) -> ReadConversations:
    """Read, check, render and tokenise the examples of one source or of several, one after the other.

    Args:
        field: of the settings that names the sources, for messages.
        tokenizer: a transformers tokenizer.

    Raises:
        DataError: a template that cannot be used, unreadable file, bad row, an example over `data.max_tokens` (unless such are dropped),
            nothing left.
    """
    renderer = rendering(tokenizer, data)
    renderer.check()
    if renderer.end is None:
        raise DataError("policy.model: its tokenizer has no end-of-sequence token, with which responses would end.")
    every = listed(sources, data.columns)
    dropped: Counter[str] = Counter()
    control: Counter[str] = Counter()
    parts = [_read(source, field, renderer, data, dropped, control) for source in every]
    if control:
        log.warning(
            "%s: turns have control tokens written out in their text (%s); the model reads them as such. Remove them if that is not meant",
            field,
            ", ".join(f"{name} in {count}" for name, count in sorted(control.items())),
        )
    weights = [source.weight for source in every if source.weight is not None]
    shares = [Share(len(part), weight) for part, weight in zip(parts, weights, strict=True)] if weights else []
    return ReadConversations(list(chain.from_iterable(parts)), dict(dropped), tuple(shares))


def _read(
    source: DataSource,
    field: str,
    renderer: Renderer,
    data: SftDataSettings,
    dropped: Counter[str],
    control: Counter[str],
) -> list[Conversation]:
    """
    Args:
        dropped: examples that were left out, by reason; counted on.
        control: turns that have a control token written out, by its name; counted on.
    """
    path, read, left_out = resolve(source.path), [], 0
    for where, row in read_rows(
        path, f"Set {field} to a file of examples.", "the fields of an example", source.columns
    ):
        messages = _messages(where, row, data)
        if renderer.chat_template:  # a text that is rendered already has them on purpose
            control.update(name for turn in messages for name in control_tokens(renderer.tokenizer, turn["content"]))
        conversation = _tokenised(where, messages, renderer)
        length = len(conversation.token_ids)
        if length <= data.max_tokens:
            read.append(conversation)
        elif data.too_long == "drop":
            left_out += 1
        else:
            raise DataError(
                f"{where}: the example has {length} tokens, more than data.max_tokens={data.max_tokens}. Raise it, shorten the "
                "text, or set data.too_long=drop."
            )
    if left_out:
        dropped["too_long"] += left_out
    if not read:
        why = f"all {left_out} examples are longer than data.max_tokens" if left_out else "the file is empty"
        raise DataError(f"{path}: there is nothing to learn from: {why}. Look at {field}.")
    return read


def tokenise_conversation(where: str, row: dict[str, Any], renderer: Renderer, data: SftDataSettings) -> Conversation:
    """One row as tokens, of any length.

    Args:
        where: the row's place, for messages.
        renderer: how conversations become tokens.

    Raises:
        DataError: the row cannot be used.
    """
    return _tokenised(where, _messages(where, row, data), renderer)


def _tokenised(where: str, turns: Messages, renderer: Renderer) -> Conversation:
    messages = renderer.conversation(where, turns)
    pieces = (_chat_pieces if renderer.chat_template else _plain_pieces)(where, messages, renderer)
    ids, learned = [], []
    for tokens, by_assistant in pieces:
        ids.append(np.asarray(tokens, dtype=np.int32))
        learned.append(np.full(len(tokens), by_assistant))
    return Conversation(np.concatenate(ids), np.concatenate(learned))


def _messages(where: str, row: dict[str, Any], data: SftDataSettings) -> Messages:
    """The row as a chat that ends with the assistant's turn."""
    prompt, response = data.prompt_field, data.response_field
    if "messages" in row:
        if response in row:
            raise DataError(f"{where}: has `messages` and `{response}`, so it is unclear what to learn. Remove one.")
        if prompt in row:
            require_continuation(where, prompt_turns(where, row[prompt]), row["messages"])
        return _chat(where, row["messages"])
    if prompt == "instruction" and row.get("input"):
        raise DataError(
            f"{where}: has an `input` beside its `instruction`, which would be left out. Join the two in the data."
        )
    for name, setting in ((prompt, "data.prompt_field"), (response, "data.response_field")):
        value = row.get(name)
        if not (isinstance(value, str) and value.strip() or isinstance(value, list)):
            other = next((other for other in OTHER_RESPONSES if other in row), "another field")
            named = f"{setting}={other}" if name == response else f"another field in {setting}"
            raise DataError(
                f"{where}: field `{name}` must be a text that is not empty (or turns); the row has {sorted(row)}. Correct the row, or name "
                f"{named}."
            )
    return [*prompt_turns(where, row[prompt]), _answer(where, response, row[response])]


def _answer(where: str, field: str, value: Any) -> dict[str, Any]:
    """A response, as text or as the assistant's turn."""
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    form = "a text, or a list of one turn, the assistant's"
    turns = read_turns(where, field, value, form)
    if len(turns) > 1 or turns[0]["role"] != "assistant":
        raise DataError(f"{where}: field `{field}` must be {form}. A whole conversation belongs in `messages`.")
    require_words(where, field, turns)
    return turns[0]


def _chat(where: str, value: Any) -> Messages:
    form = "a list of {role, content} that begins with the user's or the system's turn and ends with the assistant's"
    turns = read_turns(where, "messages", value, form)
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or turns[0]["role"] == "assistant":
        raise DataError(f"{where}: field `messages` must be {form}")
    require_words(where, "messages", turns)
    return turns


def _plain_pieces(where: str, messages: Messages, renderer: Renderer) -> list[tuple[list[int], bool]]:
    """Without a template: the prompt as it is, and the response with its end."""
    if len(messages) != 2:
        raise DataError(f"{where}: a chat of several turns needs data.chat_template=true")
    return [
        (renderer.prompt(where, messages[:1]), False),
        (renderer.response(where, messages[:1], messages[1]["content"]), True),
    ]


def _chat_pieces(where: str, messages: Messages, renderer: Renderer) -> list[tuple[list[int], bool]]:
    """Through the chat template: what leads to each answer, the answer up to the token that ends it, what the template adds."""
    whole = renderer.text(where, messages, prompt=False)
    pieces: list[tuple[list[int], bool]] = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = renderer.text(where, messages[:number], prompt=True)
        after = renderer.text(where, messages[: number + 1], prompt=False)
        if not (whole.startswith(after) and after.startswith(before) and len(after) > len(before) >= done):
            raise DataError(
                f"{where}: messages[{number}]: with this chat template the conversation does not begin with its own prompt (the "
                "template changes earlier turns, or trims them), so the assistant's tokens cannot be told from the rest. Give each "
                "answer a line of its own, or set data.chat_template=false."
            )
        pieces.append((encode(renderer.tokenizer, whole[done : len(before)], rendered=True), False))
        answer = encode(renderer.tokenizer, after[len(before) :], rendered=True)
        written, added = renderer.ended(where, answer, message["content"])
        last = number == len(messages) - 1
        if not last and len(written) > len(
            answer
        ):  # the template ends no turns, so only the conversation's end is marked
            written = answer
        pieces += [(written, True), ([] if last else added, False)]
        done = len(after)
    return pieces
