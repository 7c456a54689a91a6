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
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # scripts start their background jobs so
                signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.raise_signal(signal.SIGINT)  # asyncio has its own way to end on this one

    if not _in_main_thread():
        yield ending
        return
    before, ctrl_c = signal.signal(signal.SIGTERM, interrupt), signal.getsignal(signal.SIGINT)
    try:
        yield ending
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ctrl_c)


@contextmanager
def sigterm_kept_from_ray() -> Iterator[None]:
    """Around `ray.init`: SIGTERM is handled as before, meanwhile and afterwards. Ray 2.60 would leave at once with status 15 while it
    starts; later its handler in C++ prints a stack trace and aborts."""
    from ray._private import utils

    if not _in_main_thread():
        yield
        return
    before, takes = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = takes
        signal.signal(signal.SIGTERM, before)  # also where the handler in C++ has replaced it


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
