"""The judge of `kind: llm_judge`: a language model is asked which of two responses is better, A or B.

Owns the question and what its answer means: P(first beats second) = p(A) / (p(A) + p(B)), of the next token. That both orders are
asked is decided in `pairwise`. The model is a folder (`llm_judge_engine`) or behind an endpoint (`llm_judge_endpoint`).
"""

from __future__ import annotations

import asyncio
import bisect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.config import Settings
from rlhf.config.reward import SourceSettings
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.llm_judge_endpoint import Endpoint
from rlhf.reward.judges.llm_judge_engine import open_model, start_judge
from rlhf.reward.reading import transcript
from rlhf.types import Failed, Prompt, TimedOut

PLACES = ("{prompt}", "{a}", "{b}")

QUESTION = """Two assistants answered the same request. Decide which response is better: more helpful, correct, honest and clear. \
Neither its length nor its place says anything about a response.

[Request]
{prompt}

[Response A]
{a}

[Response B]
{b}

Which response is better? Answer with one letter, A or B."""


class Question:
    """The text that the model is asked, with places for prompt and responses."""

    def __init__(self, template: str):
        self._parts = re.split("(" + "|".join(map(re.escape, PLACES)) + ")", template)

    @classmethod
    def read(cls, path: str | None) -> Question:
        """The question in a file, or the built-in one.

        Raises:
            RewardError: no such file, or it has no place for the prompt or a response.
        """
        if path is None:
            return cls(QUESTION)
        try:
            template = Path(path).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(f"`reward.judge_prompt`: {path} cannot be read as text: {error}") from None
        question = cls(template)
        missing = [place for place in PLACES if place not in question._parts]
        if missing:
            raise RewardError(
                f"`reward.judge_prompt`: {path} has no {missing[0]}. Write {', '.join(PLACES)} where the prompt and the two responses "
                "belong"
            )
        return question

    def about(self, prompt: str, a: str, b: str) -> str:
        """The question about two responses. What looks like a place inside them stays as it is."""
        texts = dict(zip(PLACES, (prompt, a, b), strict=True))
        return "".join(texts.get(part, part) for part in self._parts)

    def cut(self, prompt: str, a: str, b: str, fits: Callable[[str], bool]) -> str:
        """The question about the longest end of the prompt with which it fits; about no prompt, if even that does not fit."""
        whole = self.about(prompt, a, b)
        if fits(whole):
            return whole
        lost = bisect.bisect_left(range(len(prompt)), True, key=lambda place: fits(self.about(prompt[place:], a, b)))
        return self.about(prompt[lost:], a, b)


class Answerer(Protocol):
    """Whoever answers the question."""

    async def first_wins(self, question: str, deadline_s: float) -> float | Failed | TimedOut:
        """Probability of A against B."""
        ...

    def fits(self, question: str) -> bool:
        """Whether the question is not too long to be asked, as far as that is known."""
        ...

    def fingerprint(self) -> str | None: ...

    def close(self) -> None: ...


class LlmJudge:
    """A raw value is the probability that the first response beats the second."""

    def __init__(self, question: Question, answerer: Answerer):
        self._question, self._answerer = question, answerer

    async def judge(self, prompt: Prompt, items: Sequence[tuple[str, ...]], deadline_s: float) -> list[Any]:
        asked, fits = transcript(prompt.conversation), self._answerer.fits
        questions = [self._question.cut(asked, a, b, fits) for a, b in items]
        return await asyncio.gather(*(self._answerer.first_wins(question, deadline_s) for question in questions))

    def fingerprint(self) -> str | None:
        return self._answerer.fingerprint()

    def close(self) -> None:
        """End the model's process, if it has one here."""
        self._answerer.close()


def check_llm_judge(source: SourceSettings) -> None:
    """Read the question, and the model's configuration and tokenizer where it has a folder.

    Raises:
        RewardError: one of them cannot be used.
    """
    question = Question.read(source.judge_prompt)
    if source.url is None:
        open_model(source.named, question.about("", "", ""), weights=False)


async def make_llm_judge(source: SourceSettings, settings: Settings, local: bool) -> LlmJudge:
    """The judge, ready.

    Raises:
        RewardError: the question, the model or the endpoint cannot be used.
    """
    question = Question.read(source.judge_prompt)
    if source.url is not None:
        return LlmJudge(question, await Endpoint.start(source))
    opened = open_model(source.named, question.about("", "", ""))
    return LlmJudge(question, await start_judge(opened, settings, local))
