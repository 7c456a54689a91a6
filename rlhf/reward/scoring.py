"""From what a reward source returned to a typed outcome. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.user_code import message, shown
from rlhf.types import Failed, Invalid, Outcome, Score, TimedOut


@dataclass(frozen=True)
class Measured:
    """What a judge may return in place of a bare value: the value, and what it observed on the way.

    Attributes:
        value: as the judge would return it bare.
        measures: name -> number, for `Feedback.measures`.
    """

    value: Any
    measures: Mapping[str, float] = field(default_factory=dict)


def outcome_of(value: Any) -> Outcome:
    """The outcome for what a judge returned, taken out of `Measured`.

    A finite number is a `Score`. NaN, an infinity and None (how a function says that there is no reward) are `Invalid`. Such an
    outcome stays what it is, as a failure does. Anything else is a mistake in the function: `Failed`.
    """
    if isinstance(value, Invalid | Failed | TimedOut):
        return value
    if value is None:
        return Invalid("the judge returned None")
    try:
        number = float(value)
    except Exception:  # noqa: BLE001 - `__float__` of what the user's code returned is code as well
        return Failed(f"the judge returned {shown(value)}, which is not a number")
    if not math.isfinite(number):
        return Invalid(f"the verdict is {number}")
    return Score(number)


def probability_of(value: Any) -> float | Outcome:
    """The probability that a pairwise judge returned, or the outcome for a value that is none.

    NaN and None are `Invalid`; what is not a number in [0, 1], to rounding, is a mistake in the judge: `Failed`.
    """
    outcome = outcome_of(value)
    if not isinstance(outcome, Score):
        return outcome
    if not -1e-6 <= outcome.value <= 1 + 1e-6:
        return Failed(f"the pairwise judge returned {outcome.value:g}, which is not a probability")
    return min(max(outcome.value, 0.0), 1.0)


def failure(error: BaseException) -> Failed:
    """The outcome for an exception, with its type and message."""
    return Failed(message(error))
