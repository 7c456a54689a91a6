"""Evaluation on held-out prompts: one response each, the same seeds every time, so that two policies can be compared in pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.cluster import fetch
from rlhf.config import Settings
from rlhf.engines.sampling import Sampling
from rlhf.loop.judged import JudgedRollout
from rlhf.tracking.report import HeldOut
from rlhf.types import Assignment, Score, TrainingItem

EVALUATION_SEED = 271_828


def evaluation_sampling(settings: Settings) -> Sampling:
    """One response per prompt, drawn as in training; the seed is the same at each evaluation of any run with this `run.seed`."""
    rollout = settings.rollout
    return Sampling(
        n=1,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=EVALUATION_SEED + settings.run.seed,
        urgent=True,
    )


def measurable(judged: Sequence[JudgedRollout]) -> list[Assignment]:
    """Assignments that make `PolicyGroup.measure` forward every response."""
    return [
        Assignment(one.rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(len(one.rollout.infos))))
        for one in judged
    ]


def held_out(judged: Sequence[JudgedRollout], tokenizer: Any) -> HeldOut:
    """The answers as text, with their rewards (NaN where there was no score)."""
    rows = [row for one in judged for row in response_rows(one, tokenizer)]
    return HeldOut(
        prompts=[row["prompt"] for row in rows],
        responses=[row["response"] for row in rows],
        rewards=[math.nan if row["reward"] is None else row["reward"] for row in rows],
        lengths=[row["length"] for row in rows],
    )


def response_rows(judged: JudgedRollout, tokenizer: Any) -> list[dict[str, Any]]:
    """One row per response for the record: prompt, response, reward or outcome, length, finish reason, and the version of the weights
    that wrote it (of several, the oldest)."""
    (completions,) = fetch([judged.rollout.completions])
    return [
        {
            "prompt": judged.rollout.prompt.text,
            "response": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            "reward": outcome.value if isinstance(outcome, Score) else None,
            "outcome": type(outcome).__name__,
            "reason": getattr(outcome, "reason", None),
            "length": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "weight_version": info.weight_version,
        }
        for info, completion, outcome in zip(judged.rollout.infos, completions, judged.feedback.outcomes, strict=True)
    ]


def held_out_metrics(answers: HeldOut) -> dict[str, float]:
    """Means over held-out responses. Pairwise judges have nothing to compare a lone answer with: then there is no reward."""
    length = {"rollout/length": float(np.mean(answers.lengths))}
    return length if np.isnan(answers.rewards).all() else {"reward/mean": float(np.nanmean(answers.rewards))} | length


def write_held_out(path: Path, answers: HeldOut) -> None:
    """One JSON row per prompt: prompt, response, reward, length."""
    with path.open("w", encoding="utf-8") as file:
        for prompt, response, reward, length in zip(
            answers.prompts, answers.responses, answers.rewards, answers.lengths, strict=True
        ):
            row = {
                "prompt": prompt,
                "response": response,
                "reward": None if math.isnan(reward) else reward,
                "length": length,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
