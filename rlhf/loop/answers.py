"""`rlhf generate` and `rlhf eval`: a finished model answers prompts with the same engines that wrote the training responses."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.cluster import LocalRuntime, RayRuntime, wishes
from rlhf.cluster.precision import settle
from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings
from rlhf.data.assets import resolve
from rlhf.data.loading_time import with_startup_deadline
from rlhf.data.prompts import load_prompts, load_tokenizer, make_prompt
from rlhf.data.rendering import renderer
from rlhf.loop.evaluation import evaluation_sampling, held_out
from rlhf.loop.judged import Judged
from rlhf.loop.progress import require_some_reward
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.pool import RolloutPool
from rlhf.rollout.sampling import Sampling
from rlhf.tracking.report import HeldOut, win_rate
from rlhf.types import Completion, Prompt

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

    Raises:
        UserError: a model or prompt that cannot be used, or `n` > 1 at temperature 0.
    """
    if n > 1 and temperature == 0:
        raise UserError("--n: at temperature 0 all responses are the same. Use --n 1, or a temperature above 0.")
    question = ask(model, prompts_file, prompts, max_tokens, template_arguments)
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
    tokenizer = load_tokenizer(resolve(model))
    chat = tokenizer.chat_template is not None
    data = {"prompts": prompts_file or "", "chat_template": chat, "max_prompt_tokens": 2**20}
    data["template_arguments"] = dict(template_arguments or {})
    settings = Settings.model_validate(
        {"data": data, "policy": {"model": model}, "rollout": {"max_tokens": max_tokens}}
    )
    if prompts_file is not None:
        asked = load_prompts(resolve(prompts_file), tokenizer, settings.data)
    else:
        conversations = renderer(tokenizer, settings.data)
        conversations.check()
        asked = [make_prompt("--prompt", {"prompt": text}, conversations) for text in prompts or ()]
    longest = max(len(prompt.token_ids) for prompt in asked)
    data_settings = settings.data.model_copy(update={"max_prompt_tokens": longest})
    return Question(settings.model_copy(update={"data": data_settings}), asked, tokenizer)


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


def evaluate(settings: Settings, policy: str, baseline: str | None, json_path: str | None) -> None:
    """Answer the held-out prompts with `policy` and with `baseline`, judge both, print means and the win rate.

    Each model reads the prompts through its own tokenizer and chat template. Prompts that one of them has no room for
    (`data.too_long: drop`) are asked of neither.

    Args:
        baseline: the model to win against; None: `policy.model` of the settings.
        json_path: file for the figures.

    Raises:
        UserError: no held-out prompts, a model that cannot be used, or no answer with a reward.
    """
    if settings.data.eval_prompts is None:
        raise UserError("data.eval_prompts: not set, so there are no held-out prompts to evaluate on")
    if settings.reward.compares:
        raise UserError("reward.kind: a pairwise judge scores no lone answer. Name one that scores: model or function")
    baseline = baseline or settings.policy.model
    asked = held_out_prompts(settings, {"--policy": policy, "--baseline": baseline})
    ours, theirs = (asyncio.run(_judged_answers(settings, *one)) for one in asked)
    prompts = asked[0].prompts
    both = sum(math.isfinite(a) and math.isfinite(b) for a, b in zip(ours.rewards, theirs.rewards, strict=True))
    if not both:
        raise UserError(
            f"data.eval_prompts: none of {len(prompts)} held-out prompts has a reward for both answers ({policy}, {baseline}): there is "
            "no win rate. Give more prompts, or a reward that has a value for more answers"
        )
    rate, (low, high) = win_rate(theirs.rewards, ours.rewards)
    figures = {
        "prompts": len(prompts),
        "policy": _means(policy, ours),
        "baseline": _means(baseline, theirs),
        "win_rate": rate,
        "win_rate_interval": [low, high],
    }
    for role in ("policy", "baseline"):
        means = figures[role]
        sys.stdout.write(f"{role:9} reward {means['reward']:+.3f}  length {means['length']:.1f}  ({means['model']})\n")
    sys.stdout.write(f"win rate  {rate:.3f}  95% interval [{low:.3f}, {high:.3f}] over {both} prompts\n")
    if json_path is not None:
        Path(json_path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


class Asked(NamedTuple):
    """Held-out prompts as one model reads them."""

    model: str
    prompts: list[Prompt]
    tokenizer: Any


def held_out_prompts(settings: Settings, models: Mapping[str, str]) -> list[Asked]:
    """The held-out prompts in the tokens of each model; the same prompts, in the same order, for all.

    Args:
        models: the option that names it -> the model.

    Raises:
        UserError: a model whose tokenizer or template does not serve, or no prompt that all have room for.
    """
    path, read = resolve(settings.data.eval_prompts or ""), {}
    for name, model in models.items():
        tokenizer = load_tokenizer(resolve(model), name)
        read[name] = Asked(model, load_prompts(path, tokenizer, settings.data), tokenizer)
    common = set.intersection(*({prompt.id for prompt in one.prompts} for one in read.values()))
    if not common:
        raise UserError(
            f"data.eval_prompts: no prompt fits into data.max_prompt_tokens={settings.data.max_prompt_tokens} of both models. Raise it"
        )
    return [
        one._replace(prompts=[prompt for prompt in one.prompts if prompt.id in common][: settings.loop.eval_limit])
        for one in read.values()
    ]


async def _judged_answers(settings: Settings, model: str, prompts: Sequence[Prompt], tokenizer: Any) -> HeldOut:
    """The judged answers of one model, from engines and servers of its own. It is whole, whatever was trained in it."""
    policy = settings.policy.model_copy(update={"model": model, "lora": LoraSettings()})
    settings = settings.model_copy(update={"policy": policy})
    async with engines_and_judges(settings) as (pool, rewards):
        rollouts = await asyncio.gather(*(pool.sample(prompt, [evaluation_sampling(settings)]) for prompt in prompts))
        feedbacks = await asyncio.gather(*(rewards.judge(rollout) for rollout in rollouts))
        judged = [Judged(r, f) for r, f in zip(rollouts, feedbacks, strict=True)]
        require_some_reward(f"the held-out answers of {model}", judged, settings.reward)
        return held_out(judged, tokenizer)


@asynccontextmanager
async def engines_and_judges(settings: Settings) -> AsyncIterator[tuple[RolloutPool, RewardPool]]:
    """The rollout engines and the reward servers of these settings without a policy to train, as Ray actors; taken down after."""
    settings = with_startup_deadline(settings)
    runtime = RayRuntime(settings.cluster, settings.rollout.engines + settings.reward.servers)
    try:
        runtime.reserve(wishes(settings, policy=False))
        settings, _ = settle(settings, runtime)
        pool, rewards = await asyncio.gather(RolloutPool.start(runtime, settings), RewardPool.start(runtime, settings))
        yield pool, rewards
        await asyncio.gather(pool.close(), rewards.close())
    finally:
        runtime.stop()


def _means(model: str, answers: HeldOut) -> dict[str, Any]:
    return {
        "model": model,
        "reward": float(np.nanmean(answers.rewards)),
        "length": float(np.mean(answers.lengths)),
        "unjudged": int(np.isnan(answers.rewards).sum()),
    }
