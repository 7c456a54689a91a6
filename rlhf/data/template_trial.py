"""A chat template is tried before it is used, in a process of its own whose time and memory are bounded.

A template is code that comes with a model: a loop, or one expression (`9 ** 9 ** 9`), may take all of the time or memory there is, and
nothing inside of a process can stop one expression. Knows no templates, only what renders one.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable

from rlhf.config.loader import UserError
from rlhf.data.errors import DataError

CPU_SECONDS = 5
"""Of the child's own computation, so that a busy machine refuses nothing; a trial takes milliseconds."""
WALL_SECONDS = 300.0
MEMORY = 1 << 29
"""Bytes that the trial may take besides what this process has."""
MOST_CHARACTERS = 10_000_000


def bounded(render: Callable[[], list[str]], what: str, remedy: str) -> list[str]:
    """`render()`, done by a forked copy of this process.

    Args:
        what: who renders, at the head of the message: "policy.model: the chat template of NAME".
        remedy: at its end.

    Raises:
        DataError: `render` raised a UserError, or took too much time or memory, or wrote too long a text.
    """
    ours, childs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child calls nothing that waits for one
        child = os.fork()
    if child == 0:
        os.close(ours)
        _child(render, childs, what, remedy)
    os.close(childs)
    try:
        answer = _read(ours)
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)  # it has ended, or is to
        os.waitpid(child, 0)
    if not answer:
        raise DataError(
            f"{what}: it does not end (it took more than {CPU_SECONDS} s for two short conversations). {remedy}"
        )
    found = json.loads(answer)
    if isinstance(found, str):
        raise DataError(found)
    return found


def _child(render: Callable[[], list[str]], pipe: int, what: str, remedy: str) -> None:
    """Never returns. What it writes is an error's message, or the texts."""
    try:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        for kind, most in (
            (resource.RLIMIT_AS, used + MEMORY),
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        try:
            found: list[str] | str = render()
            if sum(map(len, found)) > MOST_CHARACTERS:
                found = (
                    f"{what}: it writes more than {MOST_CHARACTERS:,} characters for two short conversations. {remedy}"
                )
        except UserError as error:
            found = str(error)
        with os.fdopen(pipe, "w", encoding="ascii") as stream:
            json.dump(found, stream)
    finally:
        os._exit(0)


def _read(pipe: int) -> bytes:
    """All that is written until the other end closes, or nothing if that takes too long."""
    found, end = bytearray(), time.monotonic() + WALL_SECONDS
    while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        block = os.read(pipe, 1 << 16)
        if not block:
            return bytes(found)
        found += block
    return b""
