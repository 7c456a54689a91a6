"""`rlhf eval`: two models answer the held-out prompts with the engines and the judge of a run, and are compared in pairs."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.cluster import RayRuntime, resource_request
from rlhf.cluster.precision import settle
from rlhf.cluster.tasks import task_group
from rlhf.commands.export import as_model
from rlhf.commands.generate import open_language_model
from rlhf.commands.progress import Progress
from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings
from rlhf.data.loading_time import with_startup_deadline
from rlhf.data.prompts import load_prompts
from rlhf.loop.evaluation import evaluation_sampling, held_out
from rlhf.loop.judged import JudgedRollout
from rlhf.loop.progress import require_some_reward
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.pool import RolloutPool
from rlhf.tracking.catalogue import signed
from rlhf.tracking.report import HeldOut, win_rate
from rlhf.types import Prompt


def evaluate(settings: Settings, policy: str, baseline: str | None, json_path: str | None) -> None:
    """Answer the held-out prompts with `policy` and with `baseline`, judge both, print means and the win rate.

    Each model reads the prompts through its own tokenizer and chat template. Prompts that one of them has no room for
    (`data.too_long: drop`) are asked of neither.

    Args:
        policy: a model, or a checkpoint of a run (`commands.export`).
        baseline: the model or checkpoint to win against; None: `policy.model` of the settings.
        json_path: file for the figures.

    Raises:
        UserError: no held-out prompts, a model that cannot be used, or no answer with a reward.
    """
    if settings.data.eval_prompts is None:
        raise UserError("data.eval_prompts: not set, so there are no held-out prompts to evaluate on")
    if settings.reward.compares:
        raise UserError("reward.kind: a pairwise judge scores no lone answer. Name one that scores: model or function")
    baseline = baseline or settings.policy.model
    progress = Progress()
    with as_model(policy, "--policy") as first, as_model(baseline, "--baseline") as second:
        asked = held_out_prompts(settings, {"--policy": first, "--baseline": second})
        prompts = asked[0].prompts
        progress.say(f"{len(prompts)} held-out prompts are asked of two models, one after the other")
        ours, theirs = (
            asyncio.run(_judged_answers(settings, *one, progress.of(role)))
            for one, role in zip(asked, ("policy", "baseline"), strict=True)
        )
    both = sum(math.isfinite(a) and math.isfinite(b) for a, b in zip(ours.rewards, theirs.rewards, strict=True))
    if not both:
        raise UserError(
            f"data.eval_prompts: none of {len(prompts)} held-out prompts has a reward for both answers ({policy}, {baseline}): there is "
            "no win rate. Give more prompts, or a reward that has a value for more answers"
        )
    rate, (low, high) = win_rate(theirs.rewards, ours.rewards)
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "policy": _means(policy, ours),
        "baseline": _means(baseline, theirs),
        "win_rate": rate,
        "win_rate_interval": [low, high],
    }
    for role in ("policy", "baseline"):
        means = figures[role]
        sys.stdout.write(
            f"{role:9} reward {signed(means['reward'])}  length {means['length']:.1f}  ({means['model']})\n"
        )
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
    read = {}
    for name, model in models.items():
        _, tokenizer = open_language_model(model, name)
        read[name] = Asked(model, load_prompts(settings.data.eval_prompts or (), tokenizer, settings.data), tokenizer)
    common = set.intersection(*({prompt.id for prompt in one.prompts} for one in read.values()))
    if not common:
        raise UserError(
            f"data.eval_prompts: no prompt fits into data.max_prompt_tokens={settings.data.max_prompt_tokens} of both models. Raise it"
        )
    return [
        one._replace(prompts=[prompt for prompt in one.prompts if prompt.id in common][: settings.loop.eval_limit])
        for one in read.values()
    ]


async def _judged_answers(
    settings: Settings, model: str, prompts: Sequence[Prompt], tokenizer: Any, progress: Progress
) -> HeldOut:
    """The judged answers of one model, from engines and servers of its own. It is whole, whatever was trained in it."""
    policy = settings.policy.model_copy(update={"model": model, "lora": LoraSettings()})
    settings = settings.model_copy(update={"policy": policy})
    progress.say("starting engines and judges")
    async with engines_and_judges(settings) as (pool, rewards):
        counted = progress.counted(len(prompts), "answered and judged")

        async def answer(prompt: Prompt) -> JudgedRollout:
            rollout = await pool.sample(prompt, [evaluation_sampling(settings)])
            judged = JudgedRollout(rollout, await rewards.judge(rollout))
            counted()
            return judged

        progress.say("asking")
        async with task_group() as tasks:
            answering = [tasks.create_task(answer(prompt)) for prompt in prompts]
        judged = [task.result() for task in answering]
        require_some_reward(f"the held-out answers of {model}", judged, settings.reward)
        return held_out(judged, tokenizer)


@asynccontextmanager
async def engines_and_judges(settings: Settings) -> AsyncIterator[tuple[RolloutPool, RewardPool]]:
    """The rollout engines and the reward servers of these settings without a policy to train, as Ray actors; taken down after."""
    settings = with_startup_deadline(settings)
    runtime = RayRuntime(settings.cluster, settings.rollout.engines + settings.reward.servers)
    try:
        runtime.reserve(resource_request(settings, policy=False))
        settings, _ = settle(settings, runtime)
        async with task_group() as tasks:
            pool = tasks.create_task(RolloutPool.start(runtime, settings))
            rewards = tasks.create_task(RewardPool.start(runtime, settings))
        yield pool.result(), rewards.result()
        async with task_group() as tasks:
            tasks.create_task(pool.result().close())
            tasks.create_task(rewards.result().close())
    finally:
        runtime.stop()


def _means(model: str, answers: HeldOut) -> dict[str, Any]:
    return {
        "model": model,
        "reward": float(np.nanmean(answers.rewards)),
        "length": float(np.mean(answers.lengths)),
        "unjudged": int(np.isnan(answers.rewards).sum()),
    }
