"""Who is told of a run while it goes on: the console, Weights & Biases. Whatever they raise cannot stop it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

log = logging.getLogger(__name__)

Line = Mapping[str, Any]


class Listener(Protocol):
    """Somebody who is told."""

    def phase(self, text: str) -> None:
        """What the run does from now on, where it is no step: starting, evaluating, exporting."""

    def step(self, line: Line) -> None:
        """A line of metrics.jsonl, after it was written."""

    def evaluation(self, line: Line) -> None:
        """A line of evaluations.jsonl."""

    def samples(self, step: int, rows: Sequence[Line]) -> None:
        """What the policy wrote in a step: rows of samples.jsonl."""

    def close(self) -> None:
        """The run has ended."""


class Audience:
    """All listeners. One that fails is warned about once and hears no more.

    Args:
        folder: where the record goes on without them.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._listeners: dict[str, Listener] = {}

    def join(self, name: str, make: Callable[[], Listener | None]) -> None:
        """Add what `make` gives, if it gives anything."""
        listener = self._guard(name, make)
        if listener is not None:
            self._listeners[name] = listener

    def tell(self, event: Callable[[Listener], None]) -> None:
        """Tell every listener, for example `lambda listener: listener.step(line)`."""
        for name, listener in list(self._listeners.items()):
            self._guard(name, partial(event, listener))

    def phase(self, text: str) -> None:
        """Tell every listener what the run does from now on."""
        self.tell(lambda listener: listener.phase(text))

    def close(self) -> None:
        """Let them finish. Safe to call twice."""
        self.tell(lambda listener: listener.close())
        self._listeners.clear()

    def _guard(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - whatever a logger's library raises, training must not stop for it
            self._listeners.pop(name, None)
            log.warning(
                "%s failed and is off for the rest of this run (the files in %s go on): %r", name, self._folder, error
            )
            return None
