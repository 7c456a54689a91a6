"""What is simulated: the settings that decide how a run's time goes by, and which of them may be varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import Settings, UserError
from rlhf.loop.collecting import streams

VARIED = (
    "loop.staleness",
    "loop.stream",
    "loop.prompts_per_step",
    "loop.updates_per_step",
    "loop.refill",
    "rollout.engines",
    "rollout.max_num_seqs",
    "rollout.max_tokens",
    "rollout.in_flight",
    "policy.ranks",
    "policy.micro_batch_tokens",
)
"""Fields whose effect is simulated; all others are as in the run."""


def require_varied(overrides: Sequence[str]) -> None:
    """Raises UserError if one of these `section.key=value` is a field whose effect is not simulated."""
    for override in overrides:
        field = override.partition("=")[0].strip()
        if field not in VARIED:
            raise UserError(
                f"--simulate: the effect of `{field}` is not simulated. What can be varied: {', '.join(VARIED)}"
            )


@dataclass(frozen=True)
class Scenario:
    """One layout and schedule.

    Attributes:
        most: sequences that an engine decodes at the same time.
        piece_tokens: that a piece of a step has at least (`loop.stream`).
        longer: factor on the lengths of the run's responses.
    """

    engines: int
    ranks: int
    prompts: int
    staleness: int
    refill: int
    updates: int
    most: int
    piece_tokens: int
    max_tokens: int
    longer: float
    stream: bool
    keep: bool


def scenario(settings: Settings, recorded: Settings) -> Scenario:
    """What these settings come to.

    Args:
        recorded: those of the run; with another `rollout.max_tokens` all its responses are longer or shorter in proportion.
    """
    loop, rollout, policy = settings.loop, settings.rollout, settings.policy
    return Scenario(
        engines=rollout.engines,
        ranks=policy.ranks,
        prompts=loop.prompts_per_step,
        staleness=loop.staleness,
        refill=loop.refill,
        updates=loop.updates_per_step,
        most=rollout.max_num_seqs,
        piece_tokens=policy.micro_batch_tokens * policy.ranks,
        max_tokens=rollout.max_tokens,
        longer=rollout.max_tokens / recorded.rollout.max_tokens,
        stream=streams(settings),
        keep=rollout.in_flight == "keep",
    )
