"""From the configuration's name to an algorithm."""

from __future__ import annotations

import importlib
import os
import sys

from rlhf.algorithms.algorithm import Algorithm
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS
from rlhf.config.loader import UserError


class AlgorithmError(UserError):
    """`algorithm.name` does not lead to an algorithm."""


def make(settings: Settings) -> Algorithm:
    """The algorithm that `settings.algorithm` names: a built-in, or a function at the import path `module:function`.

    A built-in `NAME` is the function `NAME` of the module `rlhf.algorithms.NAME`; every such function is given all settings,
    since an algorithm's own may lean on others (a temperature, a length).

    Raises:
        AlgorithmError: failing import, or a function that does not return an `Algorithm`.
    """
    name = settings.algorithm.name
    path = f"rlhf.algorithms.{name}:{name}" if name in METHODS else name
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # a module beside the user's configuration; Ray's workers look there as well
        sys.path.insert(0, os.getcwd())
    try:
        declare = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise AlgorithmError(f"algorithm.name: cannot import {name!r}: {error}") from error
    algorithm = declare(settings)
    if not isinstance(algorithm, Algorithm):
        raise AlgorithmError(f"algorithm.name: {name!r} returned {type(algorithm).__name__}, not an Algorithm")
    return algorithm
