"""SIGTERM, which SLURM, Kubernetes and supervisors send to end a run: it ends as by Ctrl-C, with all that is cleaned up on that way. A
script that starts a run hands such a signal on to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
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


def run_child(command: Sequence[str]) -> int:
    """Run a program that takes down what it has started when SIGTERM comes, as `rlhf train` does, and wait for its end, also when this
    process is told to end meanwhile. Its exit status; minus the signal's number if one killed it. In the main thread.

    Raises:
        SystemExit: SIGINT or SIGTERM has come to this process; the program got SIGTERM, and has ended. The status is 128 and the number.
    """
    told: list[int] = []

    def hand_on(number: int, _: Any) -> None:
        told.append(number)
        if child is not None:
            child.terminate()

    child: subprocess.Popen[bytes] | None = None
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # In a session of its own, for Ctrl-C in a terminal reaches every process there: with what is handed on the program would get two
        # signals, and the second cuts off its cleaning up.
        child = subprocess.Popen(command, start_new_session=True)
        if told:
            child.terminate()
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        sys.exit(128 + told[0])
    return status


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
