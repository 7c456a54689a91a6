"""`rlhf generate --best-of`: of N responses to each prompt, keep the one that the reward likes best, or those it likes enough.

Best-of-N and rejection sampling with the judge of a configuration: one engine and one reward server, in this process. The reward is the
judged one, before `reward.transforms`; from a judge that compares it is the mean probability of beating the other responses.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.algorithms.labels import scored
from rlhf.cluster import LocalRuntime
from rlhf.cluster.precision import settle
from rlhf.commands.export import as_model
from rlhf.commands.generate import Question, ask, response_row, write_rows
from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.config.settings import single_process
from rlhf.data.loading_time import with_startup_deadline
from rlhf.engines.sampling import Sampling
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.pool import RolloutPool
from rlhf.types import Feedback, Prompt


@dataclass(frozen=True)
class Selection:
    """Which of a prompt's responses are kept.

    Attributes:
        all: every one that has a reward; the best is marked.
        at_least: only those with this reward or more.
    """

    all: bool = False
    at_least: float | None = None

    def kept(self, feedback: Feedback) -> list[tuple[int, float, bool]]:
        """(index, reward, whether it is the best) of the kept responses; the first of equals is the best."""
        rewards = scored(feedback)
        if not rewards:
            return []
        best = max(rewards, key=lambda one: one[1])[0]
        return [
            (index, reward, index == best)
            for index, reward in rewards
            if (self.all or index == best) and (self.at_least is None or reward >= self.at_least)
        ]


def best_of(
    model: str,
    judge: Settings,
    sampling: Sampling,
    selection: Selection,
    *,
    prompts_file: str | None,
    prompts: Sequence[str] | None,
    out: str | None,
    template_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Let a model answer the prompts of a file, or these texts, and keep what `selection` says; see `generate_best`.

    Args:
        model: or a checkpoint of a run (`commands.export`).

    Raises:
        UserError: a model or prompt that cannot be used, or what `generate_best` says.
    """
    with as_model(model, "MODEL") as folder:
        question = ask(folder, prompts_file, prompts, sampling.max_tokens, template_arguments)
        generate_best(question, judge, sampling, selection, out)


def generate_best(
    question: Question, judge: Settings, sampling: Sampling, selection: Selection, out: str | None
) -> None:
    """Print, or write to `out` as JSON lines, the kept ones of `sampling.n` responses to each prompt, with their rewards.

    Args:
        judge: the configuration whose `reward` judges; of the rest only `cluster` is used.

    Raises:
        UserError: there is nothing to choose from, or no response got a reward.
    """
    if sampling.n < 2 or sampling.temperature == 0:
        raise UserError(
            "--best-of chooses among different responses: ask for 2 or more, at a --temperature above 0 (it is "
            f"{sampling.temperature:g})"
        )
    settings = single_process(question.settings.model_copy(update={"reward": judge.reward, "cluster": judge.cluster}))
    n_rows, unjudged = asyncio.run(_choose(settings, question, sampling, selection, out))
    if unjudged == len(question.prompts):
        raise UserError(
            f"none of the {unjudged} prompts has a response with a reward. Correct the `reward` of --reward-config"
        )
    sys.stderr.write(f"{n_rows} responses kept to {len(question.prompts)} prompts")
    sys.stderr.write(f"; {unjudged} prompts without any reward were left out\n" if unjudged else "\n")


async def _choose(
    settings: Settings, question: Question, sampling: Sampling, selection: Selection, out: str | None
) -> tuple[int, int]:
    """Write the rows to keep. Returns how many, and the number of prompts without any reward."""
    runtime, unjudged = LocalRuntime(), 0
    try:
        settings, _ = settle(with_startup_deadline(settings), runtime)
        pool = await RolloutPool.start(runtime, settings)
        rewards = await RewardPool.start(runtime, settings)

        async def choose(prompt: Prompt) -> list[dict[str, Any]]:
            nonlocal unjudged
            rollout = await pool.sample(prompt, [sampling])
            feedback = await rewards.judge(rollout)
            unjudged += not scored(feedback)
            rows = []
            for index, reward, best in selection.kept(feedback):
                row = response_row(prompt, rollout.completions.value[index], question.tokenizer) | {"reward": reward}
                rows.append(row | {"best": best} if selection.all else row)
            return rows

        n_rows = await write_rows([choose(prompt) for prompt in question.prompts], out)
        await rewards.close()
        return n_rows, unjudged
    finally:
        runtime.stop()
