"""A judge that is a service elsewhere: what `rlhf reward serve` runs, asked over HTTP.

Owns what is asked (one request for all responses to a prompt; `asking` repeats it where the service is busy) and the attestation that
the service still judges with what it judged with at the start. What it judges with is its own choice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.config.reward import SourceSettings
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.asking import Asker
from rlhf.reward.judges.judge import Texts
from rlhf.reward.judges.wire import TOKEN, feedback_from_json, prompt_to_json
from rlhf.reward.scoring import Measured
from rlhf.types import Failed, Feedback, Prompt, Score, TimedOut

if TYPE_CHECKING:
    import httpx

START_S = 20.0
"""How long the service may take to answer at the start, in seconds."""


@dataclass(frozen=True)
class Info:
    """What a service says of itself.

    Attributes:
        kind: of its judge.
        compares: two responses are compared; otherwise each is scored.
        fingerprint: hash of what it judges with; None where there is none.
    """

    kind: str
    compares: bool
    fingerprint: str | None


class RemoteJudge:
    """Asks a service. Made by `start`."""

    def __init__(self, asker: Asker, info: Info):
        self._asker, self._url, self._info = asker, asker.url, info

    @classmethod
    async def start(cls, source: SourceSettings) -> RemoteJudge:
        """Ask the service what it is.

        Raises:
            RewardError: no such service, another kind of judge, or no valid token.
        """
        token = os.environ.get(TOKEN)
        if not token:
            raise RewardError(
                f"the reward service at {source.url} wants a token. Set the environment variable {TOKEN} to the one that "
                "`rlhf reward serve` was started with, or that it printed"
            )
        assert source.url is not None, "refused when the configuration is loaded"
        asker = Asker(source.url, token)
        reply = await asker.ask("GET", "/info", None, START_S)
        if isinstance(reply, Failed | TimedOut):
            why = reply.reason if isinstance(reply, Failed) else f"no answer within {reply.seconds:g} s"
            raise RewardError(
                f"`reward.url`: {why}. Start the service with `rlhf reward serve`, or correct the address or {TOKEN}"
            )
        info = _info(asker.url, reply)
        if info.compares != source.compares:
            there = "compares two responses" if info.compares else "scores one response"
            wanted = "pairwise_remote" if info.compares else "remote"
            raise RewardError(
                f"the reward service at {asker.url} {there} (its kind is {info.kind}). Set `reward.kind: {wanted}`, or name another"
            )
        return cls(asker, info)

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        """Scores; or, for pairs, P(first beats second) with both orders already averaged by the service."""
        responses = list(dict.fromkeys(text for texts in items for text in texts))
        question = {**prompt_to_json(prompt), "payload": dict(prompt.payload), "responses": responses}
        reply = await self._asker.ask("POST", "/judge", question, deadline_s)
        if isinstance(reply, Failed | TimedOut):
            return [reply] * len(items)
        try:
            feedback = self._attested(prompt, reply, len(responses))
            if isinstance(feedback, Failed):
                return [feedback] * len(items)
            place = {text: index for index, text in enumerate(responses)}
            measures = {name: _mean(values) for name, values in feedback.measures.items()}
            return [_value(feedback, [place[text] for text in texts], measures) for texts in items]
        except (
            ValueError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:  # not what was agreed upon
            return [Failed(f"{self._url}: the answer is not one of a reward service: {error}")] * len(items)

    def fingerprint(self) -> str | None:
        """That of the service at the start; it is compared with each answer's."""
        return self._info.fingerprint

    def close(self) -> None:
        """The connections end with the process, or when they have been idle for a while."""

    def _attested(self, prompt: Prompt, reply: httpx.Response, responses: int) -> Feedback | Failed:
        body = reply.json()
        feedback = feedback_from_json(prompt.id, body, responses)
        if body.get("fingerprint") != self._info.fingerprint:
            return Failed(
                f"{self._url} judges with {body.get('fingerprint')}, and judged with {self._info.fingerprint} at the start: somebody "
                "has changed the service"
            )
        return feedback


def _info(url: str, reply: httpx.Response) -> Info:
    try:
        body = reply.json()
        return Info(str(body["kind"]), bool(body["compares"]), body["fingerprint"])
    except (ValueError, KeyError, TypeError):
        raise RewardError(f"`reward.url`: what answers at {url} is not a reward service: {reply.text:.200}") from None


def _value(feedback: Feedback, places: Sequence[int], measures: dict[str, float]) -> Any:
    """The raw value of one item: a response, or two that were compared."""
    if len(places) == 1:
        outcome = feedback.outcomes[places[0]]
        return Measured(outcome.value, measures) if isinstance(outcome, Score) else outcome
    if feedback.preferences is None:
        raise ValueError("the answer has no preferences")
    value = float(feedback.preferences[places[0], places[1]])
    if not np.isnan(value):
        return Measured(value, measures)
    unjudged = (feedback.outcomes[i] for i in places if not isinstance(feedback.outcomes[i], Score))
    return next(unjudged, Failed("the service has no verdict on these two"))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
