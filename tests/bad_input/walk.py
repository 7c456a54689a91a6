"""The walk of bad inputs: what a case is, how it is run, and what counts as a good answer to it.

A case puts something into an empty working directory and calls the command line, in this process. Good answers are two: it is refused
(exit status 2, and a message that names the file, field or option and says what to do), or it is accepted and the case says why that
is right. Nothing may be left behind, take long, start an actor or a process that answers, or end in an exception.

The tables of cases lie beside this file, one for each kind of input; `python -m tests.bad_input` counts verdicts.
"""

from __future__ import annotations

import io
import logging
import re
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from unittest import mock

from tests.bad_input.place import Place

CPU_SECONDS, SECONDS = 20, 300.0
"""After which a case hangs: of this process's computing, and of waiting; hundreds of times what a case takes."""
GROWTH = 4 << 30
"""Bytes that the process may grow by in one case: what reads without end must not take the machine with it."""
LONGEST_MESSAGE = 6000
"""Characters; a value is quoted in part."""


class Verdict(Enum):
    """The answer to one case. The first two are good."""

    CLEAR = "refused clearly"
    RIGHT = "right"
    UNCLEAR = "unclear"
    SILENT = "accepted silently"
    STARTED = "accepted until something started"
    LEFT = "left files behind"
    TRACEBACK = "traceback"
    HANG = "hang"
    WRONG = "refused, though it is right"


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: `kind/what/how`, unique.
        prepare: writes into the working directory and returns the command's arguments.
        about: what a message names; one of them is enough.
        right: why it may be accepted; None: it must be refused.
        required: it must be accepted (a check of the walk itself).
        starts: acceptance shows by a start of something, since the command does nothing else.
        leaves: names that the command may create.
        again: other cases meet the same code; without `--every` one in three of these is taken.
    """

    name: str
    prepare: Callable[[Place], Sequence[str]]
    about: tuple[str, ...]
    right: str | None = None
    required: bool = False
    starts: bool = False
    leaves: tuple[str, ...] = ()
    again: bool = False


@dataclass(frozen=True)
class Answer:
    """What happened.

    Attributes:
        why: what is wrong with it.
        said: standard error.
    """

    verdict: Verdict
    why: str
    argv: tuple[str, ...]
    said: str

    @property
    def good(self) -> bool:
        return self.verdict in (Verdict.CLEAR, Verdict.RIGHT)

    def __str__(self) -> str:
        shown = " ".join(repr(part) if len(part) < 200 else repr(part[:200]) + "..." for part in self.argv)
        return f"{self.verdict.value}: {self.why}\n  rlhf {shown}\n  {self.said.strip()[-1500:]}"


class Hang(BaseException):
    """The deadline of a case is over."""


class Started(BaseException):
    """Something was about to start."""


def run(case: Case, place: Place) -> Answer:
    """Run one case in `place`, a working directory of its own."""
    with place.entered():
        argv = tuple(case.prepare(place))
        before = place.names()
        status, said, shown = _call(argv)
        left = sorted(name for name in place.names() - before if not name.startswith(case.leaves or ("\0",)))
    verdict, why = _judge(case, status, said, shown)
    if left and verdict in (Verdict.CLEAR, Verdict.RIGHT):
        verdict, why = Verdict.LEFT, f"created {', '.join(left[:5])}"
    return Answer(verdict, why, argv, said)


def bad_answers(cases: Sequence[Case], place: Place) -> str:
    """What is wrong with the answers to these cases, in words; empty if nothing is."""
    answers = ((case, run(case, place)) for case in cases)
    return "\n".join(f"{case.name}: {answer}" for case, answer in answers if not answer.good)


def _call(argv: Sequence[str]) -> tuple[int | BaseException, str, str]:
    """Exit status, or what was raised; standard error and standard output."""
    from rlhf.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", how) for how in ("strict", "backslashreplace"))
    status: int | BaseException
    _started.clear()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        log = logging.StreamHandler(err)
        logging.getLogger().addHandler(log)
        stack.callback(logging.getLogger().removeHandler, log)
        try:
            with _deadline() as hung, _bounded_memory():
                status = main(list(argv))
                sys.stdout.flush()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # noqa: BLE001 -- whatever ends a command is what the case is about
            status = error
        if hung:
            status = Hang()
        elif _started:
            status = Started()
    said, shown = (_text(stream) for stream in (err, out))
    return status, said, shown


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.detach()
    return buffer.getvalue().decode("utf-8")


@contextmanager
def _deadline() -> Iterator[list[bool]]:
    """Raises Hang in the block when it takes too long, again and again, since code may catch it; the list is then not empty."""
    hung: list[bool] = []

    def ring(signum: int, frame: object) -> None:
        hung.append(True)
        raise Hang

    clocks = {signal.ITIMER_REAL: (signal.SIGALRM, SECONDS), signal.ITIMER_PROF: (signal.SIGPROF, CPU_SECONDS)}
    old = {number: signal.signal(number, ring) for number, _ in clocks.values()}
    for clock, (_, seconds) in clocks.items():
        signal.setitimer(clock, seconds, 1.0)
    try:
        yield hung
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GROWTH, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


STARTS = (
    "ray.init",
    "rlhf.policy.group.PolicyGroup.start",
    "rlhf.rollout.pool.RolloutPool.start",
    "rlhf.reward.serving.pool.RewardPool.start",
    "rlhf.training.supervised.SupervisedGroup.start",
    "rlhf.reward.models.RewardModel.encode",
    "socket.socket.bind",
    "socket.socket.connect",
)
"""Where work begins: Ray, engines, ranks, servers, training, the network."""


@contextmanager
def nothing_starts() -> Iterator[None]:
    """Whatever is about to start raises Started instead, until the end of the block. Imports all that could."""

    def refuse(*args: object, **kwargs: object) -> None:
        _started.append(True)
        raise Started

    with ExitStack() as stack:
        for name in STARTS:
            stack.enter_context(mock.patch(name, refuse))
        yield


_started: list[bool] = []
"""Not empty if something was about to start in this case, whatever became of the exception."""


def _judge(case: Case, status: int | BaseException, said: str, shown: str) -> tuple[Verdict, str]:
    if isinstance(status, Hang):
        return Verdict.HANG, f"took more than {CPU_SECONDS} s of computing, or {SECONDS:g} s"
    started = isinstance(status, Started)
    if started and case.starts:
        status = 0
    elif started:
        return Verdict.STARTED, "nothing was said before something started"
    if isinstance(status, BaseException):
        return Verdict.TRACEBACK, "".join(traceback.format_exception(status))[-2500:]
    if status == 0:
        return _accepted(case, shown)
    if "Traceback (most recent call last)" in said:
        return Verdict.TRACEBACK, "a traceback in the message"
    if case.required:
        return Verdict.WRONG, "it had to be accepted"
    if status != 2:
        return Verdict.UNCLEAR, f"exit status {status}"
    unclear = what_is_unclear(said, case.about)
    return (Verdict.UNCLEAR, unclear) if unclear else (Verdict.CLEAR, "")


def _accepted(case: Case, shown: str) -> tuple[Verdict, str]:
    if case.right is None:
        return Verdict.SILENT, "accepted"
    if re.search(r"/~(/|$|[\s,;])", shown):
        return Verdict.SILENT, "a `~` was taken for the name of a folder"
    return Verdict.RIGHT, case.right


REMEDY = re.compile(
    r"\b(must|needs?|give|set|use|choose|choice|remove|rename|lower|raise|write|did you mean|known|put|correct|restore|delete|make|"
    r"install|leave|add|check|name|start|run|train|replace|expected|required|invalid|one of|at least|at most|only|save|convert|"
    r"shorten|free|download|copy|cut|indent|flatten|look|let|it has|see|such as|ask for|belongs? to|not both|fetch|unpack)\b",
    re.IGNORECASE,
)
RAW = re.compile(r"object at 0x[0-9a-f]{6}|<class '|\ba NoneType\b|Traceback \(|^\w*Error\(", re.MULTILINE)
"""What belongs into no message."""


def what_is_unclear(said: str, about: Sequence[str]) -> str | None:
    """What a message lacks, in words; None if it is clear.

    Args:
        about: names of files, fields or options; it must hold one of them.
    """
    if not said.strip():
        return "no message"
    if not any(name in said for name in about):
        return f"names none of {', '.join(about)}"
    if not REMEDY.search(said):
        return "no remedy"
    if RAW.search(said):
        return "Python's own words"
    if len(said) > LONGEST_MESSAGE:
        return f"a message of {len(said)} characters"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", said):
        return "control characters"
    return None
