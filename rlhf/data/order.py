"""The order in which prompts and examples are drawn: pass by pass, or from several sources by weight. Pure; nothing is kept but a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Share(NamedTuple):
    """A source of a mixture: how many items it has, and the weight of its share of all draws."""

    size: int
    weight: float


def turns(weights: Sequence[float]) -> Iterator[int]:
    """The source of each draw, without end: after every draw, each source has had its share of them, up to rounding.

    Webster's rule of apportionment: draw number j of a source is due at the time (j + 1/2) / weight.
    """
    drawn = [0] * len(weights)
    while True:
        source = min(range(len(weights)), key=lambda i: (drawn[i] + 0.5) / weights[i])
        drawn[source] += 1
        yield source


def interleaved(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """All items once, the sources in turn by their sizes, so that every beginning of the list holds of each in proportion."""
    rest = [iter(part) for part in parts]
    sizes = [len(part) for part in parts]
    return [next(rest[source]) for source in islice(turns(sizes), sum(sizes))]


class Order:
    """Which item comes at which place of an endless sequence of draws.

    Args:
        size: items; of a mixture those of the first source come first, then those of the second, ...
        shuffle: a new order in each pass, given by `seed`; otherwise as they are.
        shares: of a mixture. Each source is gone through pass by pass, and their turns follow the weights. Empty: every item comes once in
            each pass over all.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, shares: Sequence[Share] = ()):
        self._shares, self._seed, self._shuffle = shares, seed, shuffle
        self._sizes = [share.size for share in shares] or [size]
        self._starts = [sum(self._sizes[:source]) for source in range(len(self._sizes))]
        self._passes: dict[int, tuple[int, list[int]]] = {}
        self._next = self._source = 0
        self._drawn: list[int] = []
        self._rewind()

    def at(self, position: int) -> int:
        """The item at this place. Places are cheapest asked for in rising order."""
        if not self._shares:
            return self._item(0, position)
        if position < self._next:
            self._rewind()
        for source in islice(self._turns, position + 1 - self._next):
            self._source = source
            self._drawn[source] += 1
        self._next = position + 1
        return self._starts[self._source] + self._item(self._source, self._drawn[self._source] - 1)

    def _rewind(self) -> None:
        self._turns = turns([share.weight for share in self._shares])
        self._next, self._source, self._drawn = 0, 0, [0] * len(self._shares)

    def _item(self, source: int, number: int) -> int:
        """The item of a source that is its draw of this number."""
        number, place = divmod(number, self._sizes[source])
        if not self._shuffle:
            return place
        known = self._passes.get(source)
        if known is None or known[0] != number:
            order = list(range(self._sizes[source]))
            random.Random(f"{self._seed}/{number}{f'/{source}' if self._shares else ''}").shuffle(order)
            known = self._passes[source] = (number, order)
        return known[1][place]
