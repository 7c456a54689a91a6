"""From the configuration's name to an algorithm."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.algorithms.truncated import without_truncated
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS
from rlhf.config.loader import UserError
from rlhf.config.user_code import call_users, import_users_module

_REMEDY = "Let it return one, as docs/algorithms/own.md shows"


class AlgorithmError(UserError):
    """`algorithm.name` does not lead to an algorithm."""


def make(settings: Settings) -> Algorithm:
    """The algorithm that `settings.algorithm` names: a built-in, or a function at the import path `module:function`.

    A built-in `NAME` is the function `NAME` of the module `rlhf.algorithms.NAME`; every such function is given all settings,
    since an algorithm's own may depend on others (a temperature, a length).

    Raises:
        AlgorithmError: a module or function that does not exist or raises something, or does not return an `Algorithm`.
    """
    name = settings.algorithm.name
    path = f"rlhf.algorithms.{name}:{name}" if name in METHODS else name
    module, _, attribute = path.partition(":")
    declare = getattr(import_users_module("algorithm.name", path, AlgorithmError), attribute, None)
    if not callable(declare):
        raise AlgorithmError(
            f"`algorithm.name`: `{module}` has no function `{attribute}`. Correct the name, or define it there"
        )
    algorithm = call_users("algorithm.name", path, declare, settings, AlgorithmError)
    if not isinstance(algorithm, Algorithm):
        raise AlgorithmError(
            f"`algorithm.name`: `{path}` returned {type(algorithm).__name__}, not an Algorithm. {_REMEDY}"
        )
    if wrong := [what for what, is_so in _impossible(algorithm).items() if is_so]:
        raise AlgorithmError(f"`algorithm.name`: the Algorithm that `{path}` returned {' and '.join(wrong)}. {_REMEDY}")
    if getattr(settings.algorithm, "mask_truncated", False):
        baseline = isinstance(algorithm.objective, PolicyGradient)
        algorithm = replace(algorithm, build=partial(without_truncated, build=algorithm.build, baseline=baseline))
    return algorithm


def _impossible(algorithm: Algorithm) -> dict[str, bool]:
    """What makes an algorithm impossible -> whether it applies to this one."""
    return {
        "has a `name` that is no text": not isinstance(algorithm.name, str),
        "has a `build` that cannot be called": not callable(algorithm.build),
        "has no responses to learn from (neither `sources` nor `dataset_pairs`)": not algorithm.sources
        and not algorithm.dataset_pairs,
    }
