"""How fast a run's engines and ranks were, by least squares over what it recorded. Pure.

Sampling: the recorded prompts are given to model engines when the real ones got them. That says how many decoding steps each prompt saw
and how many sequences these had; its time is linear in both, and the speeds that fit all prompts best are the next guess.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.preflight.simulation.engine import Decoding, Engine
from rlhf.preflight.simulation.recorded import Answer, Learning, RecordedRun

MOST_ANSWERS = 2000
"""Prompts that the sampling speed is fitted to: the run's last ones."""
ROUNDS = 16
MOST_SCALED, HALVINGS = 5.0, 16
"""What the fit is then made slower or faster by, at most, and in how many halvings of that."""
LEAST_STEP_S = 1e-6
"""Of a decoding step: time must go by."""
BETTER = 0.98
"""A further column must lower the sum of squared errors to this share of it."""
BATCH_SPREAD = 0.05
"""Where sizes of batches differ by less than this (standard deviation over mean), a sequence's time cannot be told from a step's."""
SPREAD = 0.1
"""Where amounts differ by less than this (standard deviation over mean), their time is taken as proportional: a constant part could not
be told from noise."""


@dataclass(frozen=True)
class Line:
    """Seconds of work on so many tokens."""

    fixed: float
    per_token: float

    def seconds(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class Fitted:
    """What a simulation is made of.

    Attributes:
        batches_differ: the prompts saw batches of such different sizes that the time of a sequence can be told from that of a step.
        whole, piece, end: of the ranks, by tokens per rank: a step at once; a piece of one; the end of a step that came in pieces.
        publish: seconds of each publish that was seen.
        answers: prompts to draw from, each with at least one response.
        learned_share, taught_share, other_s: see `RecordedRun`.
    """

    decoding: Decoding
    batches_differ: bool
    whole: Line
    piece: Line
    end: Line
    publish: Sequence[float]
    answers: Sequence[Answer]
    learned_share: float
    taught_share: float
    other_s: float


def fit(run: RecordedRun) -> Fitted:
    """The speeds of this run."""
    settings, first = run.settings, run.steady[0]
    learning = [one for one in run.learning if one.step >= first]
    whole, piece, end = learners(
        learning, settings.policy.ranks, settings.loop.updates_per_step * settings.loop.epochs_per_step
    )
    begin = run.windows[first][0]
    written = [answer for answer in run.answers if any(answer.tokens)]
    answers = [answer for answer in written if answer.start >= begin]
    speed, spread = decoding(run, [answer for answer in written if answer.stop > begin])
    return Fitted(
        decoding=speed,
        batches_differ=spread >= BATCH_SPREAD,
        whole=whole,
        piece=piece,
        end=end,
        publish=[stop - start for start, stop in run.publishes if start >= begin],
        answers=answers,
        learned_share=run.learned_share,
        taught_share=run.taught_share,
        other_s=run.other_s,
    )


def decoding(run: RecordedRun, answers: Sequence[Answer]) -> tuple[Decoding, float]:
    """The engines' speed as they wrote these (see `fit_decoding`). While new weights come, engines stand still, so this time is taken
    out."""
    answers = answers[-MOST_ANSWERS:]
    begins, ends = np.array(run.publishes).T

    def active(moment: float) -> float:
        return moment - float(np.clip(moment - begins, 0.0, ends - begins).sum())

    if run.settings.rollout.in_flight == "keep" and run.settings.loop.staleness:
        times = [(active(answer.start), active(answer.stop)) for answer in answers]
    else:
        times = [(answer.start, answer.stop) for answer in answers]
    return fit_decoding(answers, times, run.settings.rollout.max_num_seqs)


def fit_decoding(answers: Sequence[Answer], times: Sequence[tuple[float, float]], most: int) -> tuple[Decoding, float]:
    """The speed with which engines wrote these, in these times. Other work may have slowed them at times, so that no speed fits all
    prompts; altogether they take as long as they did.

    Returns:
        The speed, and how much the batches differ in which the prompts were written: standard deviation over mean of their sizes.
    """
    seconds = np.array([stop - start for start, stop in times])
    longest = np.array([max(answer.tokens) for answer in answers])
    guess = Decoding(float(np.median(seconds / longest)), 0.0)
    best, best_seen, least = guess, np.ones((len(answers), 2)), np.inf
    for number in range(ROUNDS):
        seen, missed = _seen(answers, times, guess, most)
        if missed < least:
            best, best_seen, least = guess, seen, missed
        step, sequence = nonnegative(seen, seconds)
        if number:  # half of the way: the whole of it may swing to and fro
            step, sequence = (step + guess.step) / 2, (sequence + guess.sequence) / 2
        guess = Decoding(max(step, LEAST_STEP_S), sequence)
    sizes = best_seen[:, 1] / best_seen[:, 0]
    return _scaled(best, answers, times, most), float(sizes.std() / sizes.mean())


def _scaled(speed: Decoding, answers: Sequence[Answer], times: Sequence[tuple[float, float]], most: int) -> Decoding:
    """The same slower or faster, so that all prompts together take as long as they did: by halving, since where prompts wait for one
    another their time grows much faster than that of a decoding step."""
    least, largest = 1 / MOST_SCALED, MOST_SCALED
    for _ in range(HALVINGS):
        middle = math.sqrt(least * largest)
        scaled = Decoding(speed.step * middle, speed.sequence * middle)
        late = sum(end - times[place][1] for place, end, _, _ in _replayed(answers, times, scaled, most))
        least, largest = (middle, largest) if late < 0 else (least, middle)
    return scaled


def _seen(
    answers: Sequence[Answer], times: Sequence[tuple[float, float]], speed: Decoding, most: int
) -> tuple[np.ndarray, float]:
    """Decoding steps and sequences in them while each prompt was written, [n, 2], and the sum of squared errors of its end, if the
    engines have this speed."""
    seen, missed = np.zeros((len(answers), 2)), 0.0
    for place, end, steps, work in _replayed(answers, times, speed, most):
        seen[place] = steps, work
        missed += (end - times[place][1]) ** 2
    return seen, missed


def _replayed(
    answers: Sequence[Answer], times: Sequence[tuple[float, float]], speed: Decoding, most: int
) -> Iterator[tuple[int, float, float, float]]:
    """(prompt, when it ends, decoding steps and work until then) if the engines that wrote these have this speed."""
    for name in dict.fromkeys(answer.engine for answer in answers):
        mine = sorted((i for i, answer in enumerate(answers) if answer.engine == name), key=lambda i: times[i])
        for period in _periods(mine, times):
            yield from _written(answers, times, period, Engine(speed, most))


def _periods(mine: Sequence[int], times: Sequence[tuple[float, float]]) -> list[list[int]]:
    """The same prompts in parts, before each of which the engine had answered all others: however slow it is thought to be, none of them
    waits for these."""
    periods: list[list[int]] = []
    last = -math.inf
    for place in mine:
        start, stop = times[place]
        if start >= last:
            periods.append([])
        periods[-1].append(place)
        last = max(last, stop)
    return periods


def _written(
    answers: Sequence[Answer], times: Sequence[tuple[float, float]], mine: Sequence[int], engine: Engine
) -> Iterator[tuple[int, float, float, float]]:
    """(prompt, when it ends, decoding steps and work until then) as this engine writes these prompts, which come in this order."""
    began: dict[int, tuple[float, float]] = {}
    arrivals = deque(mine)
    while arrivals or began:
        ends, arrives = engine.next_end(), times[arrivals[0]][0] if arrivals else math.inf
        if ends <= arrives:
            for place in engine.end(ends):
                steps, work = began.pop(place)
                yield place, ends, engine.steps - steps, engine.work - work
        else:
            place = arrivals.popleft()
            engine.add(arrives, place, [n for n in answers[place].tokens if n])
            began[place] = engine.steps, engine.work


def learners(learning: Sequence[Learning], ranks: int, passes: int) -> tuple[Line, Line, Line]:
    """How long a step takes at once, a piece of one, and the end of one that comes in pieces.

    Of the ways that the run did not take, from the others: a piece is learned from in the first of the passes, the rest is the end.

    Args:
        passes: optimizer steps times epochs.
    """
    lines = {
        part: fit_line([(one.tokens / ranks, one.seconds) for one in learning if one.part == part])
        for part in ("whole", "piece", "end")
    }
    whole, piece, end = lines["whole"], lines["piece"], lines["end"]
    if piece is None or end is None:
        whole = whole or Line(0.0, 0.0)
        first = whole.per_token / passes
        return whole, Line(0.0, first), Line(whole.fixed, whole.per_token - first)
    if whole is None:
        whole = Line(piece.fixed + end.fixed, piece.per_token + end.per_token)
    return whole, piece, end


def fit_line(points: Sequence[tuple[float, float]]) -> Line | None:
    """Seconds by tokens; None without any. Neither part is negative."""
    if not points:
        return None
    tokens, seconds = np.array(points).T
    if tokens.std() < SPREAD * tokens.mean():
        return Line(0.0, float(seconds.sum() / tokens.sum()))
    return Line(*nonnegative(np.column_stack([np.ones(len(tokens)), tokens]), seconds))


def nonnegative(columns: np.ndarray, values: np.ndarray) -> list[float]:
    """The least-squares solution x >= 0 of columns x = values, for a few columns: the best of those in which some are zero. Where columns
    say nearly the same, as few of them are used as will do, the first ones rather than the last.

    Args:
        columns: [n, k].
        values: [n].
    """
    count = columns.shape[1]
    best, least = [0.0] * count, float(values @ values)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = columns[:, chosen]
            solution, *_ = np.linalg.lstsq(part, values, rcond=None)
            missed = float(((part @ solution - values) ** 2).sum())
            if (solution >= 0).all() and missed < BETTER * least:
                least = missed
                best = [float(solution[chosen.index(i)]) if i in chosen else 0.0 for i in range(count)]
    return best
