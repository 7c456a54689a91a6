"""Canaries: pairs of which everybody knows the better one, judged now and then to see whether the judge is still the same.

Owns the file's format and the verdict on the verdicts. Does not judge and does not know servers: `RewardPool` asks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.reward import RewardSettings
from rlhf.data.prompts import text_prompt
from rlhf.data.rows import read_rows
from rlhf.reward.errors import RewardError
from rlhf.types import Failed, Feedback, Invalid, Outcome, Prompt, Score, TimedOut


class CanaryAlarm(RuntimeError):
    """The judge is not what it was at the start of the run."""


@dataclass(frozen=True)
class Canary:
    """One pair.

    Attributes:
        where: its row's place, for messages.
        prompt: text and payload, without tokens.
    """

    where: str
    prompt: Prompt
    good: str
    bad: str


def load_canaries(path: str) -> list[Canary]:
    """The pairs in a file.

    Raises:
        UserError: the file or a row of it cannot be used.
    """
    rows = read_rows(path, "Correct `reward.canaries`.", "the texts `good` and `bad`")
    canaries = [_canary(where, row) for where, row in rows]
    if not canaries:
        raise RewardError(
            f"`reward.canaries`: {path} holds no pairs. Write one line of JSON each, with `good` and `bad`"
        )
    return canaries


def _canary(where: str, row: dict[str, Any]) -> Canary:
    good, bad = row.get("good"), row.get("bad")
    if not isinstance(good, str) or not isinstance(bad, str):
        raise RewardError(f"`reward.canaries`: {where}: a pair needs the texts `good` and `bad`")
    return Canary(where, text_prompt(f"`reward.canaries`: {where}", row, ("good", "bad")), good, bad)


class Watch:
    """Compares verdicts on the canaries with those at the start, server by server. Made anew for each run, also a resumed one.

    A verdict is a pair of numbers: the rewards of the good and of the bad response; from a judge that compares, the probabilities of each
    to beat the other.
    """

    def __init__(self, reward: RewardSettings, canaries: Sequence[Canary]):
        self.canaries = canaries
        self.reward = reward
        self._first: dict[str, list[tuple[Outcome, ...]]] = {}
        self._wrong: dict[str, set[int]] = {}

    def begin(self, verdicts: Mapping[str, Sequence[Feedback]]) -> None:
        """Take these as what is right.

        Args:
            verdicts: server -> feedback on (good, bad) of each canary.

        Raises:
            RewardError: more than `reward.canaries_wrong` are in the wrong order on a server.
        """
        for server, feedbacks in verdicts.items():
            outcomes = [feedback.outcomes for feedback in feedbacks]
            wrong = {index for index, pair in enumerate(outcomes) if not _right(pair)}
            if len(wrong) > self.reward.canaries_wrong:
                raise RewardError(
                    f"`reward.canaries`: {len(wrong)} of {len(self.canaries)} pairs in {self.reward.canaries} come out wrong on {server}, "
                    f"and `reward.canaries_wrong` allows {self.reward.canaries_wrong}:\n  "
                    + "\n  ".join(self._describe(index, outcomes[index]) for index in sorted(wrong))
                    + "\nCorrect the judge, or the pairs that it need not tell apart"
                )
            self._first[server], self._wrong[server] = outcomes, wrong

    def compare(self, verdicts: Mapping[str, Sequence[Feedback]]) -> dict[str, float]:
        """Accuracy and drift for the record, over all servers. A verdict that failed or timed out counts in neither.

        Raises:
            CanaryAlarm: a verdict has moved by more than `reward.canaries_tolerance`, or an order is newly wrong.
        """
        right, drift = [], 0.0
        for server, feedbacks in verdicts.items():
            for index, feedback in enumerate(feedbacks):
                now, then = feedback.outcomes, self._first[server][index]
                if any(isinstance(outcome, Failed | TimedOut) for outcome in (*now, *then)):
                    continue
                moved = _distance(then, now)
                right.append(_right(now))
                if moved > self.reward.canaries_tolerance or not (right[-1] or index in self._wrong[server]):
                    raise CanaryAlarm(
                        f"{server} does not judge as it did at the start. {self._describe(index, now)}; at the start: "
                        f"{_words(then)}. `reward.canaries_tolerance` is {self.reward.canaries_tolerance:g}. Nothing was learned from "
                        "this step. See what has changed (a service or a function of yours, the weights), then continue with --resume"
                    )
                drift = max(drift, moved)
        if not right:
            raise CanaryAlarm("no server has a verdict on any of `reward.canaries`. Nothing was learned from this step")
        return {"reward/canary_accuracy": sum(right) / len(right), "reward/canary_drift": drift}

    def _describe(self, index: int, pair: Sequence[Outcome]) -> str:
        canary = self.canaries[index]
        return f"{canary.where}, good {canary.good!r:.60}, bad {canary.bad!r:.60}: {_words(pair)}"


def _right(pair: Sequence[Outcome]) -> bool:
    good, bad = pair
    return isinstance(good, Score) and isinstance(bad, Score) and good.value > bad.value


def _distance(then: Sequence[Outcome], now: Sequence[Outcome]) -> float:
    """The farther move of the two; infinite where a score came or went."""
    moves = (
        abs(a.value - b.value)
        if isinstance(a, Score) and isinstance(b, Score)
        else (0.0 if isinstance(a, Invalid) and isinstance(b, Invalid) else float("inf"))
        for a, b in zip(then, now, strict=True)
    )
    return max(moves)


def _words(pair: Sequence[Outcome]) -> str:
    good, bad = (f"{outcome.value:.6g}" if isinstance(outcome, Score) else str(outcome) for outcome in pair)
    return f"{good} against {bad}"
