"""Busy and idle time, from intervals that overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.tracking.spans import Timing, busy_s, idle_share

INTERVALS = st.lists(st.tuples(st.integers(-5, 25), st.integers(0, 10)).map(lambda pair: (pair[0], sum(pair))))
"""Of whole seconds, some of them empty, some of them outside of 0 to 20."""


@pytest.mark.parametrize(
    ("intervals", "busy"),
    [
        ([], 0),
        ([(2, 5)], 3),
        ([(2, 5), (4, 6)], 4),
        ([(2, 9), (3, 4)], 7),
        ([(6, 8), (2, 3)], 3),
        ([(-5, 1), (9, 30)], 2),
        ([(-5, 30)], 10),
        ([(-5, 0), (10, 11)], 0),
    ],
)
def test_what_overlaps_counts_once_and_what_lies_outside_does_not(
    intervals: list[tuple[float, float]], busy: float
) -> None:
    assert busy_s(intervals, 0, 10) == busy


@given(INTERVALS)
def test_busy_time_is_the_number_of_seconds_that_some_interval_covers(intervals: list[tuple[int, int]]) -> None:
    covered = {second for begin, end in intervals for second in range(begin, end)}
    assert busy_s(intervals, 0, 20) == len(covered & set(range(20)))


@given(INTERVALS, st.integers(0, 20))
def test_a_window_may_be_divided_anywhere(intervals: list[tuple[int, int]], middle: int) -> None:
    assert busy_s(intervals, 0, middle) + busy_s(intervals, middle, 20) == busy_s(intervals, 0, 20)


def test_idle_time_is_a_mean_over_actors_those_without_work_included() -> None:
    actors = {"engine-0": [(0.0, 10.0)], "engine-1": [(0.0, 2.0), (1.0, 5.0)]}
    assert idle_share(actors, 2, 0, 10) == pytest.approx(0.25)
    assert idle_share(actors, 4, 0, 10) == pytest.approx(0.625)
    assert idle_share({}, 1, 0, 10) == 1
    assert idle_share(actors, 1, 0, 10) == 0, "an engine that died in between worked too"
    assert idle_share(actors, 2, 5, 5) == 0, "a window without time"


def test_a_line_has_the_facts_beside_the_times() -> None:
    line = Timing("engine-3", "sample", 1.00000049, 2.5, 7, {"tokens": [3, 4]}).line()
    assert line == {"step": 7, "who": "engine-3", "what": "sample", "start": 1.0, "stop": 2.5, "tokens": [3, 4]}
