"""An engine as the simulator sees it: it decodes a changing batch of sequences, one token of each in every decoding step.

Time goes by in decoding steps: as long as the batch stays the same, each takes equally long, so only arrivals, ends and pauses of
sequences are events. Prefill, and a key-value cache that runs full, are not modelled.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How fast an engine writes, in seconds.

    Attributes:
        step: of one decoding step.
        sequence: of each sequence in it.
    """

    step: float
    sequence: float


class Engine:
    """One engine. Times are seconds, and must not go back from call to call.

    Attributes:
        steps: decoding steps made so far.
        work: sequences decoded so far, summed over these steps.
        stamp: changes whenever `next_end` may.
    """

    def __init__(self, speed: Decoding, most: int):
        """
        Args:
            most: sequences decoded at the same time (`rollout.max_num_seqs`); others wait, first come first served.
        """
        self._speed, self._most = speed, most
        self.steps = self.work = 0.0
        self.stamp = 0
        self._now = 0.0
        self._paused = False
        self._running: list[tuple[float, int]] = []  # the step in which it ends, prompt
        self._waiting: deque[tuple[int, int]] = deque()  # length, prompt
        self._left: dict[int, int] = {}  # prompt -> sequences that have not ended

    def add(self, now: float, prompt: int, lengths: Sequence[int]) -> None:
        """Write responses of these lengths, each at least one token."""
        self._advance(now)
        self._left[prompt] = len(lengths)
        self._waiting.extend((length, prompt) for length in lengths)
        self._fill()

    def next_end(self) -> float:
        """When the next sequence ends if nothing changes; infinite if none is written."""
        if self._paused or not self._running:
            return math.inf
        return self._now + (self._running[0][0] - self.steps) * self._step_s()

    def end(self, now: float) -> list[int]:
        """The next sequence ends now, and those with it: the prompts all of whose sequences have ended."""
        self._advance(now)
        self.steps = self._running[0][0]
        done = []
        while self._running and self._running[0][0] <= self.steps:
            _, prompt = heapq.heappop(self._running)
            self._left[prompt] -= 1
            if not self._left[prompt]:
                del self._left[prompt]
                done.append(prompt)
        self._fill()
        return done

    def pause(self, now: float, *, paused: bool) -> None:
        """Stop decoding, or go on; nothing is lost."""
        self._advance(now)
        self._paused = paused
        self.stamp += 1

    def _step_s(self) -> float:
        return self._speed.step + self._speed.sequence * len(self._running)

    def _advance(self, now: float) -> None:
        if self._running and not self._paused:
            steps = (now - self._now) / self._step_s()
            self.steps += steps
            self.work += steps * len(self._running)
        self._now = now

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._most:
            length, prompt = self._waiting.popleft()
            heapq.heappush(self._running, (self.steps + length, prompt))
        self.stamp += 1
