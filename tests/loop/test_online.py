"""The loop as a unit, with stand-ins for its roles: the order of a step, and what is left of it when a call fails or it is cancelled."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Coroutine
from typing import Any

import pytest

from rlhf.cluster import ActorDied
from rlhf.loop import roles, turns
from rlhf.loop.online import OnlineLoop
from rlhf.types import Prompt, Rollout, Score
from tests.loop import fakes
from tests.loop.fakes import Stage, make_loop, steps

COLLECT = ["rollouts.sample", "rollouts.probe", "rewards.judge", "rewards.check"]
TO_POLICY = ["rollouts.offload", "rewards.offload", "policy.reload"]
LEARN = ["policy.check_engines", "policy.learn", "policy.follow"]
TO_ENGINES = ["policy.offload", "rollouts.reload", "rewards.reload"]
PUBLISH = ["policy.send_weights", "rollouts.receive", "rollouts.accept"]
RECORD = ["record.step"]
STEP = COLLECT + TO_POLICY + LEARN + TO_ENGINES + PUBLISH + RECORD
AT_ONCE = {"rollouts.accept", "record.step"}
"""Calls in which nothing can be cancelled, because they do not wait."""
ONE = {"prompts_per_step": 1}


def distinct(rollout: Rollout) -> list[Score]:
    return [Score(float(i)) for i in range(len(rollout.infos))]


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    """Its result; afterwards no task may be left."""

    async def alone() -> Any:
        try:
            return await scenario
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left that nobody waits for"

    return asyncio.run(alone())


def make(stage: Stage | None = None, **options: Any) -> OnlineLoop:
    return make_loop(distinct, turns=True, stage=stage or Stage(), **{"loop": ONE} | options)


def calls(loop: OnlineLoop) -> list[str]:
    return loop.roles.policy.stage.calls


def forget_calls(loop: OnlineLoop) -> None:
    calls(loop).clear()


# What the loop asks of its roles


@pytest.mark.parametrize(
    ("protocol", "fake"),
    [(roles.PolicyRole, fakes.Policy), (roles.RolloutRole, fakes.Rollouts), (roles.RewardRole, fakes.Rewards)],
)
def test_the_stand_ins_have_the_methods_of_the_roles(protocol: type, fake: type) -> None:
    """mypy compares the real ones with the protocols where they are started; it does not read tests."""
    for name, method in inspect.getmembers(protocol, inspect.isfunction):
        if not name.startswith("_"):
            mine = getattr(fake, name)
            assert inspect.signature(mine) == inspect.signature(method), name
            assert inspect.iscoroutinefunction(mine) == inspect.iscoroutinefunction(method), name
    for name, _ in inspect.getmembers(protocol, lambda member: isinstance(member, property)):
        assert hasattr(fake, name), name


# The order of a step


def test_a_step_samples_judges_learns_and_publishes_in_this_order() -> None:
    loop = make()
    ((judged,),) = run(steps(loop))
    assert judged.feedback.outcomes == (Score(0.0), Score(1.0))
    assert calls(loop) == STEP
    assert (loop.state.step, loop.state.version, loop.roles.rollouts.version) == (1, 1, 1)
    assert loop.state.ledger.settled == {"trained": 1}


def test_where_nobody_shares_devices_nobody_takes_turns() -> None:
    loop = make_loop(distinct, loop=ONE)
    run(steps(loop))
    assert calls(loop) == COLLECT + LEARN + PUBLISH + RECORD


def test_a_further_prompt_is_asked_for_before_anybody_learns() -> None:
    loop = make_loop(
        lambda rollout: [Score(float(i * (rollout.prompt.id == "p1"))) for i in range(len(rollout.infos))],
        loop={"prompts_per_step": 1, "refill": 1},
    )
    run(steps(loop))
    assert calls(loop)[:6] == [
        "rollouts.sample", "rollouts.probe", "rewards.judge", "rollouts.sample", "rewards.judge", "rewards.check",
    ]  # fmt: skip
    assert loop.state.ledger.settled == {"trained": 1, "tie": 1}


def test_a_step_that_teaches_nothing_is_published_and_recorded_all_the_same() -> None:
    loop = make_loop(lambda rollout: [Score(0.0)] * len(rollout.infos), turns=True, loop=ONE)
    run(steps(loop))
    assert calls(loop) == [call for call in STEP if call != "policy.learn"]
    assert (loop.state.step, loop.state.version) == (1, 1)


@pytest.mark.parametrize(("follows", "level", "sent"), [(False, 1, 1), (True, 1, 2), (False, 2, 2)])
def test_the_second_model_is_sent_when_it_changed_or_was_lost(follows: bool, level: int, sent: int) -> None:
    loop = make(algorithm={"name": "nash_ema"}, rollout={"sleep_level": level})
    loop.roles.policy.partner_follows = follows
    run(steps(loop))
    assert calls(loop)[-1 - 3 * sent : -1] == PUBLISH * sent


@pytest.mark.parametrize("level", [1, 2])
def test_after_a_turn_between_steps_the_engines_hold_the_same_version(level: int) -> None:
    loop = make(rollout={"sleep_level": level})
    run(steps(loop))
    forget_calls(loop)
    run(loop.measure([]))
    assert calls(loop) == TO_POLICY + ["policy.measure"] + TO_ENGINES + (PUBLISH if level == 2 else [])
    assert loop.roles.rollouts.version == loop.state.version == 1


def test_a_prompt_is_judged_while_another_is_still_sampled() -> None:
    loop = make_loop(distinct, loop={"prompts_per_step": 2})
    judged, sample, judge = asyncio.Event(), loop.roles.rollouts.sample, loop.roles.rewards.judge

    async def slow(prompt: Prompt, *args: Any, **options: Any) -> Rollout:
        if prompt.id == "p1":
            await asyncio.wait_for(judged.wait(), 5)
        return await sample(prompt, *args, **options)

    async def told(rollout: Rollout) -> Any:
        judged.set()
        return await judge(rollout)

    loop.roles.rollouts.sample, loop.roles.rewards.judge = slow, told
    assert len(run(steps(loop))[0]) == 2, "the second one waited for the verdict on the first"


def test_the_factor_on_the_kl_follows_from_step_to_step() -> None:
    """Each step learns with the factor that the one before left; the run's state has it, and a resumed run goes on with it."""
    algorithm = {"name": "ppo", "kl_target": 1.0, "kl_horizon": 10, "kl_coef": 0.1}
    loops = [make(algorithm=algorithm) for _ in range(2)]
    for _ in range(2):
        run(steps(loops[0]))
    first, second = (step.kl_coef for step in loops[0].roles.policy.contexts)
    assert [line["policy/kl_coef"] for line in loops[0].record.lines] == [first, second] and first == 0.1 < second
    loops[1].state.restore(json.loads(json.dumps(loops[0].state.state())))
    run(loops[1].publish())
    for loop in loops:
        run(steps(loop))
    assert loops[1].roles.policy.contexts[-1] == loops[0].roles.policy.contexts[-1]
    assert loops[1].record.lines[-1]["step"] == 3 and loops[1].state.version == 3


# A call that fails


@pytest.mark.parametrize("call", STEP)
def test_a_call_that_fails_ends_the_step_with_its_error(call: str, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    loop = make(stage)
    before = json.loads(json.dumps(loop.state.state()))
    stage.failing[call] = error = RuntimeError("the reason")
    with pytest.raises(RuntimeError) as caught:
        run(steps(loop))
    assert caught.value is error and error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None, "nothing stands between it and the user"
    assert loop.state.step == 0

    # A prompt that nobody learned from is still out, and a resumed run draws it again.
    out = [] if call == "record.step" else loop.roles.rollouts.sampled
    assert loop.state.state()["ledger"].get("out", []) == out
    again = make()
    again.state.restore(before)
    assert [one.id for one in again.state.ledger.lease(1)] == loop.roles.rollouts.sampled

    # The devices are the engines' again, unless it is the handing over that failed.
    if call not in TO_ENGINES:
        assert stage.on_devices - {"policy"} == {"engines", "rewards"}
        assert "policy" not in stage.on_devices
    assert not caplog.records


@pytest.mark.parametrize("broken", TO_ENGINES)
def test_the_first_error_is_seen_when_the_devices_cannot_be_handed_back_either(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    loop = make(stage)
    stage.failing = {"policy.learn": RuntimeError("the reason"), broken: ActorDied("and this")}
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="the reason"):
        run(steps(loop))
    assert "could not hand its devices back" in caplog.text and "and this" in caplog.text


def test_after_an_error_nobody_waits_long_for_a_rank_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "HAND_BACK_S", 0.01)
    stage = Stage()
    loop = make(stage)
    stage.failing["policy.learn"] = RuntimeError("the reason")
    stage.silent = STEP.index("policy.learn") + 2
    with pytest.raises(RuntimeError, match="the reason"):
        run(steps(loop))
    assert stage.cancelled == ["policy.offload"]


def test_when_a_prompt_fails_the_others_are_not_sampled_on() -> None:
    stage = Stage()
    loop = make(stage, loop={"prompts_per_step": 3})
    stage.failing["rewards.judge"] = error = RuntimeError("the reason")
    stage.silent = 3  # the last prompt's sampling
    with pytest.raises(RuntimeError) as caught:
        run(steps(loop))
    assert caught.value is error and "rollouts.sample" in stage.cancelled


def test_a_dead_actor_is_named_before_what_failed_because_of_it() -> None:
    stage = Stage()
    loop = make(stage)
    stage.failing = {"policy.send_weights": RuntimeError("connection reset"), "rollouts.receive": ActorDied("engine 1")}
    with pytest.raises(ActorDied, match="engine 1"):
        run(steps(loop))


# A step that is cancelled


@pytest.mark.parametrize("place", [place for place, call in enumerate(STEP, 1) if call not in AT_ONCE])
def test_a_step_can_be_cancelled_wherever_it_waits(place: int) -> None:
    stage = Stage()
    stage.silent = place
    loop = make(stage)

    async def scenario() -> None:
        task = asyncio.create_task(steps(loop))
        await stage.reached.wait()
        for _ in range(10):  # what else can go on does
            await asyncio.sleep(0)
        made = list(stage.calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stage.calls == made, "nothing is begun that the run would have to wait for"

    run(scenario())
    assert STEP[place - 1] in stage.cancelled
    assert loop.state.step == 0 and not loop.record.lines


def test_a_run_can_be_cancelled_while_it_hands_back_after_an_error() -> None:
    stage = Stage()
    stage.failing["policy.learn"] = RuntimeError("the reason")
    stage.silent = STEP.index("policy.learn") + 2
    loop = make(stage)

    async def scenario() -> None:
        task = asyncio.create_task(steps(loop))
        await stage.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
