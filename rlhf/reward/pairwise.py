"""From comparisons of two responses to a preference matrix and to outcomes. Pure functions.

A judge is asked twice about each pair, once in either order, so that a liking for the first place cancels:

    P_ij = ( p(i, j) + 1 - p(j, i) ) / 2,    P_ij + P_ji = 1,    P_ii = 1/2

Responses with the same tokens are not asked about: 1/2. A response's score is its mean P over the other responses. How much the judge
likes the first place is measured on the way: p(i, j) + p(j, i) - 1 is 0 for one that does not care, and 1 for one that sees nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.reward.scoring import probability_of
from rlhf.types import Failed, Feedback, Invalid, Outcome, Score, TimedOut

Order = tuple[int, int]
"""Two responses of a prompt, in the order in which the judge reads them."""


def pair_probabilities(differences: np.ndarray, temperature: float) -> np.ndarray:
    """P(first beats second) = sigmoid((r_1 - r_2) / T), elementwise on reward differences [n_pairs]."""
    return 0.5 * (1.0 + np.tanh(np.asarray(differences, dtype=np.float64) / (2.0 * temperature)))


def orders(digests: Sequence[str]) -> list[Order]:
    """What a judge must be asked: every two responses that differ, in both orders."""
    n = len(digests)
    return [(i, j) for i in range(n) for j in range(n) if digests[i] != digests[j]]


def feedback(prompt_id: str, digests: Sequence[str], answers: Mapping[Order, Any]) -> Feedback:
    """The verdict on one prompt's responses.

    Args:
        digests: of the responses' tokens, [K].
        answers: what the judge returned, or how it failed, for each of `orders(digests)`.

    Returns:
        Feedback with a matrix in which a pair is NaN if either order failed. A response without any verdict has the outcome of
        its first failed comparison; the mean of the others is over the comparisons that succeeded. Measures, of each pair with a
        verdict: `position_bias`, and `undecided`, 1 where the two orders do not name the same winner.
    """
    verdicts = {order: _verdict(answer) for order, answer in answers.items()}
    matrix = np.full((len(digests), len(digests)), 0.5)
    for (i, j), there in verdicts.items():
        back = verdicts[j, i]
        if i < j:
            matrix[i, j], matrix[j, i] = _both_ways(there, back)
    outcomes = tuple(_outcome(i, matrix, verdicts) for i in range(len(digests)))
    return Feedback(prompt_id, outcomes, matrix, _measures(verdicts))


def _verdict(answer: Any) -> float | Outcome:
    return answer if isinstance(answer, Failed | TimedOut) else probability_of(answer)


def _both_ways(there: float | Outcome, back: float | Outcome) -> tuple[float, float]:
    """P_ij and P_ji."""
    if not (isinstance(there, float) and isinstance(back, float)):
        return np.nan, np.nan
    forward, backward = (there + 1 - back) / 2, (back + 1 - there) / 2
    # 1 - x is exact in floating point for x in [1/2, 1], so the two add up to 1 exactly.
    return (forward, 1 - forward) if forward >= backward else (1 - backward, backward)


def _measures(verdicts: Mapping[Order, float | Outcome]) -> dict[str, tuple[float, ...]]:
    both = [(there, verdicts[j, i]) for (i, j), there in verdicts.items() if i < j]
    known = [(there, back) for there, back in both if isinstance(there, float) and isinstance(back, float)]
    return {
        "position_bias": tuple(there + back - 1 for there, back in known),
        "undecided": tuple(float((there - 0.5) * (back - 0.5) >= 0) for there, back in known),
    }


def _outcome(i: int, matrix: np.ndarray, verdicts: Mapping[Order, float | Outcome]) -> Outcome:
    others = np.delete(matrix[i], i)
    if not len(others):
        return Invalid("a pairwise judge compares responses, and this one is alone")
    if np.isnan(others).all():
        return next(v for order, v in verdicts.items() if i in order and not isinstance(v, float))
    return Score(float(np.nanmean(others)))
