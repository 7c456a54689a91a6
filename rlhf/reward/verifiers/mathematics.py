"""`math`: is the response's answer mathematically equal to the right one? By the package math-verify.

Deviations from its defaults: its own time-outs are off, since the worker has a hard one; an error while comparing is an error
(it would be "not equal").
"""

from __future__ import annotations

import logging
import math

from math_verify import parse, verify
from pydantic import Field, field_validator

from rlhf.reward.verifiers.verifier import Payload, PayloadError, Verifier

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time-outs that are off


class MathFields(Payload):
    answer: str | int | float = Field(
        description="The right answer: a number, or an expression, set, interval, equation or matrix in LaTeX, with or without "
        "dollar signs."
    )

    @field_validator("answer")
    @classmethod
    def _says_something(cls, answer: str | int | float) -> str | int | float:
        if isinstance(answer, str) and not answer.strip():
            raise ValueError("empty")
        if isinstance(answer, bool) or (isinstance(answer, float) and not math.isfinite(answer)):
            raise ValueError(f"{answer} is not a number")
        return answer


class MathVerifier(Verifier[MathFields]):
    """1 if the answer that math-verify finds in the response equals the right one, else 0; 0 too if it finds none.

    It takes what is in a box (\\boxed{...}), else the last formula or number, with a preference for "the answer is ...".
    """

    fields = MathFields

    def score(self, prompt: str, response: str, fields: MathFields) -> float:
        text = str(fields.answer).strip()
        delimited = "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text
        right = parse(text if delimited else f"${text}$", parsing_timeout=None)
        if not right:
            raise PayloadError(f"field `answer`: math-verify finds no expression in `{text:.60}`")
        found = parse(response, parsing_timeout=None)
        return float(bool(found) and verify(right, found, timeout_seconds=None, raise_on_error=True))
