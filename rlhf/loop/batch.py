"""What a step learns from, and how many prompts it asks for to get there. Pure: owns no task and no ledger.

With `loop.refill`, prompts that teach nothing are replaced by further ones until the step has as many as it wants to learn from
(dynamic sampling; Yu et al. 2025, DAPO), or has asked for all that it may.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf.algorithms.builders import Dropped, Items
from rlhf.loop.judged import JudgedRollout
from rlhf.types import Assignment, Rollout


@dataclass
class Refill:
    """How many further prompts a step takes, round by round. Where a round has to be waited for, it lasts as long as its longest response,
    so it asks for as many as should fill the batch, going by the share of prompts that taught something so far, and never for more than
    the batch has places.

    Attributes:
        size: prompts that the step wants to learn from, and has leased at first.
        extra: further ones that it may ask for in place of those that teach nothing.
        exact: ask for exactly those that are missing: others are under way already, and none in surplus is dropped.
        asked: how many it has asked for, in `rounds` rounds.
    """

    size: int
    extra: int
    exact: bool = False
    asked: int = 0
    rounds: int = 0

    def next(self, taught: int, available: int) -> int:
        """How many prompts to ask for now; 0: the step has what it can get.

        Args:
            taught: prompts so far that teach something, and those that may yet.
            available: prompts that this step could have besides.
        """
        missing = self.size - taught
        likely = missing if self.exact else math.ceil(missing * (self.size + self.asked) / max(taught, 1))
        wanted = max(0, min(likely, self.size, self.extra - self.asked, available))
        if wanted:
            self.asked, self.rounds = self.asked + wanted, self.rounds + 1
        return wanted

    def metrics(self) -> dict[str, float]:
        """What was asked for; empty if nothing could be."""
        return {"refill/prompts": float(self.asked), "refill/rounds": float(self.rounds)} if self.extra else {}


@dataclass
class Batch:
    """The prompts of a step so far, in the order in which they were leased.

    Attributes:
        refill: how many prompts the step wants to learn from, and how many it may ask for to get there.
        judged: all that was sampled, with what the judges said.
        shaped: the same with the rewards to learn from.
        assignments: what is learned from.
        dropped: prompt id -> why it teaches nothing; each prompt is here or in `assignments`.
        idle: how many of the assignments have no gradient (a group of equal rewards).
    """

    refill: Refill
    judged: list[JudgedRollout] = field(default_factory=list)
    shaped: list[JudgedRollout] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    idle: int = 0

    def add(self, rollout: Rollout, built: Items | Dropped, *, teaches: bool) -> None:
        """Put a prompt among those to learn from, or among those that are dropped. Groups without a gradient are learned from all the
        same, for a loss is a mean over them too, unless others can take their places; and these may be more than there are places.

        Args:
            built: what the algorithm's builder made of the rollout.
            teaches: whether that has a gradient.
        """
        if not isinstance(built, Dropped) and not teaches and self.refill.extra:
            built = Dropped("equal_rewards")
        elif not isinstance(built, Dropped) and self.taught == self.refill.size:
            built = Dropped("surplus")
        if isinstance(built, Dropped):
            self.dropped[rollout.prompt.id] = built
        else:
            self.assignments.append(Assignment(rollout, built))
            self.idle += not teaches

    @property
    def taught(self) -> int:
        """Prompts that teach something."""
        return len(self.assignments) - self.idle

    @property
    def missing(self) -> bool:
        """Whether fewer prompts teach something than the step wanted, though others could replace those that teach nothing."""
        return bool(self.refill.extra) and self.taught < self.refill.size

    def outcomes(self) -> Iterator[tuple[str, str]]:
        """How each prompt ends in the ledger: its id, and `trained` or why it was dropped."""
        for assignment in self.assignments:
            yield assignment.rollout.prompt.id, "trained"
        for prompt_id, dropped in self.dropped.items():
            yield prompt_id, dropped.reason

    def reasons(self) -> Counter[str]:
        """Why prompts teach nothing -> how many."""
        idle = Counter({"equal_rewards": self.idle} if self.idle else {})
        return Counter(one.reason for one in self.dropped.values()) + idle

    def metrics(self) -> dict[str, float]:
        """How many prompts were learned from, how many were not, by reason, and how many were asked for in their place."""
        dropped = Counter(one.reason for one in self.dropped.values())
        trained = {"loop/prompts_trained": float(len(self.assignments))}
        return (
            trained | {f"dropped/{reason}": float(count) for reason, count in dropped.items()} | self.refill.metrics()
        )
