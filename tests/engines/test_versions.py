"""What vLLM says about the weights that wrote a response, as spans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.engines.engine import read_responses
from rlhf.types import Span


def output(n: int, versions: list[tuple[str, int, int]] | None) -> Any:
    """vLLM's `RequestOutput` of one response of n tokens."""
    spans = None if versions is None else [SimpleNamespace(version=v, start=s, end=e) for v, s, e in versions]
    one = SimpleNamespace(
        token_ids=list(range(n)),
        logprobs=SimpleNamespace(logprobs=[-1.0] * n),
        finish_reason="stop",
        weight_versions=spans,
    )
    return SimpleNamespace(outputs=[one])


@pytest.mark.parametrize(
    ("versions", "spans"),
    [
        ([("3", 0, 5)], (Span(0, 5, 3),)),
        ([("3", 0, 2), ("4", 2, 5)], (Span(0, 2, 3), Span(2, 5, 4))),
        (None, ()),
        ([], ()),
    ],
)
def test_spans_are_vllms_own(versions: Any, spans: tuple[Span, ...]) -> None:
    (answer,) = read_responses(output(5, versions))
    assert answer.spans == spans
