"""Spans: who wrote which tokens of a response, and what the driver and the record are told of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.types import DATASET_VERSION, Assignment, Completion, Prompt, Rollout, Span, TrainingItem

SPANS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(DATASET_VERSION, 3), st.booleans(), st.booleans()), max_size=5
)


def spans_of(parts: list[tuple[int, int, bool, bool]]) -> tuple[Span, ...]:
    """One after the other, from their lengths."""
    ends = np.cumsum([0, *(part[0] for part in parts)]).tolist()
    return tuple(Span(start, stop, *part[1:]) for start, stop, part in zip(ends, ends[1:], parts, strict=False))


def written(spans: tuple[Span, ...], n: int | None = None) -> Completion:
    n = (spans[-1].stop if spans else 0) if n is None else n
    return Completion("p", np.arange(n, dtype=np.int32), -np.arange(n, dtype=np.float32), spans, "stop")


@given(parts=SPANS)
def test_spans_cover_each_token_once_and_say_what_each_is(parts: list[tuple[int, int, bool, bool]]) -> None:
    spans = spans_of(parts)
    answer = written(spans)
    learned = [place for span in spans if span.learned for place in range(span.start, span.stop)]
    assert np.flatnonzero(answer.per_token([span.learned for span in spans])).tolist() == learned
    info = answer.info()
    assert info.n_tokens == len(answer.token_ids) == sum(part[0] for part in parts)
    assert info.n_learned == len(learned)
    assert info.versions == tuple(sorted({version for _, version, _, _ in parts if version >= 0}))
    assert info.weight_version == (info.versions[0] if info.versions else DATASET_VERSION)
    assert info.mean_logprob == pytest.approx(-sum(learned) / len(learned) if learned else 0.0)


@given(parts=SPANS, change=st.sampled_from(["more tokens", "fewer tokens", "a gap", "twice", "another order"]))
def test_spans_that_do_not_cover_the_tokens_are_refused(parts: list[tuple[int, int, bool, bool]], change: str) -> None:
    spans = (Span(0, 2, 1), *(Span(one.start + 2, one.stop + 2, one.version) for one in spans_of(parts)))
    n = spans[-1].stop
    wrong = {
        "more tokens": (spans, n + 1),
        "fewer tokens": (spans, n - 1),
        "a gap": ((*spans, Span(n + 1, n + 2, 1)), n + 2),
        "twice": ((*spans, spans[-1]), n),
        "another order": ((Span(2, 4, 1), Span(0, 2, 1)), 4),
    }
    with pytest.raises(ValueError, match="must cover each token once, in order"):
        written(*wrong[change])


@pytest.mark.parametrize(("start", "stop", "version"), [(2, 2, 0), (3, 1, 0), (-1, 1, 0), (0, 1, -2)])
def test_no_span_is_empty_or_of_weights_that_never_were(start: int, stop: int, version: int) -> None:
    with pytest.raises(ValueError, match="a span"):
        Span(start, stop, version)


def test_a_response_of_one_version_has_one_span_and_an_empty_one_has_none() -> None:
    nan = np.full(3, np.nan, np.float32)
    pair = Completion.of_one_version("p", np.zeros(3, np.int32), nan, DATASET_VERSION, "stop", by_policy=False)
    assert pair.spans == (Span(0, 3, DATASET_VERSION, by_policy=False, learned=True),)
    assert (pair.info().versions, math.isnan(pair.info().mean_logprob)) == ((), True)
    empty = Completion.of_one_version("p", np.zeros(0, np.int32), np.zeros(0, np.float32), 4, "stop")
    assert (empty.spans, empty.info().n_tokens, empty.info().weight_version) == ((), 0, DATASET_VERSION)


def test_what_is_only_read_costs_a_forward_pass_and_counts_in_no_mean() -> None:
    answers = [
        written((Span(0, 2, 3), Span(2, 7, DATASET_VERSION, False, learned=False), Span(7, 8, 4))),
        written((Span(0, 4, DATASET_VERSION, False, learned=False),)),
        written((Span(0, 5, 4),)),
    ]
    rollout = Rollout(Prompt("p", (1, 2), ""), tuple(answer.info() for answer in answers), None)
    items = (TrainingItem((0,), (1.0,)), TrainingItem((1,), (1.0,)), TrainingItem((2,), (1.0,), weight=0.0))
    assigned = Assignment(rollout, items)
    assert assigned.members() == (0, 1, 2)
    assert (assigned.n_tokens(), assigned.response_tokens()) == (19, 17)
    assert (assigned.learned(), assigned.learned_tokens()) == ((0,), 3)
    assert rollout.infos[0].versions == (3, 4)
