"""Who is alive: no news of the dead revives anybody, no budget is exceeded, and every end is told once, in words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlhf.cluster.lives import Lives, Member, Whereabouts

HERE = Whereabouts("alpha", 42, "/logs/one")
places, incarnations = st.integers(0, 3), st.integers(0, 3)
members = st.builds(Member, places, incarnations)


class News(RuleBasedStateMachine):
    """Any news of any member, also of such as are dead or do not exist yet, in any order."""

    @initialize(restarts=st.integers(0, 2))
    def start(self, restarts: int) -> None:
        self.restarts = restarts
        self.lives = Lives(["a", "b", "c", "d"], restarts)
        self.dead: set[Member] = set()
        self.told = 0

    @rule(member=members)
    def started(self, member: Member) -> None:
        self.lives.started(member, HERE)

    @rule(member=members)
    def answered(self, member: Member) -> None:
        before = self.lives.state(member)
        self.lives.answered(member)
        assert self.lives.state(member) == ("ready" if before == "suspect" else before)

    @rule(member=members)
    def suspected(self, member: Member) -> None:
        before = self.lives.state(member)
        incident = self.lives.suspected(member, "silence", when=1.0)
        assert (incident is not None) == (before == "ready")
        self.told += incident is not None

    @rule(member=members, lied=st.booleans())
    def ended(self, member: Member, lied: bool) -> None:
        before = self.lives.state(member)
        tell = self.lives.lied if lied else self.lives.died
        incident = tell(member, "gone", when=1.0, holding=["p1"])
        assert (incident is None) == (before == "dead")
        assert self.lives.state(member) == "dead"
        if incident is not None:
            assert (incident.kind, incident.holding) == ("lied" if lied else "died", ("p1",))
            assert member not in self.dead, "told twice"
            self.dead.add(member)
            self.told += 1

    @rule(member=members)
    def restarted(self, member: Member) -> None:
        if not self.lives.may_restart(member):
            with pytest.raises(ValueError, match="may not be started again"):
                self.lives.restarting(member)
            return
        new = self.lives.restarting(member)
        assert (new.place, new.incarnation) == (member.place, member.incarnation + 1)
        assert self.lives.state(new) == "starting"

    @invariant()
    def the_dead_stay_dead(self) -> None:
        assert all(self.lives.state(member) == "dead" for member in self.dead)
        assert not self.dead & {*self.lives.alive(), *self.lives.starting()}

    @invariant()
    def each_place_has_one_member_within_the_budget(self) -> None:
        current = self.lives.members()
        assert [member.place for member in current] == [0, 1, 2, 3]
        assert all(member.incarnation <= self.restarts for member in current)
        assert {*self.lives.alive(), *self.lives.starting()} == set(current) - self.dead

    @invariant()
    def all_is_told_once(self) -> None:
        assert len(self.lives.incidents()) == self.told
        assert self.lives.account() == " ".join(incident.words for incident in self.lives.incidents())


News.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_any_news_in_any_order = News.TestCase


@given(st.integers(0, 5))
def test_a_place_is_filled_again_as_often_as_it_may_be(restarts: int) -> None:
    lives, member = Lives(["reward-0"], restarts), Member(0)
    lives.started(member, HERE)
    for _ in range(restarts):
        lives.died(member, "a crash", when=0.0)
        member = lives.restarting(member)
        lives.started(member, HERE)
    assert lives.alive() == (member,)
    lives.died(member, "a crash", when=0.0)
    assert not lives.may_restart(member)


def test_every_end_is_told_in_words() -> None:
    lives = Lives(["rollout-0", "rollout-1"], restarts=1)
    first, second = lives.members()
    lives.started(first, HERE)
    lives.started(second, Whereabouts("beta", 7))
    lives.suspected(second, "no answer to `sample` within 60 s", when=1.0)
    lives.died(first, "the process was killed.\n", when=2.0, holding=["p1", "p2"])
    lives.died(second, "out of memory", when=3.0)
    lives.lied(lives.restarting(second), "was started again and judges with b instead of a", when=4.0)
    lives.died(lives.restarting(first), "no folder `m`", when=5.0)
    assert [incident.words for incident in lives.incidents()] == [
        "rollout-1 (process 7 on beta) does not answer: no answer to `sample` within 60 s.",
        "rollout-0 (process 42 on alpha) died: the process was killed; its log there is /logs/one.",
        "rollout-1 (process 7 on beta) died: out of memory.",
        "rollout-1 was started again and judges with b instead of a.",
        "rollout-0 could not be started again: no folder `m`.",
    ]
    held = [(incident.kind, incident.who, incident.when, incident.holding) for incident in lives.incidents()]
    assert held[1] == ("died", "rollout-0", 2.0, ("p1", "p2"))
