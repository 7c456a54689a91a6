"""What shows or sends a run while it goes on: the console, Weights & Biases. Whatever they raise cannot stop the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

log = logging.getLogger(__name__)

Line = Mapping[str, Any]


class Sink(Protocol):
    """Receives what the record has written."""

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


class Sinks:
    """All sinks. One that fails is warned about once and gets nothing more.

    Args:
        folder: where the record continues without them.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._sinks: dict[str, Sink] = {}

    def add(self, name: str, make: Callable[[], Sink | None]) -> None:
        """Add what `make` returns, if anything."""
        sink = self._guard(name, make)
        if sink is not None:
            self._sinks[name] = sink

    def send(self, event: Callable[[Sink], None]) -> None:
        """Give every sink something, for example `lambda sink: sink.step(line)`."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(event, sink))

    def phase(self, text: str) -> None:
        """Tell every sink what the run does from now on."""
        self.send(lambda sink: sink.phase(text))

    def close(self) -> None:
        """Let them finish. Safe to call twice."""
        self.send(lambda sink: sink.close())
        self._sinks.clear()

    def _guard(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - whatever a logger's library raises, training must not stop for it
            self._sinks.pop(name, None)
            log.warning(
                "%s failed and is off for the rest of this run (the files in %s go on): %r", name, self._folder, error
            )
            return None
