"""A language model behind an OpenAI-compatible endpoint (vLLM's server, among others) answers A or B.

Owns the request and the reading of the reply. The key is read from the environment and shown nowhere. Talks to: `asking`.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from rlhf.config.reward import SourceSettings
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.asking import Asker
from rlhf.types import Failed, TimedOut

KEY = "OPENAI_API_KEY"
AT_ONCE = 32
"""Requests under way. An endpoint queues the others anyway, and refuses some of them if there are too many."""

TOP = 20
"""The most likely tokens to be told: the most that OpenAI and vLLM allow."""

START_S = 60.0
"""How long the endpoint may take to answer at the start, in seconds; it may be loading the model."""


class Endpoint:
    """Answers with the probability of the letters, or, where an endpoint tells no log-probs, 0 or 1 by the letter itself."""

    def __init__(self, asker: Asker, model: str, with_logprobs: bool = True):
        self._asker, self._model, self._with_logprobs = asker, model, with_logprobs
        self._free = asyncio.Semaphore(AT_ONCE)

    @classmethod
    async def start(cls, source: SourceSettings) -> Endpoint:
        """Ask it something. One that refuses to tell log-probs is asked without.

        Raises:
            RewardError: it does not answer, does not know the model, or refuses the key.
        """
        assert source.url is not None and source.path is not None, "refused when the configuration is loaded"
        asker = Asker(source.url, os.environ.get(KEY) or None)
        for with_logprobs in (True, False):
            endpoint = cls(asker, source.path, with_logprobs)
            reply = await endpoint._ask("Answer with one letter: A", START_S)
            if not (with_logprobs and isinstance(reply, Failed) and "logprobs" in reply.reason):
                break
        if isinstance(reply, Failed | TimedOut):
            why = reply.reason if isinstance(reply, Failed) else f"no answer within {reply.seconds:g} s"
            raise RewardError(
                f"`reward.url`: {why}. Give the base address of an OpenAI-compatible endpoint (with /v1), in `reward.path` the name that "
                f"it knows the model by, and the key, if it wants one, in the environment variable {KEY}"
            )
        return endpoint

    async def first_wins(self, question: str, deadline_s: float) -> float | Failed | TimedOut:
        clock = asyncio.get_running_loop().time
        end = clock() + deadline_s
        try:
            await asyncio.wait_for(self._free.acquire(), deadline_s)
        except TimeoutError:
            return TimedOut(deadline_s)
        try:
            reply = await self._ask(question, max(end - clock(), 0.0))
        finally:
            self._free.release()
        return reply if isinstance(reply, Failed | TimedOut) else read_choice(reply)

    def fits(self, question: str) -> bool:
        """Its tokens are not known here. What is too long for it, the endpoint refuses in its own words."""
        return True

    def fingerprint(self) -> None:
        return None

    def close(self) -> None:
        """The connections end with the process, or when they have been idle for a while."""

    async def _ask(self, question: str, deadline_s: float) -> Mapping[str, Any] | Failed | TimedOut:
        """The reply's first choice."""
        request: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 1,
            "temperature": 0,
        }
        if self._with_logprobs:
            request |= {"logprobs": True, "top_logprobs": TOP}
        reply = await self._asker.ask("POST", "/chat/completions", request, deadline_s)
        if isinstance(reply, Failed | TimedOut):
            return reply
        try:
            return dict(reply.json()["choices"][0])
        except (ValueError, KeyError, IndexError, TypeError):
            return Failed(f"{self._asker.url}: this is no chat completion: {reply.text:.200}")


def read_choice(choice: Mapping[str, Any]) -> float | Failed:
    """Probability of A against B, from the first choice of a chat completion.

    With log-probs: the tokens that are A or B but for blanks around them, among those told. Without: the letter that was written.
    """
    try:
        content = (choice.get("logprobs") or {}).get("content") or []
        if not content:
            return _by_letter(choice["message"]["content"])
        shares = {"A": 0.0, "B": 0.0}
        for told in content[0]["top_logprobs"]:
            if told["token"].strip() in shares:
                shares[told["token"].strip()] += math.exp(told["logprob"])
    except (KeyError, TypeError, AttributeError) as error:
        return Failed(f"the endpoint's reply is not a chat completion with a message ({type(error).__name__}: {error})")
    total = sum(shares.values())
    if total == 0.0:
        return Failed(f"neither A nor B is among the {len(content[0]['top_logprobs'])} likeliest answers of the judge")
    return shares["A"] / total


def _by_letter(written: str) -> float | Failed:
    letter = re.fullmatch(r"[\W_]*([AB])[\W_]*", written)
    if letter is None:
        return Failed(f"the judge answered `{written:.20}`, neither A nor B")
    return float(letter[1] == "A")
