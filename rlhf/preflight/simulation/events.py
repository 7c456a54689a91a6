"""The online loop as discrete events: engines, judges and ranks take their time, and the loop's own `Admission`, `Buffer` and `Refill`
decide who starts, what a step takes and what it replaces. Deterministic by its seed.

Prompts are drawn from those that the run answered, each with its lengths, tokens to learn from and judging. Not modelled: how engines and
ranks disturb one another on the same device, or judges and networks under more load than the run gave them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.loop.admission import Admission
from rlhf.loop.batch import Refill
from rlhf.loop.buffer import Buffer
from rlhf.preflight.simulation.engine import Engine
from rlhf.preflight.simulation.fit import Fitted
from rlhf.preflight.simulation.recorded import STEADY, Answer, Measured, whole_periods
from rlhf.preflight.simulation.scenario import Scenario

MOST_STEADY, ENOUGH_PROMPTS = 40, 4000
"""A simulation measures over this many steps at most, and over fewer (`STEADY` at least) where they have this many prompts together."""


@dataclass(frozen=True)
class Drawn:
    """A prompt that has been started.

    Attributes:
        lengths: tokens of its responses.
        learned: tokens to learn from; 0 for a prompt that teaches nothing.
        oldest: version of the weights when it was started.
    """

    lengths: tuple[int, ...]
    learned: float
    judged_s: float
    oldest: int


@dataclass(frozen=True)
class Step:
    """One step of the simulated loop.

    Attributes:
        engines_s: time in which engines had a prompt to answer, summed over them.
        policy_s: time in which the ranks learned or published.
        tokens: response tokens that it took.
        taken: prompts that it took.
        staleness: versions that the oldest of them was behind.
    """

    seconds: float
    engines_s: float
    policy_s: float
    tokens: int
    taken: int
    staleness: int


def simulate(scenario: Scenario, fitted: Fitted, seed: int = 0) -> Measured:
    """What the steady steps of such a run would be: those after the first ones, in which nothing is ahead yet."""
    steps = max(STEADY, min(MOST_STEADY, ENOUGH_PROMPTS // scenario.prompts))
    steady = whole_periods(range(steps + scenario.staleness), scenario.staleness)
    return measured(
        Simulation(scenario, fitted, seed).run(scenario.staleness + 1 + len(steady))[-len(steady) :], scenario.engines
    )


def measured(steady: Sequence[Step], engines: int) -> Measured:
    """Means over these steps."""
    seconds = sum(step.seconds for step in steady)
    return Measured(
        step_s=seconds / len(steady),
        idle_engines=max(0.0, 1 - sum(step.engines_s for step in steady) / (seconds * engines)),
        idle_policy=1 - sum(step.policy_s for step in steady) / seconds,
        tokens_per_s=sum(step.tokens for step in steady) / seconds,
    )


class Simulation:
    """One run without an end. Time is in seconds since it began."""

    def __init__(self, scenario: Scenario, fitted: Fitted, seed: int):
        self._scenario, self._fitted = scenario, fitted
        self._random = random.Random(seed)
        self._answers = [self._scaled(answer) for answer in fitted.answers]
        self._deck: list[
            tuple[tuple[int, ...], float, float]
        ] = []  # shuffled; each is drawn once before all are shuffled again
        self._admission = Admission(scenario.prompts, scenario.staleness, sys.maxsize)
        self._buffer: Buffer[Drawn] = Buffer()
        self._engines = [Engine(fitted.decoding, scenario.most) for _ in range(scenario.engines)]
        self._given = [0] * scenario.engines  # prompts that each engine has not answered
        self._lightest = [
            (0, place) for place in range(scenario.engines)
        ]  # a heap; an entry counts if it is what `_given` says
        self._prompts: dict[int, Drawn] = {}  # by place, until they arrive
        self._held: list[int] | None = None  # places that wait until new weights are there (`rollout.in_flight: wait`)
        self._now, self._version = 0.0, 0
        self._busy, self._engines_s, self._policy_s = 0, 0.0, 0.0  # engines that have a prompt; times so far
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()
        self._changed: dict[int, None] = {}  # engines whose next end must be foreseen anew
        self._learner, self._waits = self._learn(), False
        self._done: list[Step] = []

    def run(self, steps: int) -> list[Step]:
        """The first steps."""
        self._go_on()
        self._foresee()
        while len(self._done) < steps:
            when, _, happens, arguments = heapq.heappop(self._events)
            self._engines_s += self._busy * (when - self._now)
            self._now = when
            happens(*arguments)
            self._foresee()
        return self._done[:steps]

    def _at(self, when: float, happens: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._number), happens, arguments))

    # The loop

    def _go_on(self) -> None:
        """The loop goes on until it works for some seconds, or waits for something to happen."""
        seconds = next(self._learner)
        self._waits = seconds is None
        if seconds is not None:
            self._at(self._now + seconds, self._go_on)

    def _something_happened(self) -> None:
        if self._waits:
            self._go_on()

    def _learn(self) -> Iterator[float | None]:
        """All steps, as `OnlineLoop.step` makes them; gives the seconds that it works, and None where it waits."""
        scenario, admission = self._scenario, self._admission
        while True:
            began, engines_s, policy_s = self._now, self._engines_s, self._policy_s
            taken: list[Drawn] = []
            exact = scenario.staleness > 0 or scenario.stream
            refill = Refill(scenario.prompts, scenario.refill * scenario.prompts, exact)
            self._open(scenario.prompts)
            yield from self._in_pieces(taken, refill) if scenario.stream else self._whole(taken, refill)
            yield from self._publish()
            self._version += 1
            admission.finish_step()
            self._done.append(
                Step(
                    seconds=self._now - began,
                    engines_s=self._engines_s - engines_s,
                    policy_s=self._policy_s - policy_s,
                    tokens=sum(sum(one.lengths) for one in taken),
                    taken=len(taken),
                    staleness=self._version - 1 - min(one.oldest for one in taken),
                )
            )
            if admission.runs_ahead:
                self._start()

    def _whole(self, taken: list[Drawn], refill: Refill) -> Iterator[float | None]:
        """As `Collecting.whole`, and then the step's learning."""
        while self._buffer.pending:
            while not (items := self._buffer.take_all()):
                yield None
            self._take(items, taken, refill)
        yield self._fitted.other_s
        if tokens := sum(one.learned for one in taken):
            yield self._worked(self._fitted.whole.seconds(tokens / self._scenario.ranks))

    def _in_pieces(self, taken: list[Drawn], refill: Refill) -> Iterator[float | None]:
        """As `Collecting.piece`, each piece with its learning."""
        scenario, fitted = self._scenario, self._fitted
        yield fitted.other_s
        count = 0  # of those that teach something
        while self._buffer.pending:
            update, piece = self._update_of(count), 0.0
            while self._buffer.pending and piece < scenario.piece_tokens and self._update_of(count) == update:
                while not (items := self._buffer.take_next()):
                    yield None
                self._take(items, taken, refill)
                count += sum(one.learned > 0 for one in items)
                piece += sum(one.learned for one in items)
            if piece:
                yield self._worked(fitted.piece.seconds(piece / scenario.ranks))
        if tokens := sum(one.learned for one in taken):
            yield self._worked(fitted.end.seconds(tokens / scenario.ranks))

    def _update_of(self, count: int) -> int:
        scenario = self._scenario
        return min(count * scenario.updates // scenario.prompts, scenario.updates - 1)

    def _take(self, items: Sequence[Drawn], taken: list[Drawn], refill: Refill) -> None:
        taken += items
        if refill.extra:
            taught = sum(one.learned > 0 for one in taken)
            more = refill.next(taught + self._buffer.pending, available=refill.extra)
            self._admission.replace(more)
            self._open(more)

    def _publish(self) -> Iterator[float | None]:
        """Engines stand still meanwhile, in the middle of what they write or (`wait`) after it."""
        began = self._now
        if not self._scenario.keep:
            self._held = []
            while self._busy:
                yield None
        for engine in self._engines:
            engine.pause(self._now, paused=True)
        yield self._random.choice(self._fitted.publish)
        self._policy_s += self._now - began
        for place, engine in enumerate(self._engines):
            engine.pause(self._now, paused=False)
            self._changed[place] = None
        held, self._held = self._held or [], None
        for number in held:
            self._give(number)

    def _worked(self, seconds: float) -> float:
        self._policy_s += seconds
        return seconds

    # The prompts

    def _open(self, count: int) -> None:
        self._buffer.open(count)
        self._start()

    def _start(self) -> None:
        while self._admission.may_start:
            number = self._admission.start().number
            self._prompts[number] = self._draw()
            if self._held is None:
                self._give(number)
            else:
                self._held.append(number)

    def _draw(self) -> Drawn:
        if not self._deck:
            self._deck = list(self._answers)
            self._random.shuffle(self._deck)
        lengths, learned, judged_s = self._deck.pop()
        teaches = self._random.random() < self._fitted.taught_share
        return Drawn(lengths, learned if teaches else 0.0, judged_s, self._version)

    def _scaled(self, answer: Answer) -> tuple[tuple[int, ...], float, float]:
        """Lengths of the responses; tokens to learn from, if it teaches anything; seconds of judging."""
        fitted = self._fitted
        lengths = tuple(max(1, round(length * self._scenario.longer)) for length in answer.tokens if length)
        share = fitted.learned_share / fitted.taught_share if fitted.taught_share else 0.0
        return lengths, (answer.prompt_tokens + sum(lengths)) * share, answer.judged_s

    def _give(self, number: int) -> None:
        """To the engine with the fewest prompts."""
        while self._given[self._lightest[0][1]] != self._lightest[0][0]:
            heapq.heappop(self._lightest)
        count, place = self._lightest[0]
        heapq.heapreplace(self._lightest, (count + 1, place))
        self._given[place] += 1
        self._busy += count == 0
        self._engines[place].add(self._now, number, self._prompts[number].lengths)
        self._changed[place] = None

    def _foresee(self) -> None:
        for place in self._changed:
            engine = self._engines[place]
            if (when := engine.next_end()) < math.inf:
                self._at(when, self._ends, place, engine.stamp)
        self._changed.clear()

    def _ends(self, place: int, stamp: int) -> None:
        """A sequence ends, unless its engine has been given or taken something since that was foreseen."""
        engine = self._engines[place]
        if engine.stamp != stamp:
            return
        for number in engine.end(self._now):
            self._answered(place, number)
        self._changed[place] = None

    def _answered(self, place: int, number: int) -> None:
        self._given[place] -= 1
        self._busy -= self._given[place] == 0
        heapq.heappush(self._lightest, (self._given[place], place))
        self._at(self._now + self._prompts[number].judged_s, self._arrives, number)
        self._something_happened()

    def _arrives(self, number: int) -> None:
        self._buffer.put(number, self._prompts.pop(number))
        self._something_happened()
