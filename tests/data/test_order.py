"""The order of draws: of one set pass by pass, of a mixture by its weights; a pure function of sizes, weights and seed."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.order import Order, Share, interleaved, turns

shares = st.lists(st.builds(Share, st.integers(1, 9), st.floats(0.01, 10)), min_size=1, max_size=5)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 300))
def test_every_source_has_its_share_after_every_draw(weights: list[float], draws: int) -> None:
    """Webster's rule is off by at most 1/2 + m/2 times the share; for two sources by one draw."""
    counts = Counter(islice(turns(weights), draws))
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[source] - share * draws) <= 0.5 + share * len(weights) / 2 + 1e-6


@given(shares, st.integers(0, 9), st.booleans(), st.integers(1, 5))
def test_each_pass_over_a_source_has_every_item_once(
    mixture: list[Share], seed: int, shuffle: bool, passes: int
) -> None:
    size = sum(share.size for share in mixture)
    order = Order(size, seed, shuffle, mixture)
    starts = [sum(share.size for share in mixture[:i]) for i in range(len(mixture))]
    drawn: list[list[int]] = [[] for _ in mixture]
    for item in (order.at(place) for place in range(passes * size)):
        source = max(i for i, start in enumerate(starts) if item >= start)
        drawn[source].append(item - starts[source])
    for share, items in zip(mixture, drawn, strict=True):
        for begin in range(0, len(items), share.size):
            one = items[begin : begin + share.size]
            assert len(set(one)) == len(one) and (len(one) < share.size or sorted(one) == list(range(share.size)))
            assert shuffle or one == list(range(len(one)))


@given(shares, st.integers(0, 9), st.lists(st.integers(0, 60), max_size=8))
def test_a_place_has_one_item_in_whatever_order_they_are_asked_for(
    mixture: list[Share], seed: int, places: list[int]
) -> None:
    """So that a resumed run draws what the uninterrupted one would have drawn."""
    size = sum(share.size for share in mixture)
    order, walk = Order(size, seed, True, mixture), Order(size, seed, True, mixture)
    expected = [walk.at(place) for place in range(61)]
    assert [order.at(place) for place in places] == [expected[place] for place in places]


def test_one_set_is_drawn_as_it_always_was() -> None:
    """A run that an earlier version began goes on in the same order."""
    order = Order(7, 3, True)
    for number in range(3):
        expected = list(range(7))
        random.Random(f"3/{number}").shuffle(expected)
        assert [order.at(7 * number + place) for place in range(7)] == expected
    assert [Order(3, 3, False).at(place) for place in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_sources_and_seeds_have_orders_of_their_own() -> None:
    mixture = [Share(50, 1.0), Share(50, 1.0)]
    draws = [Order(100, 0, True, mixture).at(place) for place in range(100)]
    first, second = ([item % 50 for item in draws if item // 50 == source] for source in (0, 1))
    assert first != second
    assert draws != [Order(100, 1, True, mixture).at(place) for place in range(100)]


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=9), min_size=1, max_size=5))
def test_interleaved_has_all_in_their_order_and_of_each_in_proportion(parts: list[list[int]]) -> None:
    named = [[(source, place) for place in range(len(part))] for source, part in enumerate(parts)]
    mixed = interleaved(named)
    assert sorted(mixed) == [item for part in named for item in part]
    assert all([item for item in mixed if item[0] == source] == part for source, part in enumerate(named))
    for source, part in enumerate(parts):
        half = sum(item[0] == source for item in mixed[: len(mixed) // 2])
        assert half == pytest.approx(len(part) / 2, abs=1 + len(parts) / 2)


def test_shares_of_a_step_by_hand() -> None:
    assert list(islice(turns([3.0, 1.0]), 8)) == [0, 0, 1, 0, 0, 0, 1, 0]
