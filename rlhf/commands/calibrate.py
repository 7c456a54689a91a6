"""`rlhf reward calibrate`: let the starting policy answer every prompt K times, judge, and keep the scores.

The transforms that compare a score with the reference's (`log_sigmoid`, `calibrate`) read the file. Engines, sampling and reward servers
are those of the run; the format is `rlhf/reward/reference_scores.py`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.commands.evaluate import engines_and_judges
from rlhf.config import Settings
from rlhf.config.arguments import unwritable
from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings
from rlhf.data.model_folder import find_model
from rlhf.data.prompts import load_prompts, load_tokenizer
from rlhf.engines.sampling import Sampling
from rlhf.reward.reference_scores import (
    REWARD,
    Origin,
    Reference,
    header,
    judge_of,
    members_need_references,
    sampling_of,
    unreferenced,
)
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.pool import RolloutPool
from rlhf.types import Feedback, Prompt, Rollout, Score

CALIBRATION_SEED = 314_159
AT_ONCE = 256  # prompts in flight; what is done is on disk


def calibrate(settings: Settings, samples: int, output: str | None) -> None:
    """Write the scores of `samples` responses to each training prompt.

    With transforms of an ensemble's members that read them, held-out prompts are answered too: they are judged by the same members.

    Args:
        output: the file; None: `reward.reference_scores`.

    Raises:
        UserError: no file to write, a judge that gives no scores, or a prompt of which no response got one.
    """
    output = output or settings.reward.reference_scores
    if output is None:
        raise UserError("`rlhf reward calibrate`: name the file with --output, or in `reward.reference_scores`")
    if (problem := unwritable(output, make_folder=True)) is not None:
        raise UserError(f"reward.reference_scores: {problem}")
    if settings.reward.compares:
        raise UserError(
            f"`reward.kind: {settings.reward.kind}` compares responses, and there are no scores to calibrate. Choose a kind that scores"
        )
    tokenizer = load_tokenizer(find_model(settings.policy.model, "`policy.model`", weights=False))
    prompts: Sequence[Prompt] = load_prompts(settings.data.prompts, tokenizer, settings.data)
    if members_need_references(settings.reward) and settings.data.eval_prompts is not None:
        held_out = load_prompts(settings.data.eval_prompts, tokenizer, settings.data)
        asked = [*prompts, *held_out[: settings.loop.eval_limit]]
        prompts = list({prompt.id: prompt for prompt in asked}.values())
    policy = settings.policy.model_copy(update={"lora": LoraSettings()})
    settings = settings.model_copy(update={"policy": policy, "reward": unreferenced(settings.reward)})
    asyncio.run(_write(settings, prompts, samples, Path(output)))


async def _write(settings: Settings, prompts: Sequence[Prompt], samples: int, output: Path) -> None:
    rollout = settings.rollout
    sampling = Sampling(
        n=samples,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=CALIBRATION_SEED + settings.run.seed,
    )
    members = [member.name for member in settings.reward.members if member.weight != 0]
    unfinished = output.with_name(output.name + ".unfinished")
    output.parent.mkdir(parents=True, exist_ok=True)
    async with engines_and_judges(settings) as (pool, rewards):
        judge = judge_of(settings.reward, rewards.infos[0].fingerprint)
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(header(Origin(settings.policy.model, sampling_of(settings), judge)))
            for begin in range(0, len(prompts), AT_ONCE):
                some = prompts[begin : begin + AT_ONCE]
                answering = (_reference(pool, rewards, prompt, sampling, members) for prompt in some)
                file.writelines(reference.line() for reference in await asyncio.gather(*answering))
                sys.stdout.write(f"{begin + len(some)} of {len(prompts)} prompts\n")
    unfinished.replace(output)
    sys.stdout.write(f"{output}: {samples} responses to each of {len(prompts)} prompts\n")


async def _reference(
    pool: RolloutPool, rewards: RewardPool, prompt: Prompt, sampling: Sampling, members: Sequence[str]
) -> Reference:
    rollout = await pool.sample(prompt, [sampling])
    return reference_of(rollout, await rewards.judge(rollout), members)


def reference_of(rollout: Rollout, feedback: Feedback, members: Sequence[str]) -> Reference:
    """The scored ones of a prompt's responses.

    Args:
        members: names of an ensemble's members, whose own scores are kept as well.

    Raises:
        UserError: none has a score.
    """
    scored = list(_scored(rollout, feedback))
    if not scored:
        raise UserError(
            f"the prompt {rollout.prompt.id} ({rollout.prompt.text!r:.60}) has no response with a score; the first: "
            f"{feedback.outcomes[0]}. Correct the reward, or take the prompt out of `data.prompts`"
        )
    values, n_tokens, cut = zip(*scored, strict=True)
    scores = {REWARD: list(values)} | {name: list(feedback.measures[name]) for name in members}
    return Reference(rollout.prompt.id, scores, list(n_tokens), list(cut))


def _scored(rollout: Rollout, feedback: Feedback) -> Iterator[tuple[float, int, bool]]:
    for info, outcome in zip(rollout.infos, feedback.outcomes, strict=True):
        if isinstance(outcome, Score):
            yield outcome.value, info.n_tokens, info.finish_reason == "length"
