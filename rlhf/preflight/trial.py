"""One response judged before the run: by the user's function or a verifier in a process of its own, within a deadline.

`try_out` asks; as a program (`python -m rlhf.preflight.trial`) this is the process that answers, so that code which hangs, holds the
interpreter or ends it cannot do so to whoever asks. Owns the trial texts and the words for their verdicts.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config import Settings, UserError
from rlhf.config.reward import RewardSettings, SourceSettings
from rlhf.preflight.finding import PlanError
from rlhf.types import Invalid, Outcome, Prompt, Score, TimedOut

RESPONSES = ("This is a trial response.", "This is another one.")
"""The second for judges that compare."""
PROMPTS = 3
"""How many prompts are tried until one response has a score."""
LOAD_S = 120.0
"""How long importing the user's module may take, or starting a verifier, in seconds."""
LONGEST_S = 60.0
"""Most that is waited for a verdict, however long `reward.deadline_s` is."""
GRACE_S = 1.0
"""Beyond the deadline, for the process itself to say that nothing came; where the function holds it, it cannot."""

Told = tuple[str, str]
"""An outcome: `score`, `invalid`, `failed` or `late`, and what is said of it."""


@dataclass(frozen=True)
class Task:
    """What the process is asked.

    Attributes:
        settings: whose `reward` is the one judge.
    """

    settings: Settings
    prompts: tuple[Prompt, ...]


def try_out(place: str, source: SourceSettings, settings: Settings, prompts: Sequence[Prompt]) -> str:
    """What a function or a verifier says about a trial response, in words.

    Args:
        place: of the source in the configuration, `reward` or a member of it.

    Raises:
        UserError: it cannot be loaded, does not answer in time, or fails for each of the first prompts.
    """
    alone = RewardSettings(**{name: getattr(source, name) for name in SourceSettings.model_fields}, servers=1024)
    task = Task(settings.model_copy(update={"reward": alone}), tuple(prompts[:PROMPTS]))
    deadline_s = min(settings.reward.deadline_s, LONGEST_S)
    ours = source.is_function and source.named.startswith("rlhf.")
    outcomes = _outcomes(task, deadline_s) if ours else _asked_elsewhere(place, task, deadline_s)
    kind, value = outcomes[-1]
    if kind == "score":
        return f"a trial response {'beats another with probability' if source.compares else 'scores'} {value}"
    reasons = "; ".join(dict.fromkeys(reason for _, reason in outcomes))
    if any(kind == "invalid" for kind, _ in outcomes):
        return f"NO REWARD for a trial response to any of {len(outcomes)} prompts: {reasons}"
    raise PlanError(
        f"`{place}.path`: `{source.path}` could not judge a trial response (`{RESPONSES[0]}`) to any of {len(outcomes)} prompts: "
        f"{reasons}. Correct it; where a response has no reward, a function returns None"
    )


def _outcomes(task: Task, deadline_s: float) -> list[Told]:
    told: list[Any] = []
    asyncio.run(_judged(task, deadline_s, told.append))
    return told[1:]


async def _judged(task: Task, deadline_s: float, tell: Callable[[Told | None], None]) -> None:
    """Tell None as soon as the judge is ready, and then each outcome."""
    from rlhf.reward.judges.make import make_judge
    from rlhf.reward.judges.workplace import Workplace
    from rlhf.reward.scoring import outcome_of, probability_of

    source = task.settings.reward
    judge = await make_judge(source, task.settings, Workplace(inline=True), local=True)
    tell(None)
    texts, read = (RESPONSES, probability_of) if source.compares else (RESPONSES[:1], outcome_of)
    try:
        found: list[Told] = []
        while _goes_on(task, found):
            (value,) = await judge.judge(task.prompts[len(found)], [texts], deadline_s)
            found.append(_told(read(value)))
            tell(found[-1])
    finally:
        judge.close()


def _goes_on(task: Task, found: Sequence[Told]) -> bool:
    """Whether another prompt is tried: none has a score yet, and the last one did not take the whole deadline."""
    return len(found) < len(task.prompts) and (not found or found[-1][0] in ("invalid", "failed"))


def _told(outcome: Outcome | float) -> Told:
    if isinstance(outcome, Score | float):
        return "score", f"{outcome.value if isinstance(outcome, Score) else outcome:.4g}"
    if isinstance(outcome, TimedOut):
        return "late", f"no answer within {outcome.seconds:g} s (`reward.deadline_s`)"
    return "invalid" if isinstance(outcome, Invalid) else "failed", outcome.reason


def _asked_elsewhere(place: str, task: Task, deadline_s: float) -> list[Told]:
    """The outcomes, from a process of its own."""
    found: list[Told] = []
    with tempfile.TemporaryFile() as said:
        process, answers = _start(task, deadline_s, said)

        def answer(seconds: float, otherwise: str) -> Any:
            line = _line(answers, seconds)
            if line == "":
                otherwise = f"ended its process (status {process.wait()}) instead of judging a trial response{_last_words(said)}"
            if not line:
                raise PlanError(f"`{place}.path`: `{task.settings.reward.path}` {otherwise}. Correct it")
            told = json.loads(line)
            if "refused" in told:
                raise PlanError(told["refused"])
            return told["outcome"]

        try:
            answer(LOAD_S, f"was not ready within {LOAD_S:g} s; what it does at import takes too long, or never ends")
            while _goes_on(task, found):
                late = f"did not judge a trial response within {deadline_s:g} s (`reward.deadline_s`)"
                kind, words = answer(deadline_s + GRACE_S, late)
                found.append((kind, words))
        finally:
            _end(process)
            os.close(answers)
    return found


def _start(task: Task, deadline_s: float, said: Any) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and where its answers can be read. It finds modules where this process does."""
    answers, theirs = os.pipe()
    paths = os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(theirs), str(deadline_s)],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=said,
        pass_fds=[theirs],
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    )
    os.close(theirs)
    assert process.stdin is not None
    try:
        process.stdin.write(pickle.dumps(task))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended, and what follows says so
    return process, answers


def _line(answers: int, seconds: float) -> str | None:
    """The next line of the process; empty if it has ended, None if there is none in time."""
    end, read = time.monotonic() + seconds, b""
    while not read.endswith(b"\n"):
        ready, _, _ = select.select([answers], [], [], max(end - time.monotonic(), 0))
        if not ready:
            return None
        byte = os.read(answers, 1)
        if not byte:
            return ""
        read += byte
    return read.decode().rstrip("\n")


def _last_words(said: Any) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return f"; it said: {lines[-1][:200]}" if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main(answers: int, deadline_s: float) -> None:
    """The process: read the task from the parent, judge, tell."""
    task = pickle.loads(sys.stdin.buffer.read())  # of the parent's making

    def tell(**answer: Any) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    try:
        asyncio.run(_judged(task, deadline_s, lambda outcome: tell(outcome=outcome)))
    except UserError as error:
        tell(refused=str(error))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
