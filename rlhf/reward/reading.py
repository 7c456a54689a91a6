"""What a reward model reads: a conversation with one response to it, or two, as tokens. One reader for judges and for training.

Owns how texts pass through a chat template, and what happens to one that is longer than the model reads: its prompt loses its
beginning, and a response is never cut. Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rlhf.data.errors import DataError
from rlhf.data.rendering import render
from rlhf.types import Failed, Turn

Input = Literal["response", "conversation"]
Conversation = tuple[Turn, ...]
"""The turns that a response answers; none where there is no prompt."""

COMPARISON = "{prompt}\n\nResponse A:\n{a}\n\nResponse B:\n{b}"
"""What a cross-encoder reads."""


class Example(NamedTuple):
    """One response to judge; the prompt is read only by models whose input is the conversation."""

    prompt: Conversation
    response: str


class Comparison(NamedTuple):
    """Two responses, for a model that reads both."""

    prompt: Conversation
    a: str
    b: str


class PromptOnly(NamedTuple):
    """A prompt without a response, for a GPM's gate."""

    prompt: Conversation


Text = Example | Comparison | PromptOnly
"""What a model can read."""


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it.

    Attributes:
        ids: token ids.
        cut: tokens that its prompt has lost at the beginning.
    """

    ids: list[int]
    cut: int = 0


def as_text(text: str) -> Conversation:
    """A prompt of one turn, the user's."""
    return (Turn("user", text),)


def transcript(conversation: Conversation) -> str:
    """A conversation for a reader without a chat template: a lone user's turn as it is; of several, each under its role's name."""
    if _alone(conversation):
        return "".join(turn.content for turn in conversation)
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}{_calls(turn)}" for turn in conversation)


class Reader:
    """Makes texts tokens.

    Args:
        tokenizer: a transformers tokenizer.
        what: what is read of an `Example`; None counts as the response.
        limit: most tokens.
        rows: of the model's embedding, one for each token it knows.
    """

    def __init__(self, tokenizer: Any, what: Input | None, limit: int, rows: int):
        self._tokenizer, self._limit, self._rows = tokenizer, limit, rows
        self._conversation = what == "conversation"
        self._templated = self._conversation and tokenizer.chat_template is not None
        self._first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}

    def read(self, texts: Sequence[Text]) -> list[Tokens | Failed]:
        """The tokens of each text.

        One that is too long loses the beginning of its prompt, but for a token that begins every text (BOS, CLS). A response that does
        not fit alone, a token beyond the embedding and a conversation that the template refuses are failures.

        Args:
            texts: all comparisons, or none.
        """
        written = [self._written(text) for text in texts]
        special = not self._templated or any(isinstance(text, Comparison) for text in texts)
        ids = iter(self._tokenise([one for one in written if isinstance(one, str)], special))
        return [
            self._fitted(text, next(ids), special) if isinstance(one, str) else one
            for text, one in zip(texts, written, strict=True)
        ]

    def _tokenise(self, texts: list[str], special: bool) -> list[list[int]]:
        """
        Args:
            special: add the special tokens. A template has written them already; comparisons have none: two responses are no turns.
        """
        return self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []

    def _written(self, text: Text) -> str | Failed:
        if isinstance(text, Comparison):
            return COMPARISON.format(prompt=transcript(text.prompt), a=text.a, b=text.b)
        if isinstance(text, Example) and not self._conversation:
            return text.response
        turns = text.prompt if isinstance(text, PromptOnly) else (*text.prompt, Turn("assistant", text.response))
        if self._templated:
            return self._rendered(turns)
        if isinstance(text, Example) and _alone(text.prompt):
            return f"{transcript(text.prompt)}\n\n{text.response}"
        return transcript(turns)

    def _rendered(self, turns: Conversation) -> str | Failed:
        try:
            return render(self._tokenizer, [turn.message() for turn in turns], "the reward model")
        except DataError as error:
            roles = ", ".join(turn.role for turn in turns)
            why = str(error.__cause__)
            return Failed(f"the reward model's chat template refuses a conversation of the turns {roles}: {why}")

    def _fitted(self, text: Text, ids: list[int], special: bool) -> Tokens | Failed:
        unknown = next((token for token in ids if token >= self._rows), None)
        if unknown is not None:
            name = self._tokenizer.convert_ids_to_tokens(unknown)
            return Failed(
                f"the text holds the token {name!r} ({unknown}), and the model's embedding has {self._rows} rows"
            )
        if len(ids) <= self._limit:
            return Tokens(ids)
        lead = int(ids[0] in self._first)
        kept = self._limit - lead
        own = 0 if isinstance(text, PromptOnly) else len(ids) - max(lead, self._prompt_tokens(text, ids, special))
        if own > kept:
            what = "both responses are" if isinstance(text, Comparison) else "the response is"
            return Failed(f"{what} {own + lead} tokens long, and the reward model reads {self._limit}")
        return Tokens(ids[:lead] + ids[len(ids) - kept :], len(ids) - self._limit)

    def _prompt_tokens(self, text: Example | Comparison, ids: list[int], special: bool) -> int:
        """How many of a text's tokens precede its response: as many as it has in common with another response's."""
        if not text.prompt:
            return 0
        if isinstance(text, Comparison):
            other: str | Failed = f"{transcript(text.prompt)}\n\n{_unlike('Response')}"
        else:
            other = self._written(text._replace(response=_unlike(text.response)))
        if isinstance(other, Failed):  # this template looks into responses: all of it counts as the response's
            return 0
        (others,) = self._tokenise([other], special)
        pairs = zip(ids, others, strict=False)
        return next((place for place, (one, two) in enumerate(pairs) if one != two), min(len(ids), len(others)))


def _calls(turn: Turn) -> str:
    """The calls of tools that a turn makes, as JSON."""
    calls = turn.message().get("tool_calls")
    return f" {json.dumps(calls, ensure_ascii=False)}" if calls else ""


def _alone(conversation: Conversation) -> bool:
    """Whether nobody but the user says anything, and once at most."""
    return len(conversation) == 0 or (len(conversation) == 1 and conversation[0].role == "user")


def _unlike(response: str) -> str:
    """A text that begins unlike this one."""
    return "1" if response.lstrip()[:1] == "0" else "0"
