"""Prompt files: rows to `Prompt`s, with or without a pair of responses; every mistake is reported by file, line and field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

from rlhf.config.data import DataSettings, DataSource, listed
from rlhf.data.assets import resolve
from rlhf.data.errors import DataError
from rlhf.data.layouts import prompt_turns, read_prompt
from rlhf.data.model_folder import read_tokenizer
from rlhf.data.order import Share, interleaved
from rlhf.data.pairs import read_pair, tokenise_pair
from rlhf.data.rendering import Renderer, renderer
from rlhf.data.rows import identity, read_rows
from rlhf.data.turns import read_turns
from rlhf.types import Prompt, Turn

MISSING = "Set data.prompts (or data.eval_prompts) to a file of prompts."


class PromptSet(list[Prompt]):
    """Prompts, and for a mixture how its sources share the draws (see `Order`); then the prompts stand source by source."""

    def __init__(self, prompts: Iterable[Prompt], shares: Sequence[Share] = ()):
        super().__init__(prompts)
        self.shares = tuple(shares)


def load_prompts(
    sources: str | Sequence[DataSource], tokenizer: Any, settings: DataSettings, pair_tokens: int | None = None
) -> PromptSet:
    """Read, check, render and tokenise the prompts of one source, or of several, in file order.

    See `layouts` for what a row may be. It may have `chosen` and `rejected`: a response each, as text or as a chat that ends with it. All
    other fields become the payload. Equal rows count once; the same prompt with another pair or payload is another prompt. Several
    sources without weights are mixed by size.

    Args:
        sources: paths as `data.prompts` has them.
        tokenizer: a transformers tokenizer.
        pair_tokens: for a method that learns from the pairs: the longest response it takes, in tokens. Every row then needs a
            pair. None: pairs are checked, but not tokenised.

    Raises:
        DataError: a template that cannot be used, unreadable file, bad row, empty set, a prompt over `data.max_prompt_tokens` or a
            response over `pair_tokens`.
    """
    conversations = renderer(tokenizer, settings)
    conversations.check()
    every = listed(sources, settings.columns)
    seen: set[str] = set()
    parts = [_read(source, conversations, settings, pair_tokens, seen) for source in every]
    weights = [source.weight for source in every if source.weight is not None]
    if not weights:
        return PromptSet(interleaved(parts))
    return PromptSet(chain.from_iterable(parts), [Share(len(part), w) for part, w in zip(parts, weights, strict=True)])


def _read(
    source: DataSource, conversations: Renderer, settings: DataSettings, pair_tokens: int | None, seen: set[str]
) -> list[Prompt]:
    """
    Args:
        seen: ids of the prompts that were read so far, also of other sources; those of this one are added.
    """
    path, prompts, counts = resolve(source.path), [], Counter[str]()
    for where, row in read_rows(path, MISSING, "a `prompt` or `messages` field", source.columns):
        prompt = make_prompt(where, row, conversations, pairs=pair_tokens is not None)
        excess = _excess(prompt, settings.max_prompt_tokens, pair_tokens)
        if prompt.id in seen:
            counts["duplicate"] += 1
        elif excess is None:
            seen.add(prompt.id)
            prompts.append(prompt)
        elif settings.too_long == "drop":
            counts["too_long"] += 1
        else:
            raise DataError(f"{where}: {excess}. Raise it, shorten the text, or set data.too_long=drop.")
    if not prompts:
        raise DataError(f"{path}: no prompt is left to use ({dict(counts) or 'the file is empty'})")
    return prompts


def make_prompt(where: str, row: dict[str, Any], conversations: Renderer, pairs: bool = False) -> Prompt:
    """One row as a prompt, of any length.

    Args:
        where: the row's place, for messages.
        conversations: how they become tokens.
        pairs: the row's pair is needed.

    Raises:
        DataError: the row cannot be used.
    """
    messages, payload = read_prompt(where, row)
    whole = conversations.conversation(where, messages)
    pair = read_pair(where, payload, whole)
    content: dict[str, Any] = {"messages": messages, "payload": payload, "system": conversations.system_prompt}
    if conversations.arguments:
        content["arguments"] = dict(conversations.arguments)
    if pair is not None:
        content["pair"] = pair
    token_ids = conversations.prompt(where, whole)
    if not token_ids:
        raise DataError(f"{where}: the prompt has no tokens")
    return Prompt(
        id=identity(where, content),
        token_ids=tuple(token_ids),
        text=messages[-1]["content"],
        payload=payload,
        pair=tokenise_pair(where, pair, whole, conversations) if pairs else None,
        conversation=tuple(Turn.of(turn) for turn in whole),
    )


def text_prompt(where: str, row: dict[str, Any], others: Collection[str]) -> Prompt:
    """What a row of texts to judge says of their prompt, without tokens: its `prompt`, its `messages`, or nothing.

    Args:
        others: fields of the row that are no payload.

    Raises:
        DataError: it has both, or one that cannot be used.
    """
    payload = {name: value for name, value in row.items() if name not in ("prompt", "messages", *others)}
    if "messages" in row:
        if "prompt" in row:
            raise DataError(f"{where}: has `prompt` and `messages`. Remove one.")
        turns = tuple(map(Turn.of, read_turns(where, "messages", row["messages"], "a list of {role, content}")))
        return Prompt(identity(where, row), (), turns[-1].content, payload, conversation=turns)
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str):
        turns = tuple(map(Turn.of, prompt_turns(where, prompt)))
        return Prompt(identity(where, row), (), turns[-1].content, payload, conversation=turns)
    return Prompt(identity(where, row), (), prompt, payload)


def _excess(prompt: Prompt, max_prompt_tokens: int, pair_tokens: int | None) -> str | None:
    """What is longer than it may be, in words."""
    if len(prompt.token_ids) > max_prompt_tokens:
        return f"the prompt has {len(prompt.token_ids)} tokens, more than data.max_prompt_tokens={max_prompt_tokens}"
    for name, response in zip(("chosen", "rejected"), prompt.pair or (), strict=False):
        if pair_tokens is not None and len(response) > pair_tokens:
            return f"the {name} response has {len(response)} tokens, more than rollout.max_tokens={pair_tokens}"
    return None


def load_tokenizer(path: str, field: str = "policy.model") -> Any:
    """The tokenizer in a model folder.

    Args:
        field: who names the folder, for messages.

    Raises:
        DataError: there is none.
    """
    return read_tokenizer(path, field)
