"""Which member of a pool a request goes to: the one with the least to do among those that are alive.

Owns numbers. Pure: no handle and no task; who is alive it is told at each question (`rlhf.cluster.lives`). What a load counts is the pool's
business: tokens of an engine, responses of a reward server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rlhf.cluster.lives import Member


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request that a member has been given.

    Attributes:
        load: what it counts until it is released.
        what: what the request is about, for the account of a death: a prompt's id.
    """

    member: Member
    load: int
    what: str


class Router:
    """Keeps what each member has been given and has not finished.

    A load is the most that the request may cost, because nobody knows how long a response will be; it is taken back whole when the
    request ends. A process that was started again is another member and begins with nothing.
    """

    def __init__(self, most: int | None = None):
        """
        Args:
            most: load that a member may hold; a request that is larger goes to one that holds nothing. None: no limit.
        """
        self._most = most
        self._given: dict[Member, set[Ticket]] = {}
        self._loads: Counter[Member] = Counter()

    def least_loaded(self, alive: Collection[Member]) -> Member | None:
        """The member with the smallest load; among equals the one with the lowest place. None if none is alive."""
        loads = self._loads.get  # asked for each of hundreds of engines, for each prompt
        return min(alive, key=lambda member: (loads(member, 0), member), default=None)

    def acquire(self, alive: Collection[Member], load: int, what: str = "") -> Ticket | None:
        """Give a request to the least loaded of these. None if there is none, or if it holds too much already."""
        member = self.least_loaded(alive)
        if member is None or self._is_full(member, load):
            return None
        return self.assign(member, load, what)

    def assign(self, member: Member, load: int, what: str = "") -> Ticket:
        """Give a request to this very member, however much it holds."""
        ticket = Ticket(member, load, what)
        self._given.setdefault(member, set()).add(ticket)
        self._loads[member] += load
        return ticket

    def release(self, ticket: Ticket) -> None:
        """The request has ended, well or not.

        Raises:
            ValueError: it was released before.
        """
        given = self._given.get(ticket.member, set())
        if ticket not in given:
            raise ValueError(f"{ticket} is not outstanding")
        given.remove(ticket)
        self._loads[ticket.member] -= ticket.load
        if not given:
            del self._given[ticket.member], self._loads[ticket.member]

    def load(self, member: Member) -> int:
        """Sum over the member's outstanding requests."""
        return self._loads[member]

    def holding(self, member: Member) -> tuple[str, ...]:
        """What the member's outstanding requests are about, in alphabetical order."""
        return tuple(sorted(ticket.what for ticket in self._given.get(member, ()) if ticket.what))

    def _is_full(self, member: Member, load: int) -> bool:
        held = self.load(member)
        return self._most is not None and held > 0 and held + load > self._most
