"""The ledger as a state machine: every prompt is accounted for, and a resumed run draws what the uninterrupted one would."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.ledger import Ledger, LedgerError
from rlhf.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (i,), "") for i in range(count)]


def draw(ledger: Ledger, count: int) -> list[str]:
    ids = [prompt.id for prompt in ledger.lease(count)]
    for prompt_id in ids:
        ledger.settle(prompt_id, "trained")
    return ids


@given(total=st.integers(1, 20), seed=st.integers(0, 9), shuffle=st.booleans(), data=st.data())
def test_resume_equals_no_interruption(total: int, seed: int, shuffle: bool, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, total), min_size=1, max_size=8))
    cut = data.draw(st.integers(0, len(counts)))
    whole = Ledger(prompts(total), seed, shuffle)
    expected = [draw(whole, count) for count in counts]
    first = Ledger(prompts(total), seed, shuffle)
    got = [draw(first, count) for count in counts[:cut]]
    second = Ledger(prompts(total), seed, shuffle)
    second.restore(json.loads(json.dumps(first.state())))
    got += [draw(second, count) for count in counts[cut:]]
    assert got == expected
    assert second.state() == whole.state()


@given(total=st.integers(2, 20), seed=st.integers(0, 9), data=st.data())
def test_what_was_out_is_leased_first_by_a_resumed_run(total: int, seed: int, data: st.DataObject) -> None:
    """Nothing is skipped and nothing comes twice: the same prompts as without the interruption, the interrupted ones first."""
    out, more = data.draw(st.integers(1, total - 1)), data.draw(st.integers(1, total))
    first = Ledger(prompts(total), seed, True)
    leased = [prompt.id for prompt in first.lease(out)]
    second = Ledger(prompts(total), seed, True)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.available == total
    again = [prompt.id for prompt in second.lease(more)]
    assert again[:out] == leased[:more] and len(set(again)) == more
    assert second.state()["out"] == again + leased[more:]


@given(total=st.integers(1, 20), steps=st.lists(st.integers(1, 20), max_size=10))
def test_a_step_never_holds_a_prompt_twice_and_the_books_balance(total: int, steps: list[int]) -> None:
    ledger = Ledger(prompts(total), 0, True)
    drawn = 0
    for count in (min(c, total) for c in steps):
        ids = draw(ledger, count)
        assert len(set(ids)) == count
        drawn += count
    assert ledger.settled["trained"] == drawn
    assert ledger.epoch * total == pytest.approx(drawn + ledger.settled["repeated"])


def test_an_epoch_holds_every_prompt_once_in_an_order_of_its_own() -> None:
    ledger = Ledger(prompts(10), 3, True)
    first, second = draw(ledger, 10), draw(ledger, 10)
    assert sorted(first) == sorted(second) == sorted(p.id for p in prompts(10))
    assert first != second
    assert draw(Ledger(prompts(10), 4, True), 10) != first
    assert draw(Ledger(prompts(10), 3, False), 10) == [p.id for p in prompts(10)]


def test_misuse_is_an_error() -> None:
    ledger = Ledger(prompts(3), 0, False)
    with pytest.raises(LedgerError, match="4 prompts are wanted, but there are only 3"):
        ledger.lease(4)
    with pytest.raises(LedgerError, match="not leased"):
        ledger.settle("p0", "trained")
    leased = ledger.lease(2)
    assert ledger.state()["out"] == [prompt.id for prompt in leased], "whoever goes on from here leases them again"
    assert ledger.available == 1
    with pytest.raises(LedgerError, match="2 are out"):
        ledger.lease(2)
    ledger.settle(leased[0].id, "tie")
    assert ledger.settled["tie"] == 1


def test_what_is_out_does_not_come_back_with_the_next_epoch() -> None:
    """A step that leases in rounds over the border of two epochs: each prompt once, and one that was passed over is counted."""
    ledger = Ledger(prompts(4), 0, False)
    draw(ledger, 2)
    out = [prompt.id for prompt in ledger.lease(2)] + [prompt.id for prompt in ledger.lease(2)]
    assert out == ["p2", "p3", "p0", "p1"] and ledger.available == 0
    for prompt_id in out[:3]:
        ledger.settle(prompt_id, "trained")
    assert [prompt.id for prompt in ledger.lease(3)] == ["p2", "p3", "p0"]
    assert ledger.settled["repeated"] == 0
    ledger.settle("p2", "trained")
    assert [prompt.id for prompt in ledger.lease(1)] == ["p2"], "p1 was still out"
    assert ledger.settled["repeated"] == 1
