"""Code of the user's own that a configuration names by import path: importing it, and reporting what it raised.

A traceback through this package says little to a user who has misspelt a key in a reward function, so what the code raises is reported by
its class, its message and the lines that are the user's. Knows nothing of rewards and algorithms, which import and call such code.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import os
import sys
import sysconfig
import threading
import traceback
from bdb import BdbQuit
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from rlhf.config.loader import UserError

LONGEST_MESSAGE = 400
"""Characters of an exception's own message that are shown."""
LONGEST_LINE = 160
"""Characters of a line of the user's code that are shown."""
MOST_FRAMES = 5
TOLD_FRAMES = 3
INSTALLED = ("site-packages", "dist-packages")
OURS = __name__.partition(".")[0]


def import_users_module(field: str, path: str, error: type[UserError]) -> ModuleType:
    """The module of the import path `module:name`. The folder that the run was started in is searched as well.

    Args:
        field: of the configuration, that names it.
        error: what is raised.

    Raises:
        UserError: of the class `error`. The module does not exist, or it raised (anything) while it was imported; then the message
            holds its own lines.
    """
    name = path.partition(":")[0]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except BaseException as raised:  # code of the user, which may raise anything
        if ends_the_run(raised):
            raise
        missing = isinstance(raised, ModuleNotFoundError) and f"{name}.".startswith(f"{raised.name}.")
        remedy = (
            " Start the run in the folder that holds it, or install it on every machine of the cluster."
            if missing
            else f" Correct it.{frames(raised, name)}"
        )
        raise error(f"`{field}`: cannot import the module `{name}` of `{path}`: {message(raised)}.{remedy}") from raised


def call_users(field: str, path: str, function: Callable[..., Any], argument: Any, error: type[UserError]) -> Any:
    """`function(argument)`.

    Raises:
        UserError: what the function itself raised as one, or one of the class `error` with the function's own lines.
    """
    try:
        return function(argument)
    except UserError:
        raise
    except BaseException as raised:  # code of the user, which may raise anything
        if ends_the_run(raised):
            raise
        raise error(
            f"`{field}`: `{path}` raised {message(raised)}. Correct it.{frames(raised, module_of(function))}"
        ) from raised


def ends_the_run(raised: BaseException) -> bool:
    """Whether it is no outcome of the user's code, but the wish to stop: Ctrl-C, which reaches the main thread alone, or a debugger's
    `quit`."""
    main = threading.current_thread() is threading.main_thread()
    return isinstance(raised, BdbQuit) or (isinstance(raised, KeyboardInterrupt) and main)


def told(raised: BaseException, function: Any) -> str:
    """An exception of the user's function in one line: class, message, and the lines that are the user's with their places, the innermost
    first."""
    theirs = [f"{_place(*one)}: {_source(*one)}" for one in reversed(_theirs(raised, module_of(function)))]
    return f"{message(raised)} ({'; called at '.join(theirs[:TOLD_FRAMES])})" if theirs else message(raised)


def frames(raised: BaseException, module: str) -> str:
    """The user's own lines of a traceback, the innermost last, each on a line of its own that begins with a line break."""
    return "".join(f"\n  {_place(*one)}: {_source(*one)}" for one in _theirs(raised, module)[-MOST_FRAMES:])


def message(raised: BaseException) -> str:
    """Class and message of any exception, also of one that cannot say what it is."""
    try:
        text = str(raised)
    except BaseException as worse:  # an exception of the user's is code as well
        if ends_the_run(worse):
            raise
        text = f"its message cannot be shown, because that raised {type(worse).__name__}"
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE] + " ..."
    return f"{type(raised).__name__}: {text}" if text else type(raised).__name__


def shown(value: Any) -> str:
    """A value that the user's code returned, in at most 80 characters, also one that cannot show itself, or shows only where it lies."""
    try:
        text = f"{value!r:.80}"
    except Exception:  # noqa: BLE001 - `__repr__` is code of the user
        text = ""
    return text if text and " object at 0x" not in text else f"an object of the class {type(value).__name__}"


def module_of(function: Any) -> str:
    """The module in which a function, or the class of a callable object, was defined."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__


def _theirs(raised: BaseException, module: str) -> list[tuple[FrameType, int]]:
    """Frames of the code that was asked for, and of other code that is neither this package's nor installed; the innermost last. Where
    there are none, those of its cause: a coroutine's StopIteration comes as a RuntimeError that Python raises."""
    package = module.partition(".")[0]

    def of_the_user(frame: FrameType) -> bool:
        at = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        return at == package or (at != OURS and not _installed(frame.f_code.co_filename))

    theirs = [(frame, line) for frame, line in traceback.walk_tb(raised.__traceback__) if of_the_user(frame)]
    return theirs if theirs or raised.__cause__ is None else _theirs(raised.__cause__, module)


@functools.cache
def _installed(file: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    library = sysconfig.get_path("stdlib")
    return file.startswith(("<", library + os.sep)) or any(part in INSTALLED for part in file.split(os.sep))


def _place(frame: FrameType, line: int) -> str:
    file = frame.f_code.co_filename
    inside = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
    return f"{inside}:{line} in {frame.f_code.co_name}"


def _source(frame: FrameType, line: int) -> str:
    return linecache.getline(frame.f_code.co_filename, line).strip()[:LONGEST_LINE]
