"""One reward server: judges responses with a model or a user's function, in batches and within the deadline.

A plain class; in Ray it is an async actor, in debug mode an object in the driver's process. The work runs in a thread
(so that the actor keeps answering) or inline (so that a breakpoint works). Talks to: judges, scoring, pairwise. Not to other
servers.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config import Settings
from rlhf.data.model_folder import find_model, read_tokenizer
from rlhf.reward import pairwise
from rlhf.reward.judges.judge import Judge
from rlhf.reward.judges.make import make_judge
from rlhf.reward.judges.wire import TOKEN
from rlhf.reward.judges.workplace import Workplace
from rlhf.reward.scoring import Measured, outcome_of
from rlhf.types import Completion, Failed, Feedback, Prompt, TimedOut, content_id

SECRETS = (TOKEN, "OPENAI_API_KEY")
"""Environment variables of the driver that a server needs to ask others."""


@dataclass(frozen=True)
class ServerInfo:
    """A server that is ready.

    Attributes:
        fingerprint: hash of the reward model's weights; None for a function.
    """

    host: str
    pid: int
    fingerprint: str | None


@dataclass(frozen=True)
class Health:
    """What a server has done so far.

    Attributes:
        judged: responses.
        broken: how many of them failed or timed out.
    """

    judged: int
    broken: int


def secrets() -> dict[str, str]:
    """Those of `SECRETS` that are set in this process."""
    return {name: os.environ[name] for name in SECRETS if name in os.environ}


class RewardServer:
    """Answers `judge` with one outcome per completion, and never with an exception for a reward that failed."""

    def __init__(
        self,
        settings: Settings,
        index: int,
        local: bool,
        service: bool = False,
        secrets: Mapping[str, str] | None = None,
    ):
        """Quick: the model is loaded by `ready`, whose errors the caller sees.

        Args:
            local: in the driver's process.
            service: only texts are judged, so no tokenizer is needed, and the work runs in a thread in any case.
            secrets: as `secrets()` gives them to the driver; not in the
                actor's environment, which Ray shows to everybody.
        """
        self._settings, self._index, self._service = settings, index, service
        os.environ.update(secrets or {})
        self._alone = not local or service  # in this process, but for other servers
        self._workplace = Workplace(inline=not self._alone)
        self._judge: Judge | None = None
        self._tokenizer: Any = None
        self._judged = self._broken = 0

    async def ready(self) -> ServerInfo:
        """Load everything; answer when requests can be served.

        Raises:
            RewardError: the function or the model cannot be used.
        """
        self._judge = await make_judge(self._settings.reward, self._settings, self._workplace, local=not self._alone)
        if not self._service:
            folder = find_model(self._settings.policy.model, "`policy.model`", weights=False)
            self._tokenizer = read_tokenizer(folder, "`policy.model`")
        if self._alone:
            freeze_heap()
        return ServerInfo(socket.gethostname(), os.getpid(), self._judge.fingerprint())

    async def judge(self, prompt: Prompt, completions: list[Completion]) -> Feedback:
        """One outcome per completion, in order; from a pairwise judge, also the preference matrix."""
        responses = [self._tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True) for c in completions]
        return await self._feedback(prompt, responses, [completion.info().digest for completion in completions])

    async def judge_texts(self, prompt: Prompt, responses: Sequence[str]) -> Feedback:
        """The same for responses as text; of the prompt, `text` and `payload` are read."""
        return await self._feedback(prompt, responses, [content_id(response) for response in responses])

    async def _feedback(self, prompt: Prompt, responses: Sequence[str], digests: Sequence[str]) -> Feedback:
        """
        Args:
            digests: equal for responses that are the same one, and need not be compared.
        """
        compares, deadline = self._settings.reward.compares, self._settings.reward.deadline_s
        asked: list[Any] = pairwise.orders(digests) if compares else [(i,) for i in range(len(responses))]
        assert self._judge is not None, "`ready` comes first"
        answers = await self._judge.judge(prompt, [tuple(responses[i] for i in item) for item in asked], deadline)
        values, measures = _unpacked(answers)
        if compares:
            feedback = pairwise.feedback(prompt.id, digests, dict(zip(asked, values, strict=True)))
        else:
            feedback = Feedback(prompt.id, tuple(outcome_of(value) for value in values))
        self._judged += len(responses)
        self._broken += sum(isinstance(outcome, Failed | TimedOut) for outcome in feedback.outcomes)
        # What the judge itself has measured goes before what its answers show: a service has averaged both orders already.
        return Feedback(feedback.prompt_id, feedback.outcomes, feedback.preferences, {**feedback.measures, **measures})

    async def fingerprint(self) -> str | None:
        """Hash of the reward model's weights now; None for a function."""
        assert self._judge is not None, "`ready` comes first"
        return self._judge.fingerprint()

    async def offload(self) -> None:
        """Move the weights of reward models to host memory. Until `reload`, what is to be judged by one fails."""
        await self._workplace.offload()

    async def reload(self) -> None:
        """Undo `offload`."""
        await self._workplace.reload()

    async def health(self) -> Health:
        """Answers as long as the server takes requests."""
        return Health(self._judged, self._broken)

    def close(self) -> None:
        """Let the judge and the worker thread go."""
        if self._judge is not None:
            self._judge.close()
        self._workplace.close()


def freeze_heap() -> None:
    """Take all that has been loaded from the garbage collector, which would stop a service for a tenth of a second to look through it."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries look for leaks at the end


def _unpacked(answers: Sequence[Any]) -> tuple[list[Any], dict[str, tuple[float, ...]]]:
    """Bare values, and what was measured on the way to them."""
    measures: dict[str, list[float]] = {}
    for answer in answers:
        for name, number in answer.measures.items() if isinstance(answer, Measured) else ():
            measures.setdefault(name, []).append(number)
    values = [answer.value if isinstance(answer, Measured) else answer for answer in answers]
    return values, {name: tuple(numbers) for name, numbers in measures.items()}
