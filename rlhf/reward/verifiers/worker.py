"""A worker process: verifies one response after the other. `python -m rlhf.reward.verifiers.worker NAME`; see `workers`.

One JSON object a line. In: `prompt`, `response`, `payload`, `limit_s`. Out, first of all: `ready`, or `error`; then for each:
`value`, `invalid` (the prompt's line is at fault) or `failed` (the verifier broke). The kernel ends a worker whose time for a
response is up, even inside a library that does not come back; who waits for it sees the end of its output.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any, TextIO

from rlhf.reward.errors import RewardError
from rlhf.reward.verifiers.verifier import PayloadError, Verifier, make_verifier

MEMORY_BYTES = 4 * 2**30
"""Address space: what a power tower or a pattern may ask for before it breaks."""


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
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"])  # not caught, so it ends the process
        answer = verdict(verifier, request["prompt"], request["response"], request["payload"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(answers, answer)


def verdict(verifier: Verifier[Any], prompt: str, response: str, payload: dict[str, Any]) -> dict[str, Any]:
    """What a worker answers."""
    try:
        return {"value": float(verifier.score(prompt, response, verifier.read(payload)))}
    except PayloadError as error:
        return {"invalid": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a library raises is this response's outcome, and is told
        return {"failed": f"{type(error).__name__}: {error}"}


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
