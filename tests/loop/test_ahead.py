"""The loop ahead of its policy, with stand-ins for the roles: what is sampled when, in which pieces it is learned from, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.loop.online import OnlineLoop
from rlhf.rollout import StaleWeights
from rlhf.types import Prompt, Rollout, Score
from tests.loop.fakes import Stage, make_loop, steps
from tests.loop.test_online import distinct, run

Sample = Callable[..., Any]


def make(stage: Stage | None = None, judge: Callable[[Rollout], list[Score]] = distinct, **loop: Any) -> OnlineLoop:
    """A loop of 4 steps with 2 prompts each, which is one step ahead."""
    settings = {"prompts_per_step": 2, "staleness": 1, "steps": 4} | loop
    return make_loop(judge, stage=stage, loop=settings, policy={"model": "unused", "micro_batch_tokens": 5000})


def hold(loop: OnlineLoop, *held: str) -> asyncio.Event:
    """Let these prompts be answered only after the event."""
    event, sample = asyncio.Event(), loop.roles.rollouts.sample

    async def slow(prompt: Prompt, *args: Any, **options: Any) -> Rollout:
        rollout = await sample(prompt, *args, **options)
        if prompt.id in held:
            await event.wait()
        return rollout

    loop.roles.rollouts.sample = slow
    return event


def learned(loop: OnlineLoop) -> list[list[str]]:
    return [[one.rollout.prompt.id for one in step] for step in loop.roles.policy.learned]


def test_a_run_samples_one_step_ahead_and_learns_from_every_prompt_once() -> None:
    loop = make()
    run(steps(loop, 4))
    assert learned(loop) == [["p0", "p1"], ["p2", "p3"], ["p4", "p5"], ["p6", "p7"]]
    assert loop.roles.rollouts.sampled == [f"p{i}" for i in range(8)], "and nothing that no step learns from"
    ages = [line["staleness/mean"] for line in loop.record.lines]
    assert ages == [0, 1, 1, 1], "the first step's prompts and the second one's start together"
    assert loop.state.ledger.settled == {"trained": 8}
    assert loop.state.state()["ledger"].get("out") is None


def test_while_the_policy_learns_the_next_prompts_are_sampled() -> None:
    loop = make(stream="never")
    seen: list[int] = []
    learn = loop.roles.policy.learn

    async def slow(*args: Any) -> dict[str, float]:
        for _ in range(20):
            await asyncio.sleep(0)
        seen.append(len(loop.roles.rollouts.sampled))
        return await learn(*args)

    loop.roles.policy.learn = slow
    run(steps(loop, 4))
    assert seen == [4, 6, 8, 8]


def test_a_slow_prompt_keeps_its_place() -> None:
    """Others that started later come back first and wait for their step: the slow one is neither dropped nor overtaken."""
    loop = make(stream="never")
    event = hold(loop, "p2")

    async def scenario() -> None:
        async with loop.producing():
            await loop.step()
            second = asyncio.create_task(loop.step())
            for _ in range(50):
                await asyncio.sleep(0)
            assert not second.done() and learned(loop) == [["p0", "p1"]]
            assert loop.record.lines[-1]["step"] == 1
            event.set()
            await second
            await loop.step()
            await loop.step()

    run(scenario())
    assert learned(loop)[1] == ["p2", "p3"]


def test_a_step_is_learned_from_in_pieces_as_its_prompts_come_back() -> None:
    """Each prompt that fills a micro-batch is a piece; the others are one together with what comes after them."""
    loop = make_loop(
        distinct,
        loop={"prompts_per_step": 3, "stream": "always", "steps": 1},
        policy={"model": "unused", "micro_batch_tokens": 2600},
        data={"prompts": "unused.jsonl", "shuffle": False, "max_prompt_tokens": 2000},
        rollout={"max_tokens": 256},
    )
    loop.roles.rollouts.lengths = {"p0": 300, "p1": 2000, "p2": 300}
    event = hold(loop, "p0")

    async def scenario() -> None:
        async with loop.producing():
            step = asyncio.create_task(loop.step())
            for _ in range(50):
                await asyncio.sleep(0)
            assert loop.roles.policy.pieces == [(0, ["p1"])], "learned from before p0 is there"
            event.set()
            await step

    run(scenario())
    calls = loop.roles.policy.stage.calls
    assert loop.roles.policy.pieces == [(0, ["p1"]), (0, ["p2", "p0"])]
    assert [call for call in calls if call.startswith("policy.")] == [
        "policy.begin", "policy.accumulate", "policy.accumulate", "policy.check_engines", "policy.finish", "policy.follow",
        "policy.send_weights",
    ]  # fmt: skip
    assert calls.index("rewards.check") < calls.index("policy.finish"), (
        "nothing is learned for good before the judge is known to be sound"
    )


def test_a_piece_belongs_to_one_optimizer_step() -> None:
    loop = make(prompts_per_step=4, updates_per_step=2, steps=1)
    run(steps(loop))
    assert [(update, len(ids)) for update, ids in loop.roles.policy.pieces] == [(0, 2), (1, 2)]


def test_prompts_that_teach_nothing_are_replaced_by_those_that_follow() -> None:
    """p1 is a tie: p2, which was started for the next step, takes its place, and one more may start for each."""

    def judge(rollout: Rollout) -> list[Score]:
        return [Score(float(i) * (rollout.prompt.id != "p1")) for i in range(len(rollout.infos))]

    loop = make(judge=judge, refill=1)
    run(steps(loop, 4))
    assert [len(step) for step in learned(loop)] == [2, 2, 2, 2]
    assert sorted(learned(loop)[0]) == ["p0", "p2"]
    assert len(loop.roles.rollouts.sampled) == 9 and loop.state.ledger.settled == {"trained": 8, "tie": 1}
    assert all(line["staleness/max"] <= 1 for line in loop.record.lines)


def test_a_small_data_set_lets_the_run_go_on_as_far_ahead_as_it_can() -> None:
    """3 prompts, 2 of them in each step: the next step cannot have all of its prompts before they are settled."""
    loop = make_loop(distinct, 3, loop={"prompts_per_step": 2, "staleness": 3, "steps": 5})
    run(steps(loop, 5))
    assert [len(set(step)) for step in learned(loop)] == [2] * 5


def test_an_answer_of_too_old_weights_ends_the_run() -> None:
    loop = make()
    accept = loop.roles.rollouts.accept
    loop.roles.rollouts.accept = lambda shipment, fingerprint: None  # the engines keep the weights of the start
    with pytest.raises(StaleWeights, match="loop.staleness allows 1"):
        run(steps(loop, 4))
    assert accept and loop.state.step == 2, "the third step's prompts were started after the first publish"


@pytest.mark.parametrize("call", ["rollouts.sample", "rewards.judge"])
def test_a_prompt_that_fails_ends_the_step_that_learns(call: str) -> None:
    """Its error is the run's, whatever the loop is doing, and nothing is left running."""
    stage = Stage()
    loop = make(stage)

    async def scenario() -> None:
        async with loop.producing():
            await loop.step()
            stage.failing[call] = RuntimeError("the reason")
            for _ in range(3):
                await loop.step()

    with pytest.raises(RuntimeError, match="the reason"):
        run(scenario())


def test_a_run_that_is_cancelled_ends_all_that_is_under_way() -> None:
    loop = make()
    hold(loop, "p0", "p3")

    async def scenario() -> None:
        task = asyncio.create_task(steps(loop, 4))
        for _ in range(50):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
    assert loop.state.state()["ledger"]["out"] == ["p0", "p1", "p2", "p3"], "a resumed run leases them again"


def test_what_the_loop_waited_for_and_who_worked_is_recorded() -> None:
    loop = make()
    run(steps(loop, 4))
    kinds = {(timing.who, timing.what) for timing in loop.record.timings}
    assert kinds == {
        ("engine-0", "sample"), ("reward", "judge"), ("loop", "wait"), ("policy", "learn"), ("policy", "publish"),
    }  # fmt: skip
    samples = [timing for timing in loop.record.timings if timing.what == "sample"]
    assert sorted(timing.facts["place"] for timing in samples) == list(range(8))
    assert all(timing.start <= timing.stop for timing in loop.record.timings)
