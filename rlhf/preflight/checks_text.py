"""What the engine reads and where it stops: the chat template and the end-of-sequence token, shown as decoded tokens."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, GenerationConfig

from rlhf.config.data import DataSettings
from rlhf.preflight.finding import Finding

QUESTION, ANSWER = "What is two plus two?", "It is four."
SHOWN = 24
"""Pieces of a conversation that are shown."""


def stop_tokens(path: str, tokenizer: Any) -> frozenset[int]:
    """Where vLLM ends a response: the tokenizer's end-of-sequence token, and those of the generation configuration.

    Args:
        path: folder or hub name of the model.
    """
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # vLLM then takes the model's own configuration, and so do we
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))
    named = generation.eos_token_id
    ids = [named] if isinstance(named, int) else list(named or ())
    return frozenset(token for token in [tokenizer.eos_token_id, *ids] if token is not None)


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
    if not data.chat_template:
        ids = tokenizer(QUESTION).input_ids
        return Finding("chat template", "ok", f"off; a prompt: {pieces(tokenizer, ids)}; the engine stops at {names}")
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    asked = [*system, {"role": "user", "content": QUESTION}]
    try:
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": ANSWER}], return_dict=False)
    except (TemplateError, ValueError) as error:
        return Finding(
            "chat template",
            "failed",
            f"the template cannot render a conversation: {error}",
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
