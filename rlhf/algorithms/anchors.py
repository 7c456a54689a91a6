"""Update rules of frozen policies: what the reference, or the engines' second model, becomes as the policy learns.

    fixed         ref_t = pi_0
    previous      ref_t = the policy at the start of the present round of `every` steps
    ema           ref_t = decay ref_{t-1} + (1 - decay) pi_t, after every step
    extrapolated  at the end of a round: ref = pi = pihat + alpha (pihat - pihat of the round before)   (APO; He et al. 2024)

The first round of `extrapolated` has no earlier iterate to extrapolate from, so it equals `previous`; with alpha = 0 every round does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fixed:
    """Never changes; that is checked."""


@dataclass(frozen=True)
class Previous:
    """The previous iterate, taken over after every `every` steps."""

    every: int = 1


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of the policy's weights, after every step."""

    decay: float


@dataclass(frozen=True)
class Extrapolated:
    """The iterate extrapolated by `alpha` times its last change, after every `every` steps; the policy is set to it as well."""

    every: int
    alpha: float


UpdateRule = Fixed | Previous | Ema | Extrapolated


def update_rule(algorithm: Any) -> UpdateRule:
    """The rule that a method's fields `reference`, `reference_every`, `reference_decay` and `reference_alpha` describe."""
    if algorithm.reference == "previous":
        return Previous(algorithm.reference_every)
    if algorithm.reference == "ema":
        return Ema(algorithm.reference_decay)
    if algorithm.reference == "extrapolated":
        return Extrapolated(algorithm.reference_every, algorithm.reference_alpha)
    return Fixed()


def due(rule: UpdateRule, step: int) -> bool:
    """Whether the rule changes something after step `step` (from 1)."""
    if isinstance(rule, Previous | Extrapolated):
        return step % rule.every == 0
    return isinstance(rule, Ema)


def equals_policy(rule: UpdateRule, step: int) -> bool:
    """Whether the anchor equals the policy before loop step `step` (from 1), for certain."""
    return step == 1 or (isinstance(rule, Previous | Extrapolated) and due(rule, step - 1))
