"""A recorded run is replayed: whatever the order in which its responses arrived, the replay takes them in the same one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.loop.keeping import taken_of
from rlhf.loop.online import OnlineLoop
from rlhf.loop.replay import RecordedRewards, RecordedRollouts, Recording, ReplayError
from rlhf.loop.roles import Roles
from rlhf.tracking.responses import Taken, TakenPrompt
from rlhf.types import Failed, Outcome, Rollout, Score
from tests.loop.fakes import jumbled, make_loop, steps

STEPS = 4
PROMPTS = 40
UNRECORDED = ("time/", "throughput/", "idle/", "loop/ready")


def chance(rollout: Rollout) -> list[Outcome]:
    """By the prompt: some teach nothing because rewards tie, others because one failed."""
    rng = random.Random(rollout.prompt.id)
    rewards: list[Outcome] = [Score(float(rng.randrange(3))) for _ in rollout.infos]
    return [Failed("by chance"), *rewards[1:]] if rng.random() < 0.2 else rewards


def loop_of(**options: Any) -> OnlineLoop:
    return make_loop(chance, PROMPTS, **options)


def recorded(took: Sequence[Sequence[Taken]]) -> Recording:
    prompts = [[TakenPrompt(one.place, one.prompt_id) for one in some] for some in took]
    return Recording(prompts, lambda step: took[step - 1])


def take(loop: OnlineLoop, count: int = STEPS) -> list[list[Taken]]:
    """What so many steps took."""
    judged = asyncio.run(steps(loop, count))
    return [[taken_of(one, tuple(one.rollout.completions.value)) for one in some] for some in judged]


def replay(loop: OnlineLoop, recording: Recording) -> OnlineLoop:
    """The same loop with the recording in place of engines and judge."""
    rollouts = RecordedRollouts(recording)
    loop.roles = Roles(loop.roles.policy, rollouts, RecordedRewards(rollouts))
    return loop


def learned(loop: OnlineLoop) -> Any:
    """All that is left of a run: batches, pieces, metrics, what became of the prompts."""
    policy, state = loop.roles.policy, loop.state
    lines = [
        {name: value for name, value in line.items() if not name.startswith(UNRECORDED)} for line in loop.record.lines
    ]
    batches = [[(one.rollout.prompt.id, one.rollout.infos, one.items) for one in batch] for batch in policy.learned]
    return batches, policy.pieces, policy.contexts, lines, state.state()


@given(
    seed=st.integers(0, 2**32),
    staleness=st.integers(0, 3),
    stream=st.sampled_from(["auto", "always", "never"]),
    refill=st.integers(0, 2),
    updates=st.integers(1, 2),
    budget=st.integers(4, 16),
    normalised=st.booleans(),
)
@settings(max_examples=60)
def test_any_order_of_arrival_is_replayed(
    seed: int, staleness: int, stream: str, refill: int, updates: int, budget: int, normalised: bool
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "loop": {
            "steps": STEPS, "prompts_per_step": 4, "staleness": staleness, "stream": stream, "refill": refill,
            "updates_per_step": updates,
        },
        "policy": {"micro_batch_tokens": budget},
        "reward": {"max_failed_fraction": 1.0, "transforms": [{"name": "normalise"}] if normalised else []},
    }  # fmt: skip
    loop = jumbled(loop_of(**sections), seed)
    took = take(loop)
    again = replay(loop_of(**sections), recorded(took))
    assert repr(take(again)) == repr(took), "it can be recorded and replayed in its turn"
    assert learned(again) == learned(loop)


def test_without_a_recording_the_order_of_arrival_makes_other_pieces() -> None:
    loops = [
        jumbled(loop_of(loop={"steps": STEPS, "staleness": 2}, policy={"micro_batch_tokens": 8}), seed)
        for seed in (1, 2)
    ]
    took = [take(loop) for loop in loops]
    assert loops[0].roles.policy.pieces != loops[1].roles.policy.pieces
    for one, other in zip(*took, strict=True):
        assert {some.prompt_id for some in one} == {some.prompt_id for some in other}, "of the same prompts"


# What cannot be


def test_another_prompt_in_some_place_is_refused_when_it_starts() -> None:
    took = take(loop_of())
    took[1][2], took[2][0] = took[2][0], took[1][2]
    with pytest.raises(ReplayError, match=r"prompt number \d+ is p\d+ here, and was p\d+ in the recorded run"):
        take(replay(loop_of(), recorded(took)))


def test_more_prompts_than_were_recorded_are_refused() -> None:
    took = take(loop_of(), 2)
    with pytest.raises(ReplayError, match="prompt number 9 is p8 here, and was none"):
        take(replay(loop_of(), recorded(took)))


@pytest.mark.parametrize("stream", ["always", "never"])
def test_a_step_that_takes_them_in_another_order_is_refused(stream: str) -> None:
    took = take(jumbled(loop_of(loop={"stream": "always"}), 1), 1)
    recording = recorded(took)
    loop = loop_of(loop={"stream": stream})
    (judged,) = asyncio.run(steps(replay(loop, recording)))
    if stream == "always":
        recording.require(1, judged)
        judged = judged[::-1]
    with pytest.raises(ReplayError, match="step 1 took the prompts"):
        recording.require(1, judged)
