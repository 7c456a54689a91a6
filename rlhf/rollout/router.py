"""Which engine a request goes to: the one with the fewest outstanding tokens. Owns numbers, no engine and no task."""

from __future__ import annotations


class Router:
    """Keeps the load of each engine, in tokens that it may still have to read or write.

    A request's load is an upper bound (its prompt once, and its longest response n times), because nobody knows how
    long a response will be; the bound is taken back whole when the request ends.
    """

    def __init__(self, engines: int):
        self._load = dict.fromkeys(range(engines), 0)

    def acquire(self, tokens: int) -> int:
        """Engine for a request of so many tokens; among equally loaded ones the one with the lowest number.

        Raises:
            LookupError: no engine is left.
        """
        if not self._load:
            raise LookupError("no engine is left")
        engine = min(self._load, key=lambda index: (self._load[index], index))
        self._load[engine] += tokens
        return engine

    def release(self, engine: int, tokens: int) -> None:
        """The request has ended, well or not. An engine that was removed meanwhile is ignored."""
        if engine in self._load:
            self._load[engine] -= tokens

    def remove(self, engine: int) -> None:
        """Send nothing more to this engine."""
        self._load.pop(engine, None)

    def loads(self) -> dict[int, int]:
        """Outstanding tokens of each engine that is left."""
        return dict(self._load)
