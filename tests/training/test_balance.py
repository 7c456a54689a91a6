"""The split of work: nothing lost, nothing doubled, and no rank ever out of step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf.training.balance import plan_updates


@given(
    costs=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    updates=st.integers(1, 5),
    ranks=st.integers(1, 5),
    budget=st.integers(1, 300),
)
def test_every_assignment_once_and_ranks_in_step(costs: list[int], updates: int, ranks: int, budget: int) -> None:
    plan = plan_updates(costs, updates, ranks, budget)
    flat = sorted(i for update in plan for share in update for batch in share for i in batch)
    assert flat == list(range(len(costs)))
    assert len(plan) == min(updates, len(costs))
    for update in plan:
        assert len(update) == ranks
        assert len({len(share) for share in update}) == 1, "every rank makes the same number of forward calls"
        for batch in (batch for share in update for batch in share):
            assert len(batch) <= 1 or sum(costs[i] for i in batch) <= budget


@given(costs=st.lists(st.integers(1, 100), min_size=1, max_size=60), ranks=st.integers(1, 6))
def test_ranks_differ_by_at_most_one_assignment(costs: list[int], ranks: int) -> None:
    (shares,) = plan_updates(costs, 1, ranks, 10_000)
    loads = [sum(costs[i] for batch in share for i in batch) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_updates_take_the_prompts_in_order() -> None:
    plan = plan_updates([5] * 6, 3, 1, 100)
    assert [sorted(i for batch in update[0] for i in batch) for update in plan] == [[0, 1], [2, 3], [4, 5]]


def test_micro_batches_are_few() -> None:
    (share,) = plan_updates([60, 40, 50, 50], 1, 1, 100)[0]
    assert len(share) == 2
