"""What a step's timings come to: complete ones, and what is still under way when the step ends."""

from __future__ import annotations

import asyncio

import pytest

from rlhf.loop.clock import Timings
from rlhf.tracking.spans import Timing
from rlhf.types import Score
from tests.loop.fakes import Lines, Stage, make_loop, steps


def test_each_step_is_described_by_what_lies_in_it() -> None:
    record = Lines(Stage())
    timings = Timings(record)
    noted = [
        Timing("engine-0", "sample", 10.0, 14.0, 1),
        Timing("engine-0", "sample", 11.0, 15.0, 1),
        Timing("reward", "judge", 15.0, 16.0, 1),
        Timing("loop", "wait", 10.0, 16.0, 1),
        Timing("policy", "learn", 16.0, 18.0, 1),
        Timing("policy", "publish", 18.0, 19.0, 1),
    ]
    for timing in noted:
        timings.timing(timing)
    # The second engine began a prompt at 17, and writes it on in the next step.
    first = timings.describe(10.0, 20.0, 2, [(1, 17.0)])
    assert first == pytest.approx({"idle/engines": 1 - (5 + 3) / 20, "idle/policy": 0.7, "time/wait": 6.0})
    timings.timing(Timing("engine-1", "sample", 17.0, 22.0, 2))
    second = timings.describe(20.0, 24.0, 2, [])
    assert second == pytest.approx({"idle/engines": 1 - 2 / 8, "idle/policy": 1.0, "time/wait": 0.0})
    assert record.timings == [*noted, Timing("engine-1", "sample", 17.0, 22.0, 2)]


@pytest.mark.parametrize("staleness", [0, 2])
def test_every_step_of_a_run_says_who_was_idle(staleness: int) -> None:
    loop = make_loop(
        lambda rollout: [Score(float(i)) for i in range(len(rollout.infos))],
        loop={"prompts_per_step": 2, "staleness": staleness, "steps": 3},
    )
    asyncio.run(steps(loop, 3))
    for line in loop.record.lines:
        assert 0 <= line["idle/engines"] <= 1 and 0 < line["idle/policy"] < 1
        assert 0 < line["time/wait"] < line["time/step"]
    learned = [timing for timing in loop.record.timings if timing.what == "learn"]
    wholes = [timing for timing in learned if "piece" not in timing.facts]
    assert [timing.step for timing in wholes] == [1, 2, 3]
    assert all(timing.facts["tokens"] == 2 * (1 + 2) for timing in wholes), (
        "a prompt of one token, two responses of one"
    )
