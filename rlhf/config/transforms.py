"""`reward.transforms`: what is done to a score before it is learned from, one after the other.

The mathematics is in rlhf/reward/transforms.py, the rules between the choices are in `shaping_checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from pydantic import Field

from rlhf.config.base import MAX_TOKENS, Section


class Clip(Section):
    """Scores below `low` become `low`, scores above `high` become `high`."""

    name: Literal["clip"] = Field(description="This transform.")
    low: float | None = Field(None, ge=-1e9, le=1e9, description="Lower bound; null: none.")
    high: float | None = Field(None, ge=-1e9, le=1e9, description="Upper bound; null: none.")


class LengthPenalty(Section):
    """A price for each token of the response, the end-of-sequence token included."""

    name: Literal["length_penalty"] = Field(description="This transform.")
    per_token: float = Field(gt=0, le=1e6, description="Subtracted from the score for each token.")


class MissingEos(Section):
    """A penalty for a response that was cut at `rollout.max_tokens`, without its end-of-sequence token."""

    name: Literal["missing_eos"] = Field(description="This transform.")
    penalty: float = Field(gt=0, le=1e6, description="Subtracted from the score of a response that was cut.")


class Overlong(Section):
    """A penalty that grows over the last tokens before `rollout.max_tokens`: DAPO's soft overlong punishment."""

    name: Literal["overlong"] = Field(description="This transform.")
    buffer: int = Field(
        ge=1,
        le=MAX_TOKENS,
        description="Tokens before the limit over which the penalty grows from 0, in a straight line.",
    )
    penalty: float = Field(
        1.0, gt=0, le=1e6, description="Subtracted from the score of a response as long as the limit."
    )


class Normalise(Section):
    """Scores less the mean, over the standard deviation, of all scores of the run up to and with this step."""

    name: Literal["normalise"] = Field(description="This transform.")


class LogSigmoid(Section):
    """log sigmoid(r - r_ref): what exceeds a quantile of the reference's scores for the prompt counts less and less."""

    name: Literal["log_sigmoid"] = Field(description="This transform.")
    quantile: float = Field(
        0.85,
        ge=0,
        le=1,
        description="r_ref is this quantile of the prompt's scores in `reward.reference_scores`.",
    )


class Calibrate(Section):
    """phi(rank of the score among the reference's scores for the prompt): InfAlign."""

    name: Literal["calibrate"] = Field(description="This transform.")
    phi: Literal["identity", "best_of_n", "worst_of_n"] = Field(
        "identity",
        description="What is made of the rank u in [0, 1]: u itself (its mean is the win rate against the reference), or an "
        "exponential that suits a policy from which the best, or the worst, of several samples will be taken.",
    )
    strength: float = Field(10.0, gt=0, le=100, description="t in the exponential of `best_of_n` and `worst_of_n`.")


ScoreTransform = Annotated[Clip | LogSigmoid | Calibrate, Field(discriminator="name")]
"""What needs to know nothing but the score and the prompt's reference scores: a member of an ensemble can have it."""

Transform = Annotated[
    Clip | LengthPenalty | MissingEos | Overlong | Normalise | LogSigmoid | Calibrate, Field(discriminator="name")
]

TRANSFORMS: dict[str, type[Section]] = {
    get_args(cls.model_fields["name"].annotation)[0]: cls
    for cls in (Clip, LengthPenalty, MissingEos, Overlong, Normalise, LogSigmoid, Calibrate)
}
"""Name -> fields of each transform."""

REFERENCED = (LogSigmoid, Calibrate)
"""Those that read `reward.reference_scores`."""


def remembers(transforms: Sequence[Transform]) -> bool:
    """Whether one of them depends on the other scores of the step."""
    return any(isinstance(transform, Normalise) for transform in transforms)
