"""SIGTERM, which SLURM, Kubernetes and supervisors send to end a run: it ends as by Ctrl-C, with all that is cleaned up on that way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Ending:
    """Why the program ends.

    Attributes:
        told: SIGTERM has come.
    """

    told: bool = False


@contextmanager
def ended_by_sigterm() -> Iterator[Ending]:
    """Within it, the first SIGTERM raises KeyboardInterrupt where the main thread is; more of them change nothing, so that what cleans up
    is not cut off. Does nothing outside of the main thread, which alone may have handlers."""
    ending = Ending()

    def interrupt(*_: Any) -> None:
        if not ending.told:
            ending.told = True
            signal.raise_signal(signal.SIGINT)  # asyncio has its own way to end on this one

    if not _in_main_thread():
        yield ending
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield ending
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around a library that takes SIGTERM for itself: afterwards it is handled as before. Ray 2.60 does so in `ray.init`, and its handler
    in C++ prints a stack trace and aborts."""
    if not _in_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
