"""Batches: which items, when, and whose results. The decisions as properties, the waiting with real tasks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward.judges.batching import WINDOW, Batcher, Limits, choose, full

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=40)
PADDED, UNPADDED = (
    st.builds(
        Limits, items=st.integers(1, 12), tokens=st.integers(1, 200), wait_s=st.just(0.0), padding=st.just(padding)
    )
    for padding in (True, False)
)
LIMITS = PADDED | UNPADDED


def cost(lengths: list[int], batch: list[int], padding: bool = True) -> int:
    chosen = [lengths[i] for i in batch]
    return max(chosen) * len(chosen) if padding else sum(chosen)


@given(LENGTHS, LIMITS)
def test_a_batch_holds_the_oldest_and_keeps_to_its_limits(lengths: list[int], limits: Limits) -> None:
    batch = choose(lengths, limits)
    assert batch == sorted(set(batch)) and batch[0] == 0
    assert len(batch) <= limits.items
    assert len(batch) == 1 or cost(lengths, batch, limits.padding) <= limits.tokens


@given(LENGTHS, UNPADDED)
def test_without_padding_a_batch_is_the_oldest_and_no_more_fit(lengths: list[int], limits: Limits) -> None:
    batch = choose(lengths, limits)
    assert batch == list(range(len(batch)))
    if len(batch) < min(len(lengths), limits.items):
        assert sum(lengths[: len(batch) + 1]) > limits.tokens


@given(LENGTHS, PADDED)
def test_a_batch_is_of_like_lengths_and_no_more_fits(lengths: list[int], limits: Limits) -> None:
    batch = choose(lengths, limits)
    chosen = [lengths[i] for i in batch]
    assert max(batch) < WINDOW * limits.items
    for index, length in enumerate(lengths[: WINDOW * limits.items]):
        if index not in batch:
            assert not min(chosen) < length < max(chosen), "a neighbour in length was passed over"
            fits = len(batch) < limits.items and cost(lengths, [*batch, index]) <= limits.tokens
            assert not fits


@given(LENGTHS, LIMITS)
def test_everything_is_judged_once_and_waits_for_no_more_batches_than_there_were_older_items(
    lengths: list[int], limits: Limits
) -> None:
    waiting, done = list(range(len(lengths))), []
    for number in range(len(lengths)):
        if not waiting:
            break
        batch = choose([lengths[i] for i in waiting], limits)
        done += [waiting[i] for i in batch]
        waiting = [item for place, item in enumerate(waiting) if place not in batch]
        assert number in done, "after this many batches, the items that came first are through"
    assert sorted(done) == list(range(len(lengths)))


@given(LENGTHS, LIMITS)
def test_a_full_batch_leaves_something_out_with_one_more_of_the_longest(lengths: list[int], limits: Limits) -> None:
    more = [*lengths, max(lengths)]
    if full(lengths, limits):
        tokens = cost(more, list(range(len(more))), limits.padding)
        assert len(more) > limits.items or max(lengths) == 0 or tokens > limits.tokens
    else:
        assert len(lengths) < limits.items
        assert cost(lengths, list(range(len(lengths))), limits.padding) < limits.tokens


def test_known_batches() -> None:
    limits = Limits(items=4, tokens=100, wait_s=0.0, padding=True)
    assert choose([10, 50, 11, 9, 12, 49], limits) == [0, 2, 3, 4]  # the long ones would cost 50 for each
    assert choose([50, 10, 11, 49], limits) == [0, 3]
    assert choose([500, 10], limits) == [0]  # too long for any batch, so alone
    assert choose([10, 30, 30, 30], limits) == [0, 1, 2]  # three times 30 fit, four times do not
    assert choose([0, 0, 0, 0, 0], limits) == [0, 1, 2, 3]  # where length does not matter, the oldest
    assert choose([10, 50, 11, 30, 12], replace(limits, padding=False)) == [
        0,
        1,
        2,
    ]  # 71 tokens, one more would make 101


def test_batches_fill_up_and_answers_find_their_callers():
    sizes: list[int] = []

    async def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(0)
        return [10 * item for item in items]

    async def scenario():
        batcher = Batcher(work, Limits(items=4, tokens=1, wait_s=60.0, padding=True))
        first = await asyncio.gather(batcher.submit([0, 1, 2]), batcher.submit([3]), batcher.submit([4, 5, 6, 7]))
        return first

    assert asyncio.run(scenario()) == [[0, 10, 20], [30], [40, 50, 60, 70]]
    assert sizes == [4, 4]


def test_a_lone_request_does_not_wait_for_ever():
    async def work(items: list[int]) -> list[int]:
        return items

    assert asyncio.run(Batcher(work, Limits(items=4, tokens=1, wait_s=0.01, padding=True)).submit([7])) == [7]


def test_a_batch_that_breaks_reaches_all_its_callers_and_the_next_one_passes():
    async def work(items: list[int]) -> list[int]:
        if 1 in items:
            raise RuntimeError("out of memory")
        return items

    async def scenario():
        batcher = Batcher(work, Limits(items=2, tokens=1, wait_s=0.01, padding=True))
        broken = await asyncio.gather(batcher.submit([1]), batcher.submit([2]), return_exceptions=True)
        return broken, await batcher.submit([3])

    broken, after = asyncio.run(scenario())
    assert [str(error) for error in broken] == ["out of memory"] * 2
    assert after == [3]


def test_a_batch_is_full_by_tokens_and_grouped_by_length():
    batches: list[list[int]] = []

    async def work(items: list[int]) -> list[int]:
        batches.append(items)
        return items

    async def scenario():
        batcher = Batcher(work, Limits(items=99, tokens=100, wait_s=60.0, padding=True))
        return await asyncio.gather(*(batcher.submit([n], lengths=[n]) for n in (9, 48, 10, 11, 50, 8, 12, 9, 10)))

    # 60 seconds of waiting for others never happen: what waits is more than a batch until the last two, which make one of 100.
    assert asyncio.run(scenario()) == [[9], [48], [10], [11], [50], [8], [12], [9], [10]]
    assert batches == [[9, 10, 11, 8, 12, 9, 10], [48, 50]]


def test_nobody_works_for_a_caller_that_gave_up():
    batches: list[list[int]] = []

    async def scenario():
        going_on = asyncio.Event()

        async def work(items: list[int]) -> list[int]:
            batches.append(items)
            await going_on.wait()
            return items

        batcher = Batcher(work, Limits(items=1, tokens=1, wait_s=0.0, padding=True))
        first, second, third = (asyncio.create_task(batcher.submit([n])) for n in (1, 2, 3))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0)
        going_on.set()
        return await first, await third

    assert asyncio.run(scenario()) == ([1], [3])
    assert batches == [[1], [3]]
