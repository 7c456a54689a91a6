"""Examples for supervised fine-tuning: conversations as tokens, with the mark of who wrote each.

The mask holds by construction: a conversation is cut into what the assistant wrote and what it was given, as text, and the pieces
are tokenised one by one. So the assistant's tokens begin exactly where the engine would begin to sample them, and end with the
token it stops on. Knows nothing of models and losses.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.config.sft import SftDataSettings
from rlhf.data.assets import resolve
from rlhf.data.errors import DataError
from rlhf.data.prompts import load_tokenizer
from rlhf.data.rendering import Renderer, encode
from rlhf.data.rows import read_rows
from rlhf.data.turns import Messages, read_turns, require_words


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
    """The examples of one file, in its order, and how many were left out, by reason."""

    conversations: list[Conversation]
    dropped: dict[str, int]

    @property
    def learned_tokens(self) -> int:
        """Tokens that a loss is taken of, over all examples."""
        return sum(int(conversation.learned.sum()) for conversation in self.conversations)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these examples from others."""
        digest = hashlib.sha256()
        for conversation in self.conversations:
            digest.update(conversation.token_ids.tobytes() + conversation.learned.tobytes())
        return digest.hexdigest()[:16]


def read_examples(model: str, data: SftDataSettings) -> tuple[ReadConversations, ReadConversations | None]:
    """Training and held-out examples, as the tokenizer of `model` (a folder, asset or hub name) reads them.

    Raises:
        UserError: a file or a row that cannot be used.
    """
    tokenizer = load_tokenizer(resolve(model))
    examples = read_conversations(resolve(data.examples), "data.examples", tokenizer, data)
    if data.eval_examples is None:
        return examples, None
    return examples, read_conversations(resolve(data.eval_examples), "data.eval_examples", tokenizer, data)


def rendering(tokenizer: Any, data: SftDataSettings) -> Renderer:
    """As the settings of the examples say."""
    return Renderer(tokenizer, data.chat_template, data.system_prompt, data.template_arguments)


def read_conversations(path: str, field: str, tokenizer: Any, data: SftDataSettings) -> ReadConversations:
    """Read, check, render and tokenise the examples of one file.

    Args:
        field: of the settings that names the file, for messages.
        tokenizer: a transformers tokenizer.

    Raises:
        DataError: a template that cannot be used, unreadable file, bad row, an example over `data.max_tokens` (unless such are dropped),
            nothing left.
    """
    renderer = rendering(tokenizer, data)
    renderer.check()
    if renderer.end is None:
        raise DataError("policy.model: its tokenizer has no end-of-sequence token, with which responses would end.")
    read: list[Conversation] = []
    dropped: Counter[str] = Counter()
    for where, row in read_rows(path, f"Set {field} to a file of examples.", "the fields of an example"):
        conversation = tokenise_conversation(where, row, renderer, data)
        length = len(conversation.token_ids)
        if length <= data.max_tokens:
            read.append(conversation)
        elif data.too_long == "drop":
            dropped["too_long"] += 1
        else:
            raise DataError(
                f"{where}: the example has {length} tokens, more than data.max_tokens={data.max_tokens}. Raise it, shorten the "
                "text, or set data.too_long=drop."
            )
    if not read:
        why = f"all {dropped['too_long']} examples are longer than data.max_tokens" if dropped else "the file is empty"
        raise DataError(f"{path}: there is nothing to learn from: {why}. Look at {field}.")
    return ReadConversations(read, dict(dropped))


def tokenise_conversation(where: str, row: dict[str, Any], renderer: Renderer, data: SftDataSettings) -> Conversation:
    """One row as tokens, of any length.

    Args:
        where: the row's place, for messages.
        renderer: how conversations become tokens.

    Raises:
        DataError: the row cannot be used.
    """
    messages = renderer.conversation(where, _messages(where, row, data))
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
        clash = [name for name in (prompt, response) if name in row]
        if clash:
            raise DataError(f"{where}: has `messages` and `{clash[0]}`, so it is unclear what to learn. Remove one.")
        messages = _chat(where, row["messages"])
    else:
        for name, setting in ((prompt, "data.prompt_field"), (response, "data.response_field")):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    f"{where}: field `{name}` must be a text that is not empty; the row has {sorted(row)}. Correct the row, or name "
                    f"another field in {setting}."
                )
        messages = [{"role": "user", "content": row[prompt]}, {"role": "assistant", "content": row[response]}]
    return messages


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
