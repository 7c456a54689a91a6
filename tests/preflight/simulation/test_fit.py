"""Fitting: speeds that are known come out again."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.preflight.simulation.engine import Decoding, Engine
from rlhf.preflight.simulation.fit import Line, fit_decoding, fit_line, learners, nonnegative
from rlhf.preflight.simulation.recorded import Answer, Learning


def recorded(speed: Decoding, most: int, engines: int = 2, prompts: int = 60) -> list[Answer]:
    """Prompts that come one after the other, as engines of this speed answer them."""
    rng = random.Random(1)
    answers = []
    for number in range(engines):
        engine, now = Engine(speed, most), 0.0
        started: dict[int, tuple[float, tuple[int, ...]]] = {}

        def finish(until: float, engine: Engine = engine, number: int = number, started: dict = started) -> None:
            while (end := engine.next_end()) <= until and end < math.inf:
                for place in engine.end(end):
                    start, lengths = started[place]
                    answers.append(Answer(f"engine-{number}", start, end, 10, lengths, 0.0))

        for place in range(prompts):
            finish(now)
            started[place] = now, (rng.randint(5, 200), rng.randint(5, 200))
            engine.add(now, place, started[place][1])
            now += 3 * rng.random() if place % 9 == 0 else 1e-4  # in bursts
        finish(math.inf)
    return answers


@pytest.mark.parametrize(
    ("speed", "most"),
    [
        (Decoding(0.02, 0.003), 64),
        (Decoding(0.02, 0.003), 8),
        (Decoding(0.01, 0.0), 64),
        (Decoding(0.002, 0.004), 16),
    ],
)
def test_the_speed_of_engines_is_found_again(speed: Decoding, most: int) -> None:
    answers = recorded(speed, most)
    found, spread = fit_decoding(answers, [(answer.start, answer.stop) for answer in answers], most)
    assert (found.step, found.sequence) == pytest.approx((speed.step, speed.sequence), rel=0.02, abs=1e-5)
    assert spread > 0.05


@given(
    st.lists(st.tuples(*[st.floats(0.1, 10)] * 3), min_size=4, max_size=12),
    st.tuples(*[st.floats(0, 5)] * 3),
    st.tuples(*[st.floats(0, 5)] * 3),
)
def test_no_solution_without_negative_parts_is_much_better(
    rows: list[tuple[float, ...]], truth: tuple[float, ...], other: tuple[float, ...]
) -> None:
    columns = np.array(rows)
    values = columns @ np.array(truth)

    def missed(solution: object) -> float:
        return float(((columns @ np.array(solution) - values) ** 2).sum())

    found = nonnegative(columns, values)
    assert min(found) >= 0
    assert missed(found) <= missed(other) / 0.98**3 + 1e-6


def test_a_part_that_would_be_negative_is_zero() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative(columns, np.array([1.0, 3.0, 5.0])) == pytest.approx([0, 22 / 14])
    assert nonnegative(columns, np.array([5.0, 7.0, 9.0])) == pytest.approx([3, 2])
    assert nonnegative(columns, np.zeros(3)) == [0, 0]


def test_a_constant_part_needs_amounts_that_differ() -> None:
    assert fit_line([]) is None
    assert fit_line([(100, 3.0), (101, 3.1), (99, 2.9)]) == Line(0.0, pytest.approx(0.03))
    found = fit_line([(100, 3.0), (200, 5.0), (400, 9.0)])
    assert found is not None and (found.fixed, found.per_token) == pytest.approx((1, 0.02))


def test_ways_that_a_run_did_not_take_follow_from_the_others() -> None:
    whole = [Learning(2, "whole", tokens, 1 + 0.02 * tokens / 2) for tokens in (200, 400, 800)]
    at_once, piece, end = learners(whole, ranks=2, passes=4)
    assert (at_once.fixed, at_once.per_token) == pytest.approx((1, 0.02))
    assert (piece.fixed, piece.per_token) == pytest.approx((0, 0.005))
    assert (end.fixed, end.per_token) == pytest.approx((1, 0.015))
    pieces = [Learning(2, "piece", tokens, 0.5 + 0.03 * tokens) for tokens in (10, 20, 40)]
    ends = [Learning(2, "end", tokens, 2 + 0.01 * tokens) for tokens in (100, 200, 400)]
    at_once, *_ = learners([*pieces, *ends], ranks=1, passes=1)
    assert (at_once.fixed, at_once.per_token) == pytest.approx((2.5, 0.04))


def test_batches_of_one_size_say_nothing_of_a_sequence() -> None:
    answers = [Answer("engine-0", start, start + 2.0, 10, (100, 100), 0.0) for start in (0.0, 3.0, 6.0)]
    found, spread = fit_decoding(answers, [(answer.start, answer.stop) for answer in answers], 8)
    assert spread == pytest.approx(0) and found.step + 2 * found.sequence == pytest.approx(0.02, rel=1e-3)


def test_a_slow_moment_makes_nobody_wait_who_did_not() -> None:
    """The engine had answered each prompt before the next one came, whatever its speed was."""
    seconds, now, answers = [1.0, 5.0, 1.0, 1.0], 0.0, []
    for one in seconds:
        answers.append(Answer("engine-0", now, now + one, 10, (100,), 0.0))
        now += one
    found, _ = fit_decoding(answers, [(answer.start, answer.stop) for answer in answers], most=1)
    assert found.step + found.sequence == pytest.approx(sum(seconds) / 400, rel=1e-3)


def test_a_full_engine_is_not_thought_slow_for_the_prompts_that_wait() -> None:
    """As much comes as it can write, and its speed wavers."""
    rng, free, answers = random.Random(2), 5.0, []
    for number in range(300):
        free += 100 * 0.01 * rng.choice([0.8, 1.2])
        answers.append(Answer("engine-0", float(number), free, 10, (100,), 0.0))
    found, _ = fit_decoding(answers, [(answer.start, answer.stop) for answer in answers], most=1)
    assert found.step + found.sequence == pytest.approx(0.01, rel=0.05)
