"""The simulated loop: known times, no prompt lost or too old, and what more engines and a larger bound do."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.preflight.simulation.engine import Decoding
from rlhf.preflight.simulation.events import Simulation, simulate
from rlhf.preflight.simulation.fit import Fitted, Line
from rlhf.preflight.simulation.recorded import Answer
from rlhf.preflight.simulation.scenario import Scenario

BASE = Scenario(
    engines=2, ranks=1, prompts=16, staleness=0, refill=0, updates=1, most=8, piece_tokens=1000, max_tokens=400, longer=1.0,
    stream=False, keep=True,
)  # fmt: skip


def fitted(lengths: list[tuple[int, ...]], **changed: object) -> Fitted:
    """Every prompt of 20 tokens; all of what is sampled is learned from."""
    speeds = Fitted(
        decoding=Decoding(0.01, 0.002),
        batches_differ=True,
        whole=Line(0.5, 1e-3),
        piece=Line(0.1, 1e-3),
        end=Line(0.4, 0.0),
        publish=[0.3],
        answers=[Answer("engine-0", 0.0, 1.0, 20, tokens, 0.07) for tokens in lengths],
        learned_share=1.0,
        taught_share=1.0,
        other_s=0.2,
    )
    return replace(speeds, **changed)


def long_tailed() -> Fitted:
    rng = random.Random(3)
    return fitted([tuple(min(400, int(rng.lognormvariate(4, 1)) + 1) for _ in range(2)) for _ in range(200)])


def test_a_synchronous_step_is_the_sum_of_its_parts() -> None:
    """8 prompts of one response each to both engines, all equally long."""
    result = simulate(BASE, fitted([(100,)]))
    sampling = 100 * (0.01 + 8 * 0.002)
    learning = 0.5 + 1e-3 * 16 * 120
    expected = sampling + 0.07 + 0.2 + learning + 0.3
    assert result.step_s == pytest.approx(expected)
    assert result.idle_engines == pytest.approx(1 - sampling / expected)
    assert result.idle_policy == pytest.approx(1 - (learning + 0.3) / expected)
    assert result.tokens_per_s == pytest.approx(1600 / expected)


def test_pieces_are_learned_from_while_others_are_written() -> None:
    """One engine that writes one response after the other; a piece of each, and only the last one's is waited for."""
    one = replace(BASE, engines=1, most=1, prompts=4, stream=True, piece_tokens=1)
    result = simulate(one, fitted([(100,)]))
    last = 4 * 100 * 0.012 + 0.07
    assert result.step_s == pytest.approx(last + (0.1 + 0.12) + 0.4 + 0.3)


def test_twice_the_ranks_halve_what_depends_on_tokens_and_longer_responses_take_longer() -> None:
    known = fitted([(100,)])
    base = simulate(BASE, known).step_s
    assert base - simulate(replace(BASE, ranks=2), known).step_s == pytest.approx(1e-3 * 16 * 120 / 2)
    longer = simulate(replace(BASE, longer=2.0), known).step_s
    assert longer - base == pytest.approx(100 * (0.01 + 8 * 0.002) + 1e-3 * 16 * 100)


SCENARIOS = st.builds(
    Scenario,
    engines=st.integers(1, 5),
    ranks=st.integers(1, 3),
    prompts=st.integers(1, 12),
    staleness=st.integers(0, 4),
    refill=st.integers(0, 2),
    updates=st.integers(1, 3),
    most=st.integers(1, 16),
    piece_tokens=st.integers(1, 1000),
    max_tokens=st.just(400),
    longer=st.floats(0.2, 3),
    stream=st.booleans(),
    keep=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(SCENARIOS, st.floats(0.2, 1), st.integers(0, 100))
def test_every_step_gets_its_prompts_and_none_is_too_old(one: Scenario, taught: float, seed: int) -> None:
    speeds = replace(long_tailed(), taught_share=taught)
    simulation = Simulation(one, speeds, seed)
    steps = simulation.run(one.staleness + 6)
    for step in steps:
        assert one.prompts <= step.taken <= one.prompts * (1 + one.refill)
        assert 0 <= step.staleness <= one.staleness
        assert 0 < step.policy_s <= step.seconds + 1e-9
        assert -1e-9 <= step.engines_s <= one.engines * step.seconds + 1e-9
    # Nothing is lost: what was started was taken, or is on its way, within the bound.
    started = simulation._admission.started
    ahead = started - sum(step.taken for step in steps)
    assert 0 <= ahead <= one.prompts * (one.staleness + 1 + one.refill)
    assert steps == Simulation(one, speeds, seed).run(len(steps)), "the same seed gives the same run"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_larger_bound_is_not_slower(keep: bool, seed: int) -> None:
    speeds, one = long_tailed(), replace(BASE, keep=keep)
    times = [simulate(replace(one, staleness=k, stream=k > 0), speeds, seed).step_s for k in (0, 1, 2, 4)]
    assert all(later <= 1.03 * earlier for earlier, later in zip(times, times[1:], strict=False)), times
    assert times[-1] < 0.8 * times[0], "sampling and learning overlap"


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_more_engines_are_not_slower(staleness: int, seed: int) -> None:
    speeds = long_tailed()
    times = [simulate(replace(BASE, staleness=staleness, engines=n), speeds, seed).step_s for n in (1, 2, 4, 8)]
    assert all(later <= 1.03 * earlier for earlier, later in zip(times, times[1:], strict=False)), times
    assert times[1] < times[0]


def test_no_run_is_faster_than_either_of_its_parts() -> None:
    """However far ahead: engines must write all tokens, and the ranks learn from them."""
    speeds = long_tailed()
    result = simulate(replace(BASE, staleness=4, stream=True), speeds)
    learning = 1 - result.idle_policy
    assert result.idle_engines < 0.02 or learning > 0.95
    assert result.tokens_per_s <= 2 * 8 / (0.01 + 8 * 0.002) * 1.001
