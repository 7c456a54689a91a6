"""How far sampling may run ahead of learning. Pure: owns numbers, no task and no prompt.

Prompts are started one after the other; the number of each is its place, and the steps learn from the places in order. A prompt may
start while

    started - replaced < (steps done + 1 + bound) * prompts per step

so that step w + 1, which learns with the weights of version w, takes no prompt that was started before version w - bound was there: one
that is started at version v has a place in the first v + 1 + bound steps. Nothing that is sampled is ever too old to be learned from, and
no prompt waits behind those that started later. With bound 0 a step's prompts start when the step before is done: the synchronous loop.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A prompt's place in the order in which steps learn from prompts.

    Attributes:
        number: from 0; a run that goes on counts on.
        step: the loop step, from 1, that it was started for. With replacements an earlier one may take it.
    """

    number: int
    step: int


class Admission:
    """Decides whether a prompt may start. Told of each start, of each replacement and of each step."""

    def __init__(self, size: int, bound: int, steps: int, done: int = 0):
        """
        Args:
            size: prompts that a step learns from (`loop.prompts_per_step`).
            bound: weight versions that a response's oldest token may be behind the weights that learn from it (`loop.staleness`).
            steps: of the whole run: nothing is started that no step would learn from.
            done: steps done before; none of the places after theirs is taken.
        """
        self._size, self._bound, self._steps = size, bound, steps
        self._done = done
        self._started, self._replaced = done * size, 0

    @property
    def may_start(self) -> bool:
        """Whether one more prompt may start."""
        return self._net() < min(self._done + 1 + self._bound, self._steps) * self._size

    @property
    def runs_ahead(self) -> bool:
        """Whether prompts may start before the step that they are for."""
        return self._bound > 0

    @property
    def started(self) -> int:
        """Places taken so far, those of earlier runs included: the number of the next one."""
        return self._started

    def start(self) -> Place:
        """A prompt starts.

        Raises:
            ValueError: none may.
        """
        if not self.may_start:
            raise ValueError(f"{self._started} prompts have been started, and no more may be after {self._done} steps")
        place = Place(self._started, self._net() // self._size + 1)
        self._started += 1
        return place

    def replace(self, count: int) -> None:
        """So many prompts teach nothing, or will: the step takes as many further places (`loop.refill`)."""
        self._replaced += count

    def finish_step(self) -> None:
        """A step has learned, and its weights are published."""
        self._done += 1

    def _net(self) -> int:
        return self._started - self._replaced
