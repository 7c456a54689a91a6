"""`rlhf generate`: a finished model answers prompts with the same engines that wrote the training responses."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.cluster import LocalRuntime
from rlhf.cluster.precision import settle
from rlhf.commands.export import as_model
from rlhf.config import Settings
from rlhf.config.data import of_the_template
from rlhf.config.loader import UserError
from rlhf.data.loading_time import with_startup_deadline
from rlhf.data.model_folder import find_model, read_config
from rlhf.data.prompts import load_prompts, load_tokenizer, make_prompt
from rlhf.data.rendering import renderer
from rlhf.engines.sampling import Sampling
from rlhf.rollout.pool import RolloutPool
from rlhf.types import Completion, Prompt

SILENT = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
"""How the names of architectures end that give no next token."""
ANNOUNCEMENTS = 10
"""How often `rlhf generate --out` says how far it is."""


def generate(
    model: str,
    prompts_file: str | None,
    prompts: Sequence[str] | None,
    max_tokens: int,
    temperature: float,
    n: int,
    out: str | None,
    template_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Print, or write to `out` as JSON lines, `n` responses to each prompt. One engine, in this process.

    Args:
        model: or a checkpoint of a run (`commands.export`).

    Raises:
        UserError: a model or prompt that cannot be used, or `n` > 1 at temperature 0.
    """
    if n > 1 and temperature == 0:
        raise UserError("--n: at temperature 0 all responses are the same. Use --n 1, or a temperature above 0.")
    with as_model(model, "MODEL") as folder:
        question = ask(folder, prompts_file, prompts, max_tokens, template_arguments)
        asyncio.run(_answer(question, Sampling(n=n, max_tokens=max_tokens, temperature=temperature), out))


@dataclass(frozen=True)
class Question:
    """What a model is asked outside a run.

    Attributes:
        settings: for an engine that answers; they name no judge.
    """

    settings: Settings
    prompts: Sequence[Prompt]
    tokenizer: Any


def ask(
    model: str,
    prompts_file: str | None,
    prompts: Sequence[str] | None,
    max_tokens: int,
    template_arguments: Mapping[str, Any] | None = None,
) -> Question:
    """The prompts of a file, or these texts, for a model to answer in at most `max_tokens` tokens each.

    Args:
        template_arguments: see `data.template_arguments`.

    Raises:
        UserError: a model or prompt that cannot be used.
    """
    config, tokenizer = open_language_model(model, "MODEL")
    chat = tokenizer.chat_template is not None
    data = {"prompts": prompts_file or "--prompt", "chat_template": chat, "max_prompt_tokens": 2**20}
    data["template_arguments"] = _checked(template_arguments or {})
    settings = Settings.model_validate(
        {"data": data, "policy": {"model": model}, "rollout": {"max_tokens": max_tokens}}
    )
    asked: Sequence[Prompt]
    if prompts_file is not None:
        asked = load_prompts(settings.data.prompts, tokenizer, settings.data)
    else:
        conversations = renderer(tokenizer, settings.data)
        conversations.check()
        asked = [make_prompt("--prompt", {"prompt": text}, conversations) for text in prompts or ()]
    longest = max(len(prompt.token_ids) for prompt in asked)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + max_tokens > context:
        raise UserError(
            f"--max-tokens {max_tokens}: with a prompt of {longest} tokens that is more than the model's context holds, {context}. Lower "
            "it, or shorten the prompt (--prompt, --prompts)"
        )
    data_settings = settings.data.model_copy(update={"max_prompt_tokens": longest})
    return Question(settings.model_copy(update={"data": data_settings}), asked, tokenizer)


def open_language_model(name: str, where: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a model that is to write.

    Args:
        where: what names it, for messages.

    Raises:
        UserError: there is none, or it writes no text.
    """
    folder = find_model(name, where, weights=False)
    config = read_config(folder, where)
    for architecture in config.architectures or ():
        if architecture.endswith(SILENT):
            raise UserError(
                f"{where}: `{name}` is a {architecture}, which writes no text. Give a causal language model"
            )
    return config, load_tokenizer(folder, where)


def _checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return of_the_template(dict(arguments))
    except ValueError as error:
        raise UserError(f"--template-arguments: {error}. Leave it out") from None


async def write_rows(answers: Sequence[Coroutine[Any, Any, list[dict[str, Any]]]], out: str | None) -> int:
    """Write responses with their prompts: as JSON lines into the file `out`, or for a person onto standard output.

    The rows of a prompt are written as soon as those of all prompts before it are, so what is done outlives a failure. Now and then
    standard error says how far it is.

    Args:
        answers: the work on each prompt, which ends in its rows; all of it is begun at once.

    Returns:
        How many rows there are.
    """
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    announced = max(1, len(tasks) // ANNOUNCEMENTS)
    written = 0
    try:
        with ExitStack() as stack:
            file = sys.stdout if out is None else stack.enter_context(Path(out).open("w", encoding="utf-8"))
            for number, task in enumerate(tasks, start=1):
                rows = await task
                file.writelines(
                    _for_a_person(row) if out is None else json.dumps(row, ensure_ascii=False) + "\n" for row in rows
                )
                file.flush()
                written += len(rows)
                if out is not None and number % announced == 0:
                    sys.stderr.write(f"{number:,} of {len(tasks):,} prompts\n")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # before what they talk to is closed
    return written


def _for_a_person(row: dict[str, Any]) -> str:
    reward = f" [reward {row['reward']:.4g}]" if "reward" in row else ""
    return f"> {row['prompt']}\n{row['response']}{reward}\n\n"


def response_row(prompt: Prompt, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """One response as a row of the output."""
    return {
        "prompt": prompt.text,
        "response": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        "length": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


async def _answer(question: Question, sampling: Sampling, out: str | None) -> None:
    runtime = LocalRuntime()
    try:
        settings, _ = settle(with_startup_deadline(question.settings), runtime)
        pool = await RolloutPool.start(runtime, settings)

        async def answer(prompt: Prompt) -> list[dict[str, Any]]:
            rollout = await pool.sample(prompt, [sampling])
            return [response_row(prompt, completion, question.tokenizer) for completion in rollout.completions.value]

        await write_rows([answer(prompt) for prompt in question.prompts], out)
    finally:
        runtime.stop()
