"""Transforms of scores: pure functions, and one that remembers. Which ones a run uses is `rlhf/config/transforms.py`.

A score r of a response to the prompt x becomes

    clip            min(max(r, low), high)
    length_penalty  r - per_token n                          n: tokens of the response
    missing_eos     r - penalty                              if the response was cut at the token limit
    overlong        r - penalty max(0, n - (limit - buffer)) / buffer                     limit: the most tokens a response can have
    normalise       (r - mean) / std                         over all scores of the run so far (`Moments`)
    log_sigmoid     log s(r - r_ref(x))                      Wang et al. 2024; r_ref: a quantile of the reference's scores for x
    calibrate       phi(C),  C = mean_k 1[r_k <= r]          InfAlign (Balashankar et al. 2024); r_k: the reference's scores for x

With a tie, C counts one half (the mid-rank), so that C of a fresh reference response has mean 1/2 whatever the scores are. The
sum of several rewards' log-sigmoids is a soft AND: it is the log of the product of the s(r - r_ref).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rlhf.config.transforms import (
    REFERENCED,
    Calibrate,
    Clip,
    LengthPenalty,
    LogSigmoid,
    MissingEos,
    Overlong,
    Transform,
)


@dataclass(frozen=True)
class Scored:
    """A response's score, and what a transform may ask about the response.

    Attributes:
        n_tokens: length of the response.
        cut: it ended at the token limit, without its end-of-sequence token.
        limit: the most tokens it could have had; read by `overlong` only.
    """

    value: float
    n_tokens: int = 0
    cut: bool = False
    limit: int = 0


def clip(score: float, low: float | None, high: float | None) -> float:
    """The score, brought into [low, high]; None is no bound."""
    if low is not None:
        score = max(score, low)
    return score if high is None else min(score, high)


def log_sigmoid(score: float, centre: float) -> float:
    """log s(score - centre) = -log(1 + exp(centre - score)), never above 0; far below the centre it is the difference itself."""
    return -float(np.logaddexp(0.0, centre - score))


def quantile(scores: Sequence[float], share: float) -> float:
    """The value below which this share of the scores lies, interpolated linearly between neighbours."""
    return float(np.quantile(np.asarray(scores, dtype=np.float64), share))


def rank(score: float, references: Sequence[float]) -> float:
    """Share of `references` below the score, in [0, 1]; an equal one counts half (mid-rank)."""
    others = np.asarray(references, dtype=np.float64)
    return float(np.mean((others < score) + 0.5 * (others == score)))


def phi(u: float, kind: Literal["identity", "best_of_n", "worst_of_n"], strength: float) -> float:
    """What InfAlign learns from, in place of the rank u in [0, 1]. Increasing, from 0 to 1. With t = strength:

        identity     u
        best_of_n    (exp(t u) - 1) / (exp(t) - 1)          steep at the top: only the best of several answers will be used
        worst_of_n   (1 - exp(-t u)) / (1 - exp(-t))        steep at the bottom: the worst of several answers will be met

    Deviation: the paper's are exp(t u) and -exp(-t u). These are the same up to a factor and a constant, so that `beta` and
    learning rates mean the same for all three.
    """
    if kind == "identity":
        return u
    t = strength if kind == "best_of_n" else -strength
    return math.expm1(t * u) / math.expm1(t)


def stateless(transform: Transform, scored: Scored, references: Sequence[float]) -> float:
    """The transformed score, for every transform but `normalise`.

    Args:
        references: the reference's scores for the prompt, after the transforms that come before this one; read by `log_sigmoid` and
            `calibrate` only.
    """
    if isinstance(transform, Clip):
        return clip(scored.value, transform.low, transform.high)
    if isinstance(transform, LengthPenalty):
        return scored.value - transform.per_token * scored.n_tokens
    if isinstance(transform, MissingEos):
        return scored.value - transform.penalty * scored.cut
    if isinstance(transform, Overlong):
        return (
            scored.value
            - transform.penalty * max(0, scored.n_tokens - scored.limit + transform.buffer) / transform.buffer
        )
    if isinstance(transform, LogSigmoid):
        return log_sigmoid(scored.value, quantile(references, transform.quantile))
    if isinstance(transform, Calibrate):
        return phi(rank(scored.value, references), transform.phi, transform.strength)
    raise TypeError(f"{transform.name} has a state; see Moments")


def needs_references(transforms: Sequence[Transform]) -> bool:
    """Whether one of them reads the reference's scores."""
    return any(isinstance(transform, REFERENCED) for transform in transforms)


def before_reference(transforms: Sequence[Transform], references: Sequence[Scored]) -> list[float]:
    """The reference's scores as the first transform that reads them finds them: transformed by those before it."""
    values = list(references)
    for transform in transforms:
        if isinstance(transform, REFERENCED):
            break
        values = [replace(one, value=stateless(transform, one, ())) for one in values]
    return [one.value for one in values]


@dataclass(frozen=True)
class Moments:
    """How many numbers there were, their mean, and the sum of their squared distances from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: Sequence[float]) -> Moments:
        """With more numbers (Chan et al. 1979: exact for any division into batches, up to rounding)."""
        if not len(values):
            return self
        batch = np.asarray(values, dtype=np.float64)
        count = self.count + len(batch)
        gap = float(batch.mean()) - self.mean
        squares = self.squares + float(((batch - batch.mean()) ** 2).sum()) + gap**2 * self.count * len(batch) / count
        return Moments(count, self.mean + gap * len(batch) / count, squares)

    @property
    def std(self) -> float:
        """Standard deviation of these numbers (divided by their count, not by one less)."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalised(self, value: float) -> float:
        """(value - mean) / std; 0 while all numbers have been equal."""
        return (value - self.mean) / self.std if self.std > 0 else 0.0
