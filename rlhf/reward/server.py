"""One reward server: judges responses with a model or a user's function, in batches and within the deadline.

A plain class; in Ray it is an async actor, in debug mode an object in the driver's process. The work runs in a thread
(so that the actor keeps answering) or inline (so that a breakpoint works). Talks to: judges, scoring, pairwise. Not to other
servers.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from rlhf.config import Settings
from rlhf.data.assets import resolve
from rlhf.reward import pairwise
from rlhf.reward.judges import Judge, Workplace, make_judge
from rlhf.reward.scoring import outcome_of
from rlhf.types import Completion, Failed, Feedback, Prompt, TimedOut


@dataclass(frozen=True)
class ServerInfo:
    """A server that is ready.

    Attributes:
        fingerprint: hash of the reward model's weights; None for a function.
    """

    host: str
    pid: int
    fingerprint: str | None


class RewardServer:
    """Answers `judge` with one outcome per completion, and never with an exception for a reward that failed."""

    def __init__(self, settings: Settings, index: int, local: bool):
        """Quick: the model is loaded by `ready`, whose errors the caller sees."""
        self._settings, self._index, self._local = settings, index, local
        self._workplace = Workplace(inline=local)
        self._judge: Judge | None = None
        self._tokenizer: Any = None

    async def ready(self) -> ServerInfo:
        """Load everything; answer when requests can be served.

        Raises:
            RewardError: the function or the model cannot be used.
        """
        from transformers import AutoTokenizer

        self._judge = make_judge(self._settings.reward, self._settings, self._workplace, self._local)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve(self._settings.policy.model))
        return ServerInfo(socket.gethostname(), os.getpid(), self._judge.fingerprint())

    async def judge(self, prompt: Prompt, completions: list[Completion]) -> Feedback:
        """One outcome per completion, in order; from a pairwise judge, also the preference matrix."""
        responses = [self._tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True) for c in completions]
        if self._settings.reward.compares:
            return await self._compare(prompt, completions, responses)
        reward = self._settings.reward
        values = await self._judge.judge(prompt, [(response,) for response in responses], reward.deadline_s)
        outcomes = (
            value
            if isinstance(value, (Failed, TimedOut))
            else outcome_of(value, completion.finish_reason, reward.missing_eos_penalty)
            for value, completion in zip(values, completions, strict=True)
        )
        return Feedback(prompt.id, tuple(outcomes))

    async def _compare(self, prompt: Prompt, completions: list[Completion], responses: list[str]) -> Feedback:
        digests = [completion.info().digest for completion in completions]
        asked = pairwise.orders(digests)
        items = [(responses[i], responses[j]) for i, j in asked]
        answers = await self._judge.judge(prompt, items, self._settings.reward.deadline_s)
        return pairwise.feedback(prompt.id, digests, dict(zip(asked, answers, strict=True)))

    async def fingerprint(self) -> str | None:
        """Hash of the reward model's weights now; None for a function."""
        return self._judge.fingerprint()

    def close(self) -> None:
        """Let the worker thread go."""
        self._workplace.close()
