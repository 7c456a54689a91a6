"""An engine's time: known values, and every decoding step counted one by one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.preflight.simulation.engine import Decoding, Engine

SPEED = Decoding(step=0.1, sequence=0.05)


def ends(engine: Engine) -> list[tuple[float, list[int]]]:
    """When which prompts end, if nothing more comes."""
    found = []
    while (now := engine.next_end()) < math.inf:
        found.append((pytest.approx(now), engine.end(now)))
    return found


def test_a_longer_sequence_goes_on_faster_alone() -> None:
    engine = Engine(SPEED, most=8)
    engine.add(0.0, 1, [10])
    engine.add(0.0, 2, [20])
    # 10 steps of 0.2 s for both, 10 of 0.15 s for one.
    assert ends(engine) == [(2.0, [1]), (3.5, [2])]
    assert (engine.steps, engine.work) == pytest.approx((20, 30))


def test_a_prompt_ends_with_its_last_response() -> None:
    engine = Engine(SPEED, most=8)
    engine.add(1.0, 7, [4, 2])
    assert ends(engine) == [(1.4, []), (1.7, [7])]


def test_what_does_not_fit_into_the_batch_waits() -> None:
    engine = Engine(SPEED, most=1)
    engine.add(0.0, 1, [10])
    engine.add(0.0, 2, [10])
    assert ends(engine) == [(1.5, [1]), (3.0, [2])]


def test_a_paused_engine_loses_nothing() -> None:
    engine = Engine(SPEED, most=8)
    engine.add(0.0, 1, [10])
    engine.pause(0.6, paused=True)
    assert engine.next_end() == math.inf
    engine.add(2.0, 2, [2])
    engine.pause(5.0, paused=False)
    # 4 of 10 steps are done; 2 with both, 4 alone.
    assert ends(engine) == [(5.4, [2]), (6.0, [1])]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
def test_the_time_is_that_of_all_its_steps(lengths: list[int], most: int) -> None:
    engine = Engine(SPEED, most)
    for prompt, length in enumerate(lengths):
        engine.add(0.0, prompt, [length])
    waiting, running, now, expected = list(enumerate(lengths)), {}, 0.0, {}
    while waiting or running:
        while waiting and len(running) < most:
            prompt, length = waiting.pop(0)
            running[prompt] = length
        now += SPEED.step + SPEED.sequence * len(running)
        running = {prompt: left - 1 for prompt, left in running.items()}
        expected |= {prompt: now for prompt, left in running.items() if not left}
        running = {prompt: left for prompt, left in running.items() if left}
    found = {prompt: when for when, prompts in ends(engine) for prompt in prompts}
    assert found == expected
