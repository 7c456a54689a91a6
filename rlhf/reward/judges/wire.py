"""What crosses the network between a reward service (`http`) and those who ask it (`remote`), as JSON values. Pure functions.

A prompt is a text, or, if it is more than one turn of the user's, its messages.
An outcome is an object whose `outcome` names its kind: `score` (with `value`), `invalid` or `failed` (with `reason`), `timed_out`
(with `seconds`, and `who` of several judges). JSON has no NaN, so a number that is none is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf.reward.reading import as_text
from rlhf.types import Failed, Feedback, Invalid, Outcome, Prompt, Score, TimedOut

TOKEN = "RLHF_REWARD_TOKEN"
"""The environment variable that holds the token, on both sides."""


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """The fields of a question that say what the responses answer: `prompt` or `messages`."""
    if prompt.conversation == as_text(prompt.text):
        return {"prompt": prompt.text}
    return {"messages": [turn.message() for turn in prompt.conversation]}


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a JSON value."""
    match outcome:
        case Score(value):
            return {"outcome": "score", "value": value}
        case Invalid(reason):
            return {"outcome": "invalid", "reason": reason}
        case Failed(reason):
            return {"outcome": "failed", "reason": reason}
        case TimedOut(seconds, who):
            return {"outcome": "timed_out", "seconds": seconds, "who": who}


def outcome_from_json(given: Any) -> Outcome:
    """The outcome that a JSON value stands for.

    Raises:
        ValueError: it stands for none.
    """
    match given:
        case {"outcome": "score", "value": int() | float() as value} if math.isfinite(value):
            return Score(float(value))
        case {"outcome": "invalid", "reason": str(reason)}:
            return Invalid(reason)
        case {"outcome": "failed", "reason": str(reason)}:
            return Failed(reason)
        case {"outcome": "timed_out", "seconds": int() | float() as seconds, "who": str(who)}:
            return TimedOut(float(seconds), who)
    raise ValueError(f"{given!r:.80} is no outcome")


def feedback_to_json(feedback: Feedback) -> dict[str, Any]:
    """All of a feedback but the prompt's id, which the asker knows."""
    matrix = feedback.preferences
    return {
        "outcomes": [outcome_to_json(outcome) for outcome in feedback.outcomes],
        "preferences": None if matrix is None else [[_number(value) for value in row] for row in matrix.tolist()],
        "measures": {name: [_number(value) for value in values] for name, values in feedback.measures.items()},
    }


def feedback_from_json(prompt_id: str, given: Any, responses: int) -> Feedback:
    """The feedback on so many responses that a JSON value stands for.

    Raises:
        ValueError: it stands for none.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("outcomes"), list):
        raise ValueError("the answer has no list `outcomes`")
    outcomes = tuple(outcome_from_json(outcome) for outcome in given["outcomes"])
    if len(outcomes) != responses:
        raise ValueError(f"{len(outcomes)} outcomes for {responses} responses")
    matrix = given.get("preferences")
    if matrix is not None:
        matrix = np.array(matrix, dtype=np.float64)  # null becomes NaN
        if matrix.shape != (responses, responses):
            raise ValueError(f"preferences of shape {matrix.shape} for {responses} responses")
    measures = {
        str(name): tuple(math.nan if value is None else float(value) for value in values)
        for name, values in (given.get("measures") or {}).items()
    }
    return Feedback(prompt_id, outcomes, matrix, measures)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
