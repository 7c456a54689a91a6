"""`reasoning_gym`: the scorers of the package reasoning-gym, for the tasks that it makes.

Some of them evaluate answers as Python. Here they do not (`expressions`); and each verdict is made in a process of its own, shut off
(`worker`, `workers`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import Field, field_validator
from reasoning_gym.factory import DATASETS, get_score_answer_fn
from reasoning_gym.utils import extract_answer

from rlhf.reward.verifiers.expressions import seal
from rlhf.reward.verifiers.verifier import Payload, Verifier

seal("reasoning_gym")

BOARDS = ("arc_agi", "rearc")
"""Their scorers compare with tuples, of which JSON has made lists: right answers would get 0.05."""


class ReasoningGymFields(Payload):
    dataset: str = Field(description="Name of the reasoning-gym data set that made the task, such as `chain_sum`.")
    entry: dict[str, Any] = Field(description="The task as the data set made it: `question`, `answer` and `metadata`.")

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"reasoning-gym has no data set `{name}`")
        if name == "composite":
            raise ValueError(
                "a composite data set scores nothing itself; name the task's own, its metadata's `source_dataset`"
            )
        return name

    @field_validator("entry")
    @classmethod
    def _whole(cls, entry: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in ("question", "answer", "metadata") if name not in entry]
        if missing:
            raise ValueError(f"has no `{missing[0]}`")
        return entry


@cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    return get_score_answer_fn(dataset)


class ReasoningGymVerifier(Verifier[ReasoningGymFields]):
    """The scorer's own number, from 0 to 1. It is given what stands between <answer> and </answer> (the last ones), or the whole
    response if there are none."""

    fields = ReasoningGymFields

    def score(self, prompt: str, response: str, fields: ReasoningGymFields) -> float:
        answer, entry = extract_answer(response), fields.entry
        if fields.dataset in BOARDS:
            board = tuple(map(tuple, entry["metadata"]["output"]))
            entry = entry | {"metadata": entry["metadata"] | {"output": board}}
        return _scorer(fields.dataset)(response.strip() if answer is None else answer, entry)
