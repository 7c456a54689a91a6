"""A worker process: verifies one response after the other. `python -m rlhf.reward.verifiers.worker NAME`; see `workers`.

One JSON object a line. In: `prompt`, `response`, `payload`, `limit_s`. Out, first of all: `ready`, or `error`; then for each:
`value`, `invalid` (the prompt's line is at fault), `failed` (the verifier broke) or `timed_out`. A verifier in `APART` has a process
for each response, forked from this one, which cannot reach this one or what other responses get. Who waits for a worker ends it when
it does not answer in time.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, TextIO

from rlhf.reward.errors import RewardError
from rlhf.reward.verifiers.verifier import PayloadError, Verifier, make_verifier

APART = ("reasoning_gym",)
"""Verifiers whose scorers evaluate answers: each verdict in a process of its own, shut off (`sandbox`)."""

MEMORY_BYTES = 2**30
"""Address space: what a power tower or a pattern may ask for before it breaks."""

LONGEST_ANSWER, LONGEST_REASON = 2**16, 1000
"""Bytes that are read of a verdict, and characters of the reason in it."""


def main(name: str) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    # The soft limit only: programs in the sandbox, which are started from here, have limits of their own.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers
    try:
        verifier = make_verifier(name)
    except RewardError as error:
        _say(answers, {"error": str(error)})
        return
    _say(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _say(answers, (apart if name in APART else verdict)(verifier, request))


def apart(verifier: Verifier[Any], request: dict[str, Any]) -> dict[str, Any]:
    """A verdict that is made in a child process, within the request's `limit_s`. Nothing but a verdict is taken from it."""
    end = time.monotonic() + request["limit_s"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(verifier, request, writing)
    os.close(writing)
    said, timed_out = b"", False
    with os.fdopen(reading, "rb", buffering=0) as answer:
        while len(said) <= LONGEST_ANSWER:
            timed_out = not select.select([answer], [], [], max(0.0, end - time.monotonic()))[0]
            part = b"" if timed_out else answer.read(LONGEST_ANSWER)
            if not part:
                break
            said += part
    os.kill(child, signal.SIGKILL)  # it has said what it had to say
    os.waitpid(child, 0)
    if timed_out:
        return {"timed_out": True}
    try:
        ((kind, found),) = json.loads(said).items()
        return (
            {"value": float(found)} if kind == "value" else {"invalid" if kind == "invalid" else "failed": str(found)}
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {"failed": "the process that verified this response ended without a verdict"}


def _be_child(verifier: Verifier[Any], request: dict[str, Any], writing: int) -> None:
    """Verify, with no descriptor but the one for the verdict and hard limits. Never returns."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        writing = os.dup2(writing, 3) if writing != 3 else writing
        os.closerange(4, 1 << 16)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        os.write(writing, json.dumps(verdict(verifier, request)).encode())
    finally:
        os._exit(0)


def verdict(verifier: Verifier[Any], request: dict[str, Any]) -> dict[str, Any]:
    """What a worker answers."""
    try:
        fields = verifier.read(request["payload"])
        return {"value": float(verifier.score(request["prompt"], request["response"], fields))}
    except PayloadError as error:
        return {"invalid": str(error)[:LONGEST_REASON]}
    except Exception as error:  # noqa: BLE001 - whatever a library raises is this response's outcome, and is told
        return {"failed": f"{type(error).__name__}: {error}"[:LONGEST_REASON]}


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
