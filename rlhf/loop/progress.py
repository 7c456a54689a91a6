"""Whether a run learns anything: watches its steps, says what is wrong with them, and ends a run that goes nowhere. Pure.

Three kinds of trouble: no response of a step has a reward; no prompt teaches anything, step after step; the rewards are all equal. The
first two end the run, since every further step would cost the same and change nothing; the third is a warning, for a policy
may still be pulled to its reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.config import UserError
from rlhf.config.reward import RewardSettings
from rlhf.loop.batch import Batch
from rlhf.loop.judged import JudgedRollout
from rlhf.types import Failed, Invalid, Outcome, Score, TimedOut

SAME_REWARDS_STEPS = 3
"""From so many steps in a row on, equal rewards are warned of."""

REMEDIES = {
    "too_few_scores": "too few responses to a prompt got a reward: see reward/invalid, reward/failed and reward/timed_out in "
    "metrics.jsonl, and correct the reward",
    "identical": "the responses to a prompt were the same tokens: raise rollout.temperature, or look in samples.jsonl whether the "
    "policy ends at once (its chat template, or its end-of-sequence token, is another than the one it was trained with)",
    "tie": "the responses to a prompt got equal rewards: let the reward tell them apart (finer than right and wrong), take prompts "
    "that the policy gets right at times, raise algorithm.samples_per_prompt, or let loop.refill replace such prompts",
    "truncated": "too few responses to a prompt ended before rollout.max_tokens, and algorithm.mask_truncated leaves out the others: raise "
    "rollout.max_tokens, or set algorithm.mask_truncated=false",
    "build_failed": "correct the builder of algorithm.name",
}
REMEDIES["equal_rewards"] = REMEDIES["tie"]


class RewardsFailing(UserError):
    """Too many responses of a step got no verdict, or none has a reward."""


class BuilderFailing(UserError):
    """The algorithm's builder failed for too many prompts of a step."""


class NothingLearned(UserError):
    """No prompt taught anything, for too many steps or in the whole run."""


def require_rewards(step: int, judged: Sequence[JudgedRollout], reward: RewardSettings) -> None:
    """Make sure that there is something to learn from.

    Raises:
        RewardsFailing: more than `reward.max_failed_fraction` of the responses got no verdict, or none has a reward.
    """
    outcomes = [outcome for one in judged for outcome in one.feedback.outcomes]
    broken = [outcome for outcome in outcomes if isinstance(outcome, Failed | TimedOut)]
    if len(broken) > reward.max_failed_fraction * len(outcomes):
        raise RewardsFailing(
            f"step {step}: {len(broken)} of {len(outcomes)} responses got no verdict; the first: {_words(broken[0])}. Nothing was "
            "learned from this step. Correct the reward (reward.path), or allow more failures with reward.max_failed_fraction."
        )
    require_some_reward(f"step {step}", judged, reward)


def require_some_reward(whose: str, judged: Sequence[JudgedRollout], reward: RewardSettings) -> None:
    """Make sure that not all was judged in vain.

    Args:
        whose: the responses', for the message.

    Raises:
        RewardsFailing: none of the responses has a reward.
    """
    outcomes = [outcome for one in judged for outcome in one.feedback.outcomes]
    if not outcomes or any(isinstance(outcome, Score) for outcome in outcomes):
        return
    reasons = Counter(_words(outcome) for outcome in outcomes)
    shown = "; ".join(f"{count} x {words}" for words, count in reasons.most_common(3))
    raise RewardsFailing(
        f"{whose}: none of the {len(outcomes)} responses has a reward: {shown}. {_remedy(outcomes, judged, reward)}"
    )


def require_builder(step: int, batch: Batch, name: str, most: float) -> None:
    """Make sure that the algorithm's builder works.

    Args:
        most: the part of the prompts for which it may fail.

    Raises:
        BuilderFailing: it failed for more.
    """
    failed = _build_failures(batch)
    if len(failed) > most * len(batch.judged):
        raise BuilderFailing(
            f"step {step}: the builder of algorithm.name={name} failed for {len(failed)} of {len(batch.judged)} prompts; the first: "
            f"{failed[0]}. Nothing was learned from this step. Correct the builder, or allow more failures with "
            "reward.max_failed_fraction."
        )


@dataclass(frozen=True)
class EmptyStep:
    """A step that taught nothing.

    Attributes:
        reasons: why prompts taught nothing -> how many.
        alike, several: prompts whose responses were all the same tokens, of those with several responses.
        length: mean of the responses, in tokens.
        failure: the builder's first, if it failed.
    """

    reasons: Counter[str]
    alike: int
    several: int
    length: float
    failure: str | None

    @classmethod
    def of(cls, batch: Batch) -> EmptyStep:
        """What is kept of a step: no rollout, whose tokens would then stay in memory."""
        lengths = [info.n_tokens for one in batch.judged for info in one.rollout.infos]
        digests = [{info.digest for info in one.rollout.infos} for one in batch.judged if len(one.rollout.infos) > 1]
        alike = sum(len(some) == 1 for some in digests)
        length = float(np.mean(lengths)) if lengths else 0.0
        return cls(batch.reasons(), alike, len(digests), length, next(iter(_build_failures(batch)), None))


class Progress:
    """Counts the steps that went nowhere. Not part of a checkpoint: a resumed run counts anew."""

    def __init__(self, most_empty: int):
        """
        Args:
            most_empty: steps in a row that may teach nothing (`loop.max_empty_steps`).
        """
        self._most_empty = most_empty
        self._empty: list[EmptyStep] = []
        self._same = 0
        self._taught = 0

    def after(self, batch: Batch) -> list[str]:
        """Take note of a step; what a person should be told of it."""
        self._taught += batch.taught
        self._empty = [] if batch.taught else [*self._empty, EmptyStep.of(batch)]
        found = []
        if not batch.taught:
            found.append(f"no prompt taught anything ({_counts(batch.reasons())})")
        elif batch.missing:
            found.append(
                f"{batch.taught} prompts instead of {batch.refill.size} taught something, though {len(batch.judged)} were tried "
                f"({_counts(batch.reasons())}); see loop.refill"
            )
        if failed := _build_failures(batch):
            found.append(f"the builder failed for {len(failed)} prompts; the first: {failed[0]}")
        return found + self._equal_rewards(batch)

    def require(self) -> None:
        """Raises NothingLearned if too many steps in a row taught nothing."""
        if len(self._empty) >= self._most_empty:
            raise NothingLearned(
                f"no prompt taught anything in {len(self._empty)} steps in a row (loop.max_empty_steps), so the run ends "
                f"here. {self._why()}"
            )

    def require_any(self) -> None:
        """Raises NothingLearned if no step so far taught anything."""
        if not self._taught:
            raise NothingLearned(
                f"no prompt taught anything in the whole run, so the policy is what it was and is not exported. {self._why()}"
            )

    def _why(self) -> str:
        """Of the empty steps: what happened, and what helps against it."""
        reasons: Counter[str] = sum((one.reasons for one in self._empty), Counter())
        last = self._empty[-1]
        causes = [reason for reason, _ in reasons.most_common()]
        if last.several and last.alike == last.several:  # equal rewards are no wonder then
            causes.insert(0, "identical")
        remedies = dict.fromkeys(
            REMEDIES.get(cause, f"see why the builder drops prompts as {cause}") for cause in causes
        )
        failure = f" The builder's first failure: {last.failure}." if last.failure else ""
        return (
            f"The prompts were dropped as: {_counts(reasons)}. In the last step the responses had {last.length:.1f} tokens on average, and "
            f"those to {last.alike} of {last.several} prompts were all the same. What helps: {'; '.join(remedies)}.{failure}"
        )

    def _equal_rewards(self, batch: Batch) -> list[str]:
        shaped, judged = _scores(batch.shaped), _scores(batch.judged)
        self._same = self._same + 1 if len(shaped) > 1 and len(set(shaped)) == 1 else 0
        if self._same < SAME_REWARDS_STEPS:
            return []
        after = " after reward.transforms" if len(set(judged)) > 1 else ""
        return [
            f"all rewards{after} have been equal for {self._same} steps (now {shaped[0]:g}): nothing tells good from bad"
        ]


def _words(outcome: Outcome) -> str:
    match outcome:
        case Invalid(reason):
            return f"invalid ({reason})"
        case Failed(reason):
            return f"failed ({reason})"
        case TimedOut(seconds):
            return f"timed out after {seconds:g} s"
    raise TypeError(f"{outcome} is a reward")


def _remedy(outcomes: Sequence[Outcome], judged: Sequence[JudgedRollout], reward: RewardSettings) -> str:
    """For the likeliest cause: a function that does not return, or reads a field that the prompts do not have."""
    functions = [source.path for _, source in reward.sources() if source.is_function]
    if not functions or not any(isinstance(outcome, Invalid) and "None" in outcome.reason for outcome in outcomes):
        return "Correct the reward (reward.path), or the fields of the prompts that it needs."
    fields = ", ".join(judged[0].rollout.prompt.payload) or "no fields"
    return (
        f"A function that returns None says that there is no reward: does `{functions[0]}` have a `return` in every branch, and does it "
        f"read fields that the prompts have? The first prompt's payload has: {fields}."
    )


def _build_failures(batch: Batch) -> list[str]:
    return [one.detail for one in batch.dropped.values() if one.reason == "build_failed"]


def _scores(judged: Sequence[JudgedRollout]) -> list[float]:
    return [one.value for each in judged for one in each.feedback.outcomes if isinstance(one, Score)]


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
