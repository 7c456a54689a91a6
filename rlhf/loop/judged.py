"""One prompt's judged responses, and what a step's sampling and judging came to in numbers, for the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.algorithms.labels import scored
from rlhf.rollout import StaleWeights
from rlhf.types import Failed, Feedback, Invalid, Rollout, Score, TimedOut


@dataclass(frozen=True)
class JudgedRollout:
    """One prompt's responses and what the reward side says of them.

    Attributes:
        place: of the prompt in the order of start (`loop.admission`); None for one that no step takes.
    """

    rollout: Rollout
    feedback: Feedback
    place: int | None = None


def require_fresh(rollouts: Sequence[Rollout], version: int, bound: int) -> None:
    """Make sure that no response is too old to be learned from. Admission keeps it so (`loop.admission`); this is the check of it.

    Args:
        version: of the weights that learn.
        bound: `loop.staleness`.

    Raises:
        StaleWeights: weights of before version - bound wrote some of a response, or some that do not exist yet.
    """
    for rollout in rollouts:
        for info in rollout.infos:
            if info.versions and not version - bound <= info.versions[0] <= info.versions[-1] <= version:
                raise StaleWeights(
                    f"the weights of version {list(info.versions)} wrote a response to prompt {rollout.prompt.id}, and those of version "
                    f"{version} were to learn from it: loop.staleness allows {bound}"
                )


def staleness_metrics(judged: Sequence[JudgedRollout], version: int) -> dict[str, float]:
    """How old the sampled responses are that the weights of this version learn from, in weight versions."""
    infos = [info for one in judged for info in one.rollout.infos if info.versions]
    if not infos:
        return {}
    ages = [version - info.weight_version for info in infos]
    return {
        "staleness/mean": float(np.mean(ages)),
        "staleness/max": float(max(ages)),
        "staleness/mixed": float(np.mean([len(info.versions) > 1 for info in infos])),
    }


def rollout_metrics(judged: Sequence[JudgedRollout]) -> dict[str, float]:
    """What was sampled and how it was judged: means over all sampled responses (with a score), counts of the other outcomes.

    Responses of the data set do not count. With several sources, each one's mean reward follows as reward/SOURCE.
    """
    drawn = [
        (info, outcome)
        for one in judged
        for info, outcome in zip(one.rollout.infos, one.feedback.outcomes, strict=True)
        if info.versions
    ]
    infos, outcomes = [info for info, _ in drawn], [outcome for _, outcome in drawn]
    by_source: dict[str, list[float]] = {}
    for one in judged:
        for index, value in scored(one.feedback):
            by_source.setdefault(one.rollout.infos[index].source, []).append(value)
    rewards = np.array([outcome.value for outcome in outcomes if isinstance(outcome, Score)])
    metrics = {
        "rollout/responses": float(len(infos)),
        "rollout/tokens": float(sum(info.n_tokens for info in infos)),
        "reward/invalid": float(sum(isinstance(outcome, Invalid) for outcome in outcomes)),
        "reward/failed": float(sum(isinstance(outcome, Failed) for outcome in outcomes)),
        "reward/timed_out": float(sum(isinstance(outcome, TimedOut) for outcome in outcomes)),
    }
    if infos:
        metrics |= {
            "rollout/length": float(np.mean([info.n_tokens for info in infos])),
            "rollout/truncated": float(np.mean([info.finish_reason == "length" for info in infos])),
        }
    logprobs = [info.mean_logprob for info in infos if info.n_learned]
    if logprobs:
        metrics["rollout/logprob"] = float(np.mean(logprobs))
    if len(rewards):
        metrics |= {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
    values = [{value for _, value in scored(one.feedback)} for one in judged if len(scored(one.feedback)) > 1]
    if values:
        metrics["reward/tied"] = float(np.mean([len(some) == 1 for some in values]))
    metrics |= measured(judged)
    if len(by_source) > 1:
        metrics |= {f"reward/{source}": float(np.mean(values)) for source, values in by_source.items()}
    return metrics


def measured(judged: Sequence[JudgedRollout]) -> dict[str, float]:
    """The mean of each of the judges' own measures."""
    gathered: dict[str, list[float]] = {}
    for one in judged:
        for name, values in one.feedback.measures.items():
            gathered.setdefault(name, []).extend(value for value in values if not np.isnan(value))
    return {f"reward/{name}": float(np.mean(values)) for name, values in gathered.items() if values}
