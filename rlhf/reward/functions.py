"""Reward functions: loading one by its import path, and a few built-in ones for smoke runs.

A reward function is `def reward(prompt: str, response: str, payload: Mapping) -> float`, or the same with `async
def`. It may return None for "this response has no reward", and raise for "I could not judge it". A pairwise one is `def
judge(prompt: str, a: str, b: str, payload: Mapping) -> float`, the probability that response a is better than b. A function whose
second parameter is named `responses` (or `pairs`) gets all of a prompt's at once, and returns a list. One whose first parameter is named
`messages` gets the whole conversation there, a list of {"role", "content"}, instead of the last turn's text.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.config.user_code import import_users_module
from rlhf.reward.errors import RewardError
from rlhf.types import Prompt

SCORE = ("prompt", "response", "payload")
COMPARE = ("prompt", "a", "b", "payload")
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
AT_ONCE = {SCORE: "responses", COMPARE: "pairs"}
"""Name of the second parameter of a function that gets all responses, or all pairs of them, in one list."""
MESSAGES = "messages"
"""Name of the first parameter of a function that gets the whole conversation."""


def takes_all(function: Callable[..., Any]) -> bool:
    """Whether the function gets all of a prompt's responses, or pairs, in one call."""
    signature = _signature(function)
    names = [] if signature is None else list(signature.parameters)
    return len(names) > 1 and names[1] in AT_ONCE.values()


def asked_with(function: Callable[..., Any], prompt: Prompt) -> str | list[dict[str, str]]:
    """What the function gets as its first argument: the last turn's text, or all turns."""
    if next(iter(inspect.signature(function).parameters), None) == MESSAGES:
        return [turn.message() for turn in prompt.conversation]
    return prompt.text


def load_function(path: str, parameters: tuple[str, ...] = SCORE) -> Callable[..., Any]:
    """The function named `module:name`. The folder that the run was started in is searched as well.

    Args:
        parameters: what it is called with, by position.

    Raises:
        RewardError: the path is malformed, the module, the name or the right parameters are missing, the module raised something, or
            the function has no value to return.
    """
    module_name, _, name = path.partition(":")
    if not IMPORT_PATH.fullmatch(path) or module_name.endswith(".py"):
        raise RewardError(f"`reward.path`: `{path}` is not an import path. {_rewritten(module_name, name)}")
    module = import_users_module("reward.path", path, RewardError)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        raise RewardError(
            f"`reward.path`: `{module_name}` has no function `{name}`. It has: {names or 'no functions'}."
        )
    if inspect.isclass(function):
        raise RewardError(
            f"`reward.path`: `{path}` is a class. Name a function, or an object of the class that is made in the module and can be called."
        )
    if takes_all(function):
        parameters = ("prompt", AT_ONCE[parameters], "payload")
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(*parameters)
    except TypeError:
        raise RewardError(
            f"`reward.path`: `{path}` must take {len(parameters)} arguments, ({', '.join(parameters)}); it takes {signature}."
        ) from None
    if inspect.isasyncgenfunction(function) or (inspect.isgeneratorfunction(function) and not takes_all(function)):
        raise RewardError(
            f"`reward.path`: `{path}` is a generator (it has a `yield`), which gives no number. Let it `return` the reward."
        )
    if _returns_nothing(function):
        code = function.__code__
        raise RewardError(
            f"`reward.path`: `{path}` has no `return` statement with a value ({code.co_filename}:{code.co_firstlineno}), so no response "
            "would get a reward. Let it return a number"
        )
    return function


def _rewritten(module: str, name: str) -> str:
    """How a path that is none may have been meant."""
    stem = Path(module).stem
    if module.endswith(".py") and stem.isidentifier() and name.isidentifier():
        return f"Name the module, not its file: `{stem}:{name}`, and start the run in the folder that holds {stem}.py."
    return "Write `module:name`, e.g. `my_rewards:correctness`."


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """What it is called with; None where nobody can tell (some functions written in C)."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _returns_nothing(function: Callable[..., Any]) -> bool:
    """Whether every way out of a Python function returns None, and there is one. Of a decorated one the wrapper's, which returns what
    it likes."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return False
    steps = list(dis.get_instructions(code))
    returned = [
        before.opname == "LOAD_CONST"
        and before.argval is None
        and not step.is_jump_target  # else it has another value too
        for before, step in itertools.pairwise(steps)
        if step.opname == "RETURN_VALUE"
    ]
    returned += [step.argval is None for step in steps if step.opname == "RETURN_CONST"]  # from Python 3.12 on
    return bool(returned) and all(returned)


def share_of_letter_a(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """Share of the characters that are the letter a, in [0, 1]. Even a model with random weights can learn it."""
    return response.lower().count("a") / max(len(response), 1)


def negative_length(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """Minus the number of words: the shorter the better."""
    return -float(len(response.split()))


def exact_match(prompt: str, response: str, payload: Mapping[str, Any]) -> float | None:
    """1 if the response holds the payload's `answer`, else 0; None (no reward) if the prompt came without an answer."""
    answer = payload.get("answer")
    return None if answer is None else float(str(answer).strip().lower() in response.lower())


def prefers_more_letter_a(prompt: str, a: str, b: str, payload: Mapping[str, Any]) -> float:
    """Probability that a beats b: sigmoid of ten times the difference in their shares of the letter a."""
    difference = share_of_letter_a(prompt, a, payload) - share_of_letter_a(prompt, b, payload)
    return 1 / (1 + math.exp(-10 * difference))
