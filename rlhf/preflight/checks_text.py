"""What the engine reads and where it stops: the chat template and the end-of-sequence token, shown as decoded tokens."""

from __future__ import annotations

from typing import Any

from rlhf.config.data import DataSettings
from rlhf.data.errors import DataError
from rlhf.data.rendering import ANSWER, QUESTION, encode, renderer
from rlhf.preflight.finding import Finding

SHOWN = 24
"""Pieces of a conversation that are shown."""


def pieces(tokenizer: Any, token_ids: list[int]) -> str:
    """Tokens decoded one by one, with a bar between them."""
    return "|".join(tokenizer.decode([token]).replace("\n", "\\n") for token in token_ids)


def check_template(tokenizer: Any, stops: frozenset[int], data: DataSettings) -> Finding:
    """A conversation through the chat template and back: the assistant's turn must end with a token that the engine stops at."""
    if not stops:
        return Finding(
            "chat template",
            "failed",
            "neither the tokenizer nor generation_config.json names an end-of-sequence token, so every response runs to its limit",
            "set `eos_token` in tokenizer_config.json and `eos_token_id` in generation_config.json",
        )
    names = ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in sorted(stops))
    conversations = renderer(tokenizer, data)
    asked = [{"role": "user", "content": QUESTION}]
    if not data.chat_template:
        ids = conversations.prompt("a prompt", asked)
        return Finding("chat template", "ok", f"off; a prompt: {pieces(tokenizer, ids)}; the engine stops at {names}")
    try:
        asked = conversations.conversation("a prompt", asked)
        prompt = conversations.prompt("a prompt", asked)
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        whole = encode(tokenizer, conversations.text("a conversation", answered, prompt=False), rendered=True)
    except DataError as error:
        return Finding(
            "chat template",
            "failed",
            f"the template cannot render a conversation: {error.__cause__}",
            "use a model that was tuned for chat, correct the template, set `data.chat_template: false`, or remove `data.system_prompt` if "
            "the template knows no system message",
        )
    shown = f"{pieces(tokenizer, whole[-SHOWN:])}; the engine stops at {names}"
    if whole[: len(prompt)] != prompt:
        return Finding(
            "chat template",
            "warning",
            f"a prompt ends as {pieces(tokenizer, prompt[-8:])}, but with an answer the conversation reads {shown}",
            "the prompt is not how the conversation goes on: chosen and rejected responses of a data set are then not what the engine "
            "would write. Correct the template, so that the generation prompt is what precedes an answer",
        )
    return _check_answer(tokenizer, stops, whole[len(prompt) :], shown)


def _check_answer(tokenizer: Any, stops: frozenset[int], answer: list[int], shown: str) -> Finding:
    if not stops & set(answer):
        return Finding(
            "chat template",
            "failed",
            f"the assistant's turn ends without any token that the engine stops at: {shown}",
            "put the token that ends a turn into `eos_token_id` of generation_config.json; else every response runs to its limit",
        )
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    if text != ANSWER:
        return Finding(
            "chat template",
            "warning",
            f"{ANSWER!r} comes back as {text!r}: {shown}",
            "see that tokenizer and template belong to this model; reward functions read the decoded text",
        )
    return Finding("chat template", "ok", shown)
