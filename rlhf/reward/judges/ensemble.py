"""Several judges as one: each scores a response, and their scores become one (`kind: several`).

With r_i the score of member i, less its mean and over its standard deviation on the common set (`reward.common_set`), and after
its own transforms:

    mean          sum_i r_i / n
    sum           sum_i w_i r_i                          of log-sigmoids: a soft AND (Wang et al. 2024)
    worst         min_i r_i                              worst-case optimisation (Coste et al. 2024)
    uncertainty   mean_i r_i - lambda var_i r_i          the same paper; var is the unbiased one, divided by n - 1

What fails for one member fails for the response, for an ensemble that leaves out whoever is silent scores on another scale. A
member of weight 0 is an observer: its scores are measured, and neither they nor its failures count.
Does not know how a member judges.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.reward import MemberSettings, RewardSettings
from rlhf.config.transforms import REFERENCED
from rlhf.data.assets import resolve
from rlhf.data.prompts import text_prompt
from rlhf.data.rows import read_rows
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.judge import Judge, Texts
from rlhf.reward.reference_scores import ReferenceScores, members_need_references, read_reference_scores
from rlhf.reward.scoring import Measured, outcome_of
from rlhf.reward.transforms import Moments, Scored, before_reference, needs_references, stateless
from rlhf.types import Failed, Invalid, Prompt, Score, TimedOut, content_id


def combine(scores: Sequence[float], weights: Sequence[float], reward: RewardSettings) -> float:
    """The members' scores of one response as one, as `reward.combine` says."""
    values = np.asarray(scores, dtype=np.float64)
    if reward.combine == "sum":
        return float(values @ np.asarray(weights))
    if reward.combine == "worst":
        return float(values.min())
    penalty = reward.uncertainty_penalty * values.var(ddof=1) if reward.combine == "uncertainty" else 0.0
    return float(values.mean() - penalty)


@dataclass(frozen=True)
class Common:
    """A member's scores on the common set: mean and standard deviation."""

    mean: float = 0.0
    std: float = 1.0

    def normalised(self, score: float) -> float:
        return (score - self.mean) / self.std


@dataclass(frozen=True)
class Member:
    """One of the judges.

    Attributes:
        common: its scale.
        references: its scores of the reference's responses, if its transforms read them.
    """

    settings: MemberSettings
    judge: Judge
    common: Common = Common()
    references: ReferenceScores | None = None

    @property
    def counts(self) -> bool:
        """It is no observer."""
        return self.settings.weight != 0

    def scores_of_reference(self, prompt: Prompt) -> list[float]:
        """The reference's scores for a prompt as the member's transforms find them. Raises KeyError if there are none."""
        if self.references is None:
            return []
        raw = self.references.of(prompt.id, self.settings.name)
        scaled = [Scored(self.common.normalised(one.value)) for one in raw]
        return before_reference(self.settings.transforms, scaled)

    def transformed(self, raw: float, references: Sequence[float]) -> float:
        """A raw score, on the common scale and after the member's transforms."""
        score = self.common.normalised(raw)
        for transform in self.settings.transforms:
            score = stateless(transform, Scored(score), references)
        return score


class Ensemble:
    """A judge made of judges. Make it with `start`."""

    def __init__(self, reward: RewardSettings, members: Sequence[Member], common_set: str | None):
        """
        Args:
            common_set: content of the file, for the fingerprint.
        """
        self._reward, self._members, self._common_set = reward, members, common_set
        self._weights = [member.settings.weight for member in members if member.counts]

    @classmethod
    async def start(cls, reward: RewardSettings, judges: Sequence[Judge], timeout_s: float) -> Ensemble:
        """Let each member score the common set, if there is one.

        Args:
            judges: of `reward.members`, in order.
            timeout_s: how long a member may take for the common set.

        Raises:
            RewardError: the common set or the reference scores cannot be used, or a member fails on the common set or gives all of
                it the same score.
        """
        references = None
        if members_need_references(reward):
            assert reward.reference_scores is not None, "refused when the configuration is loaded"
            references = read_reference_scores(resolve(reward.reference_scores))
        members = [
            Member(settings, judge, references=references if needs_references(settings.transforms) else None)
            for settings, judge in zip(reward.members, judges, strict=True)
        ]
        if reward.common_set is None:
            return cls(reward, members, None)
        path = resolve(reward.common_set)
        texts = read_common_set(path)
        scaling = (_on_common_scale(member, texts, timeout_s) for member in members)
        members = await asyncio.gather(*scaling)
        return cls(reward, members, Path(path).read_text(encoding="utf-8"))

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        """The combined score of each item with what the members said, or how one of them failed."""
        try:
            references = [member.scores_of_reference(prompt) for member in self._members]
        except KeyError:
            return [Failed(f"`reward.reference_scores` holds nothing about the prompt {prompt.id}")] * len(items)
        answers = await asyncio.gather(*(member.judge.judge(prompt, items, deadline_s) for member in self._members))
        return [self._combined(said, references) for said in zip(*answers, strict=True)]

    def fingerprint(self) -> str:
        """Hash of what decides the scores: the members, how they are combined, the common set; not the reference scores."""
        reward = self._reward
        members = [
            {
                "judge": member.judge.fingerprint()
                or [member.settings.kind, member.settings.path, member.settings.url],
                "transforms": [
                    one.model_dump() for one in member.settings.transforms if not isinstance(one, REFERENCED)
                ],
                **member.settings.model_dump(include={"name", "weight", "input"}),
            }
            for member in self._members
        ]
        return content_id([members, reward.combine, reward.uncertainty_penalty, self._common_set])

    def close(self) -> None:
        """Close the members."""
        for member in self._members:
            member.judge.close()

    def _combined(self, said: Sequence[Any], references: Sequence[Sequence[float]]) -> Any:
        """The members' answers about one response as one."""
        measures: dict[str, float] = {}
        scores = []
        for member, answer, others in zip(self._members, said, references, strict=True):
            name = member.settings.name
            if isinstance(answer, Measured):
                measures |= {f"{name}/{measure}": value for measure, value in answer.measures.items()}
                answer = answer.value
            outcome = outcome_of(answer)
            if isinstance(outcome, Score):
                measures[name] = outcome.value
                if member.counts:
                    scores.append(member.transformed(outcome.value, others))
            elif member.counts:
                return _named(outcome, name)
            else:
                measures[name] = math.nan
        if len(scores) > 1:
            measures["disagreement"] = float(np.std(scores, ddof=1))
        return Measured(combine(scores, self._weights, self._reward), measures)


async def _on_common_scale(member: Member, texts: Sequence[tuple[Prompt, str]], timeout_s: float) -> Member:
    """The member with the mean and the standard deviation of its scores on the common set; an observer as it is."""
    if not member.counts:
        return member
    name = member.settings.name
    answers = await asyncio.gather(*(member.judge.judge(prompt, [(text,)], timeout_s) for prompt, text in texts))
    moments = Moments()
    for (answer,), (_, text) in zip(answers, texts, strict=True):
        outcome = outcome_of(answer.value if isinstance(answer, Measured) else answer)
        if not isinstance(outcome, Score):
            raise RewardError(
                f"`reward.common_set`: the member `{name}` gave {text!r:.60} no score: {outcome}. Correct it, or leave the "
                "response out of the set"
            )
        moments = moments.including([outcome.value])
    if moments.std <= 1e-9 * max(1.0, abs(moments.mean)):
        raise RewardError(
            f"`reward.common_set`: the member `{name}` gives all {moments.count} responses the score {moments.mean:g}, so it "
            "has no scale. Choose responses that it tells apart, or another member"
        )
    return replace(member, common=Common(moments.mean, moments.std))


def read_common_set(path: str) -> list[tuple[Prompt, str]]:
    """The common set: responses with their prompts.

    Raises:
        UserError: no file, a row that is not as `reward.common_set` says, or fewer than two responses.
    """
    rows = read_rows(path, "Correct `reward.common_set`.", "the text `response`")
    texts = [_response(where, row) for where, row in rows]
    if len(texts) < 2:
        raise RewardError(f"`reward.common_set`: {path} holds {len(texts)} responses; a scale needs two or more")
    return texts


def _response(where: str, row: dict[str, Any]) -> tuple[Prompt, str]:
    if not isinstance(row.get("response"), str):
        raise RewardError(f"`reward.common_set`: {where}: needs an object with the text `response`")
    return text_prompt(f"`reward.common_set`: {where}", row, ("response",)), row["response"]


def _named(outcome: Invalid | Failed | TimedOut, name: str) -> Invalid | Failed | TimedOut:
    """The failure, and whose it is."""
    if isinstance(outcome, TimedOut):
        return replace(outcome, who=name)
    return replace(outcome, reason=f"{name}: {outcome.reason}")
