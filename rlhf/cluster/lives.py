"""Who is alive: the members of a pool (engines, reward servers, ranks), each a process of its own.

Owns each member's state, the budget of restarts, and the account of what ended whom. Pure: it is told facts and asked for
decisions, and owns no handle, no task and no clock. Does not know what a member does: its load is the router's, its weights are
`rlhf.transfer.versions`'. Told and asked by the pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf.types import Incident, IncidentKind

State = Literal["starting", "ready", "suspect", "dead"]


class Member(NamedTuple):
    """One process of a pool.

    A process that is started again is another member, so that late news of the one before it is not taken for news of the new one.

    Attributes:
        place: its number in the pool, from 0.
        incarnation: how often the process at this place had been started before.
    """

    place: int
    incarnation: int = 0


@dataclass(frozen=True)
class Whereabouts:
    """Where a member runs.

    Attributes:
        log: file that the process writes to, on its own host; None if it has none of its own.
    """

    host: str
    pid: int
    log: str | None = None


class Lives:
    """The members of one pool. All are starting at first.

    News of a member that is dead is ignored: several callers may bring the same news, and in any order.
    """

    def __init__(self, names: Sequence[str], restarts: int = 0):
        """
        Args:
            names: one for each place, for people.
            restarts: how often each place may be filled again.
        """
        self._names, self._restarts = tuple(names), restarts
        self._members = [Member(place) for place in range(len(names))]
        self._states: list[State] = ["starting"] * len(names)
        self._where: list[Whereabouts | None] = [None] * len(names)
        self._incidents: list[Incident] = []

    # Facts

    def started(self, member: Member, where: Whereabouts) -> None:
        """It can answer."""
        if self.state(member) == "starting":
            self._states[member.place], self._where[member.place] = "ready", where

    def suspected(self, member: Member, reason: str, *, when: float, holding: Sequence[str] = ()) -> Incident | None:
        """It does not answer, and may yet. Nothing new if it is suspect already.

        Args:
            when: seconds since 1970.
            holding: what it has been given and not answered.
        """
        if self.state(member) != "ready":
            return None
        self._states[member.place] = "suspect"
        return self._note(member, "froze", f"{self._described(member)} does not answer: {_bare(reason)}", when, holding)

    def answered(self, member: Member) -> None:
        """It is no longer suspect."""
        if self.state(member) == "suspect":
            self._states[member.place] = "ready"

    def died(self, member: Member, reason: str, *, when: float, holding: Sequence[str] = ()) -> Incident | None:
        """Its process has ended, or could not be started. None if that is known already. Arguments as of `suspected`."""
        state = self.state(member)
        if state == "dead":
            return None
        if state == "starting":
            again = " again" if member.incarnation else ""
            words = f"{self._names[member.place]} could not be started{again}: {_bare(reason)}"
        else:
            words = f"{self._described(member)} died: {_bare(reason)}{self._log(member)}"
        return self._end(member, "died", words, when, holding)

    def lied(self, member: Member, reason: str, *, when: float, holding: Sequence[str] = ()) -> Incident | None:
        """It answers, and is not what it should be: it counts as dead.

        Args:
            reason: goes on where the member's name ends: "judges with ... instead of ...".
        """
        if self.state(member) == "dead":
            return None
        return self._end(member, "lied", f"{self._names[member.place]} {_bare(reason)}", when, holding)

    def restarting(self, member: Member) -> Member:
        """A process is being started in the place of this dead one: the new member.

        Raises:
            ValueError: this may not be (`may_restart`).
        """
        if not self.may_restart(member):
            raise ValueError(
                f"{self._names[member.place]} ({member}) may not be started again: it is {self.state(member)}"
            )
        new = Member(member.place, member.incarnation + 1)
        self._members[member.place], self._states[member.place], self._where[member.place] = new, "starting", None
        return new

    # Decisions

    def state(self, member: Member) -> State:
        """What it is; a member that another one has replaced is dead."""
        return self._states[member.place] if self._members[member.place] == member else "dead"

    def members(self) -> tuple[Member, ...]:
        """The last member of each place, dead or alive."""
        return tuple(self._members)

    def alive(self) -> tuple[Member, ...]:
        """Those that have started and not died, suspect ones among them, by place."""
        states = zip(self._members, self._states, strict=True)
        return tuple(member for member, state in states if state in ("ready", "suspect"))

    def starting(self) -> tuple[Member, ...]:
        """Those that may be alive soon."""
        return tuple(member for member in self._members if self.state(member) == "starting")

    def may_restart(self, member: Member) -> bool:
        """Whether this one is dead, has not been replaced, and its place has restarts left."""
        current = self._members[member.place] == member
        return current and self.state(member) == "dead" and member.incarnation < self._restarts

    def incidents(self) -> tuple[Incident, ...]:
        """All that happened, in order."""
        return tuple(self._incidents)

    def account(self) -> str:
        """All that happened, in words; empty if nothing did."""
        return " ".join(incident.words for incident in self._incidents)

    def _end(self, member: Member, kind: IncidentKind, words: str, when: float, holding: Sequence[str]) -> Incident:
        self._states[member.place] = "dead"
        return self._note(member, kind, words, when, holding)

    def _note(self, member: Member, kind: IncidentKind, words: str, when: float, holding: Sequence[str]) -> Incident:
        self._incidents.append(Incident(kind, self._names[member.place], when, tuple(holding), f"{words}."))
        return self._incidents[-1]

    def _described(self, member: Member) -> str:
        where = self._where[member.place]
        place = "" if where is None else f" (process {where.pid} on {where.host})"
        return f"{self._names[member.place]}{place}"

    def _log(self, member: Member) -> str:
        where = self._where[member.place]
        return "" if where is None or where.log is None else f"; its log there is {where.log}"


def _bare(reason: str) -> str:
    """Without the full stop that the sentence around it brings."""
    return reason.rstrip(". \n")
