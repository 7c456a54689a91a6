"""Routing: always a least-loaded engine, and no load is lost or left over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rollout.router import Router

steps = st.lists(st.tuples(st.booleans(), st.integers(1, 1000)), max_size=200)


@given(st.integers(1, 6), steps)
def test_every_request_goes_to_a_least_loaded_engine(engines: int, plan: list[tuple[bool, int]]) -> None:
    router = Router(engines)
    running: list[tuple[int, int]] = []
    for finish_one, tokens in plan:
        if finish_one and running:
            router.release(*running.pop(tokens % len(running)))
            continue
        before = router.loads()
        engine = router.acquire(tokens)
        assert before[engine] == min(before.values())
        running.append((engine, tokens))
        assert sum(router.loads().values()) == sum(load for _, load in running)
    for engine, tokens in running:
        router.release(engine, tokens)
    assert set(router.loads().values()) == {0}


@given(st.integers(2, 5), steps)
def test_a_removed_engine_gets_nothing_more(engines: int, plan: list[tuple[bool, int]]) -> None:
    router = Router(engines)
    first = router.acquire(10)
    router.remove(first)
    for _, tokens in plan:
        assert router.acquire(tokens) != first
    router.release(first, 10)
    assert first not in router.loads()


def test_equal_requests_spread_evenly() -> None:
    router = Router(3)
    assert [router.acquire(100) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_no_engine_left() -> None:
    router = Router(1)
    router.remove(0)
    with pytest.raises(LookupError):
        router.acquire(1)
