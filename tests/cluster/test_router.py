"""Routing: always a least-loaded member that is alive, and no load is lost or left over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster.lives import Member
from rlhf.cluster.router import Router, Ticket

steps = st.lists(st.tuples(st.booleans(), st.integers(1, 1000)), max_size=200)


def pool(size: int) -> list[Member]:
    return [Member(place) for place in range(size)]


@given(st.integers(1, 6), steps)
def test_every_request_goes_to_a_least_loaded_member(size: int, plan: list[tuple[bool, int]]) -> None:
    router, members = Router(), pool(size)
    running: list[Ticket] = []
    for finish_one, load in plan:
        if finish_one and running:
            router.release(running.pop(load % len(running)))
            continue
        before = {member: router.load(member) for member in members}
        ticket = router.acquire(members, load)
        assert before[ticket.member] == min(before.values())
        assert ticket.member == min(member for member in members if before[member] == before[ticket.member])
        running.append(ticket)
        assert sum(router.load(member) for member in members) == sum(one.load for one in running)
    for ticket in running:
        router.release(ticket)
    assert {router.load(member) for member in members} == {0}


@given(st.integers(2, 5), steps, st.data())
def test_the_dead_get_nothing_and_their_requests_end_all_the_same(size: int, plan: list, data: st.DataObject) -> None:
    router, alive = Router(), pool(size)
    running: list[Ticket] = []
    for die, load in plan:
        if die and len(alive) > 1:
            dead = data.draw(st.sampled_from(alive))
            new = Member(dead.place, dead.incarnation + 1)  # started again
            alive[alive.index(dead)] = new
            assert router.load(new) == 0, "it begins with nothing, whatever the one before it holds"
        ticket = router.acquire(alive, load)
        assert ticket.member in alive
        running.append(ticket)
    for ticket in running:
        router.release(ticket)
        with pytest.raises(ValueError, match="not outstanding"):
            router.release(ticket)
    assert {router.load(ticket.member) for ticket in running} <= {0}


@given(st.integers(1, 3), st.integers(1, 50), steps)
def test_nobody_holds_more_than_the_most_but_for_one_request(
    size: int, most: int, plan: list[tuple[bool, int]]
) -> None:
    router, members = Router(most), pool(size)
    running: list[Ticket] = []
    for finish_one, load in plan:
        if finish_one and running:
            router.release(running.pop())
            continue
        least = min(router.load(member) for member in members)
        ticket = router.acquire(members, load)
        assert (ticket is None) == (least > 0 and least + load > most)
        running += [] if ticket is None else [ticket]
        for member in members:
            held = [one for one in running if one.member == member]
            assert router.load(member) <= most or len(held) == 1


def test_equal_requests_spread_evenly() -> None:
    router, members = Router(), pool(3)
    assert [router.acquire(members, 100).member.place for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_nobody_left() -> None:
    assert Router().acquire([], 1) is None


def test_what_a_member_holds_is_known() -> None:
    router, (one, other) = Router(), pool(2)
    tickets = [router.assign(one, 5, what) for what in ("p2", "p1", "")]
    router.assign(other, 5, "p3")
    assert router.holding(one) == ("p1", "p2")
    router.release(tickets[0])
    assert router.holding(one) == ("p1",)
