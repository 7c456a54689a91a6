"""From what a reward source returned to a typed outcome. Pure functions."""

from __future__ import annotations

import math
from typing import Any

from rlhf.types import Failed, FinishReason, Invalid, Outcome, Score


def outcome_of(value: Any, finish_reason: FinishReason, missing_eos_penalty: float) -> Outcome:
    """The outcome for a returned value.

    A finite number is a `Score`, less the penalty if the response was cut at the token limit. NaN, an infinity and None
    (how a function says that there is no reward) are `Invalid`. Anything else is a mistake in the function: `Failed`.
    """
    if value is None:
        return Invalid("the reward function returned None")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return Failed(f"the reward function returned {value!r:.80}, which is not a number")
    if not math.isfinite(number):
        return Invalid(f"the reward is {number}")
    return Score(number - (missing_eos_penalty if finish_reason == "length" else 0.0))


def failure(error: BaseException) -> Failed:
    """The outcome for an exception, with its type and message."""
    return Failed(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
