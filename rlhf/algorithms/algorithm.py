"""What an algorithm is, and how the configuration's name becomes one."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.contrast import Contrast
from rlhf.config.algorithm import AlgorithmSettings
from rlhf.config.loader import UserError
from rlhf.types import Feedback, Rollout, TrainingItem

Builder = Callable[[Rollout, Feedback, random.Random], "tuple[TrainingItem, ...] | Dropped"]


@dataclass(frozen=True)
class Algorithm:
    """A choice at each plug point.

    Attributes:
        samples_per_prompt: responses to sample from the current policy (K).
        build: judged completions -> items to learn from. It runs in the driver and sees facts and rewards, not tokens.
        objective: the contrast loss on those items. It runs in the policy's ranks, so it must be picklable.
    """

    name: str
    samples_per_prompt: int
    build: Builder
    objective: Contrast


class AlgorithmError(UserError):
    """`algorithm.name` does not lead to an algorithm."""


def make(settings: AlgorithmSettings) -> Algorithm:
    """The algorithm that the settings name: a built-in, or a function at the import path `module:function`.

    Raises:
        AlgorithmError: unknown name, failing import, or a function that does not return an `Algorithm`.
    """
    from rlhf.algorithms.online_dpo import online_dpo

    built_in: dict[str, Callable[[AlgorithmSettings], Algorithm]] = {"online_dpo": online_dpo}
    if settings.name in built_in:
        return built_in[settings.name](settings)
    module, separator, attribute = settings.name.partition(":")
    if not separator:
        known = ", ".join(built_in)
        raise AlgorithmError(
            f"algorithm.name: {settings.name!r} is not known. Use one of: {known}; or the import path "
            "module:function of your own."
        )
    try:
        algorithm = getattr(importlib.import_module(module), attribute)(settings)
    except (ImportError, AttributeError) as error:
        raise AlgorithmError(f"algorithm.name: cannot import {settings.name!r}: {error}") from error
    if not isinstance(algorithm, Algorithm):
        raise AlgorithmError(f"algorithm.name: {settings.name!r} returned {type(algorithm).__name__}, not an Algorithm")
    return algorithm
