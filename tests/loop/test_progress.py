"""A run that learns nothing says so and stops; prompts that teach nothing are replaced. The loop itself, with numbers for models."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms import Algorithm, Contrast, Preference, Source
from rlhf.loop.online import OnlineLoop
from rlhf.loop.progress import BuilderFailing, NothingLearned, RewardsFailing, require_some_reward
from rlhf.loop.sampling import step_samplings
from rlhf.types import Failed, Invalid, Outcome, Rollout, Score, TimedOut, TrainingItem
from tests.loop.fakes import make_loop
from tests.loop.fakes import steps as take
from tests.loop.test_methods import train

DR_GRPO = {"name": "dr_grpo", "samples_per_prompt": 3}
NORMALISED = {"kind": "function", "path": "my_rewards:score", "transforms": [{"name": "normalise"}]}


def run(loop: OnlineLoop, steps: int = 1) -> list[dict[str, Any]]:
    """The lines of all steps, after so many more."""

    asyncio.run(take(loop, steps))
    return loop.record.lines


def number(rollout: Rollout) -> int:
    return int(rollout.prompt.id[1:])


def distinct(rollout: Rollout) -> list[Outcome]:
    return [Score(float(i)) for i in range(len(rollout.infos))]


def equal(rollout: Rollout) -> list[Outcome]:
    return [Score(1.0)] * len(rollout.infos)


def only(teaching: Sequence[int]) -> Any:
    """Distinct rewards for these prompts, equal ones for the others."""
    return lambda rollout: distinct(rollout) if number(rollout) in teaching else equal(rollout)


# Dynamic sampling


@given(
    total=st.integers(1, 24),
    size=st.integers(1, 6),
    refill=st.integers(0, 4),
    method=st.sampled_from(["online_dpo", "dr_grpo"]),
    data=st.data(),
)
def test_a_step_is_filled_within_its_cap_and_every_prompt_ends_once(
    total: int, size: int, refill: int, method: str, data: st.DataObject
) -> None:
    size = min(size, total)
    teaching = data.draw(st.sets(st.integers(0, total - 1)))
    algorithm = {"name": method, "samples_per_prompt": 2}
    loop = make_loop(
        only(sorted(teaching)), total, loop={"prompts_per_step": size, "refill": refill}, algorithm=algorithm
    )
    for step in (1, 2):
        before = len(loop.roles.rollouts.sampled)
        drawn = before % total  # in file order, and the first step leaves no prompt out
        (line,) = run(loop)[-1:]
        asked = [int(one[1:]) for one in loop.roles.rollouts.sampled[before:]]
        most = min(size * (1 + refill), total)
        expected = [(drawn + i) % total for i in range(most)]
        if step == 1:  # the border of two epochs changes the order later on
            assert asked == expected[: len(asked)]
        assert len(set(asked)) == len(asked), "no prompt twice in a step"
        assert size <= len(asked) <= most
        good = [one for one in asked if one in teaching]
        trained = [number(one.rollout) for one in loop.roles.policy.learned[-1]] if line["loop/prompts_trained"] else []
        if refill:
            assert trained == good[:size], "the first that teach something"
            assert len(good) >= size or len(asked) == most, "all that may be asked for was asked for"
            assert line["refill/prompts"] == len(asked) - size
            assert line["refill/rounds"] <= len(asked) - size
            assert line.get("dropped/surplus", 0) == len(good) - len(trained)
        else:
            assert trained == (asked if method == "dr_grpo" else good)
        assert line["loop/prompts_trained"] + sum(n for name, n in line.items() if name.startswith("dropped/")) == len(
            asked
        )
        assert line["rollout/responses"] == 2 * len(asked), "all that was sampled counts"
    ledger = loop.state.ledger.state()  # raises if a prompt is still out
    assert sum(ledger["settled"].values()) == ledger["drawn"]


def test_the_same_prompts_are_asked_for_again() -> None:
    """What is asked for depends on seeds and verdicts alone."""
    loops = [make_loop(only([1, 3, 5, 6, 17]), 24, loop={"prompts_per_step": 3, "refill": 3}) for _ in range(2)]
    lines = [run(loop, 2) for loop in loops]
    assert loops[0].roles.rollouts.sampled == loops[1].roles.rollouts.sampled == [f"p{i}" for i in range(18)]
    assert [line["refill/prompts"] for line in lines[0]] == [3.0, 9.0]
    assert [line["refill/rounds"] for line in lines[0]] == [1.0, 3.0]
    assert lines[0][0]["warnings"] == []
    (warning,) = lines[0][1]["warnings"]
    assert warning.startswith("2 prompts instead of 3 taught something, though 12 were tried (tie 10)")


def test_a_round_asks_for_as_many_as_should_fill_the_batch() -> None:
    """One of the first four teaches, so three places ask for four more, not three; what is then too much is dropped as such."""
    (line,) = run(loop := make_loop(only([0, 4, 5, 6, 7]), loop={"prompts_per_step": 4, "refill": 2}))
    assert (line["refill/prompts"], line["refill/rounds"]) == (4, 1)
    assert [number(one.rollout) for one in loop.roles.policy.learned[0]] == [0, 4, 5, 6]
    assert loop.state.ledger.settled == {"trained": 4, "tie": 3, "surplus": 1}
    assert line["warnings"] == []


def test_without_refill_a_group_of_equal_rewards_stays_in_the_mean() -> None:
    """The loss of a group method is a mean over all responses, those without an advantage too; dynamic sampling leaves them out."""
    teaching = only([0, 2, 4, 5])
    (line,) = run(plain := make_loop(teaching, algorithm=DR_GRPO))
    assert line["loop/prompts_trained"] == 4 and line["reward/tied"] == 0.5 and "refill/prompts" not in line
    assert [number(one.rollout) for one in plain.roles.policy.learned[0]] == [0, 1, 2, 3]
    (line,) = run(filled := make_loop(teaching, algorithm=DR_GRPO, loop={"prompts_per_step": 4, "refill": 1}))
    assert (line["dropped/equal_rewards"], line["refill/prompts"], line["reward/tied"]) == (4, 4, 0.5)
    assert [number(one.rollout) for one in filled.roles.policy.learned[0]] == [0, 2, 4, 5]
    assert filled.state.ledger.settled == {"trained": 4, "equal_rewards": 4}


def test_transforms_see_each_response_once() -> None:
    loop = make_loop(only([7, 9]), reward=NORMALISED, loop={"prompts_per_step": 2, "refill": 9})
    (line,) = run(loop)
    assert line["rollout/responses"] == 20
    ((count, mean, _),) = loop.state.shaping.state()
    assert (count, mean) == (20, pytest.approx((16 * 1 + 2 * (0 + 1)) / 20))


# A step without rewards


def outcomes(*some: Outcome) -> Any:
    return lambda rollout: (list(some) * len(rollout.infos))[: len(rollout.infos)]


@pytest.mark.parametrize(
    ("given", "fraction", "words"),
    [
        ([Invalid("the judge returned None")], 0.5, ["8 x invalid (the judge returned None)", "score` have a `return`", "has: answer."]),
        ([Invalid("the verdict is nan")], 0.5, ["none of the 8 responses has a reward: 8 x invalid (the verdict is nan)", "reward.path"]),
        ([Failed("E: x"), TimedOut(2.0)], 1.0, ["4 x failed (E: x); 4 x timed out after 2 s"]),
        ([Failed("E: x"), Invalid("y")], 0.5, ["4 x failed (E: x); 4 x invalid (y)"]),
        ([Failed("E: x"), Score(1.0)], 0.4, ["4 of 8 responses got no verdict; the first: failed (E: x)", "max_failed_fraction"]),
    ],
)  # fmt: skip
def test_a_step_without_rewards_ends_the_run_before_it_learns(
    given: list[Outcome], fraction: float, words: list[str]
) -> None:
    loop = make_loop(
        outcomes(*given), reward={"kind": "function", "path": "my_rewards:score", "max_failed_fraction": fraction}
    )
    with pytest.raises(RewardsFailing) as failing:
        run(loop)
    assert str(failing.value).startswith("step 1: ") and all(word in str(failing.value) for word in words)
    assert not loop.roles.policy.learned and not loop.record.lines


def test_an_evaluation_without_rewards_says_why() -> None:
    """What `rlhf eval` asks before it compares: the win rate of nothing is nothing."""
    loop = make_loop(outcomes(Invalid("the judge returned None")))
    judged = asyncio.run(
        loop.sample_and_judge(
            loop.state.ledger.lease(3),
            step_samplings(loop.algorithm.sources, loop.settings.rollout, seed=0, step=1),
        )
    )
    with pytest.raises(RewardsFailing, match="^the answers of m: none of the 6 responses has a reward: 6 x invalid"):
        require_some_reward("the answers of m", judged, loop.settings.reward)


def test_one_reward_is_enough_for_the_run_to_go_on() -> None:
    loop = make_loop(lambda rollout: [Invalid("x"), Score(1.0) if number(rollout) == 3 else Invalid("x")])
    (line,) = run(loop)
    assert line["reward/invalid"] == 7 and line["dropped/too_few_scores"] == 4
    assert line["warnings"] == ["no prompt taught anything (too_few_scores 4)"]


# Steps that teach nothing


def test_steps_in_a_row_that_teach_nothing_end_the_run_with_reasons() -> None:
    loop = make_loop(equal, 40, loop={"prompts_per_step": 4, "max_empty_steps": 2})
    run(loop)
    loop.progress.require()
    (_, line) = run(loop)
    assert line["warnings"] == ["no prompt taught anything (tie 4)"]
    with pytest.raises(NothingLearned, match=r"2 steps in a row .*: tie 8\. .*What helps: .*loop\.refill") as stopped:
        loop.progress.require()
    assert "those to 0 of 4 prompts were all the same" in str(stopped.value)
    assert loop.state.ledger.settled == {"tie": 8}, "every prompt is accounted for"


def test_a_step_that_teaches_begins_the_count_anew() -> None:
    loop = make_loop(only([4]), 40, loop={"prompts_per_step": 4, "max_empty_steps": 2})
    for _ in range(3):
        run(loop)
        loop.progress.require()
    run(loop)
    with pytest.raises(NothingLearned):
        loop.progress.require()
    loop.progress.require_any()


def test_a_policy_that_ends_at_once_is_told_from_a_reward_that_ties() -> None:
    loop = make_loop(equal, alike=True, loop={"prompts_per_step": 4, "max_empty_steps": 1})
    run(loop)
    with pytest.raises(NothingLearned) as stopped:
        loop.progress.require()
    text = str(stopped.value)
    assert "1.0 tokens on average, and those to 4 of 4 prompts were all the same" in text
    assert text.index("the policy ends at once") < text.index("got equal rewards")


def test_groups_of_equal_rewards_teach_nothing_where_only_rewards_count() -> None:
    """They are learned from, with a gradient of zero; the run is as empty as with ties. A KL has a gradient of its own."""
    lines = run(loop := make_loop(equal, 40, algorithm=DR_GRPO), 3)
    assert [line["loop/prompts_trained"] for line in lines] == [4, 4, 4]
    assert lines[0]["warnings"] == ["no prompt taught anything (equal_rewards 4)"]
    with pytest.raises(NothingLearned, match="in the whole run.*equal_rewards 12"):
        loop.progress.require_any()
    pulled = make_loop(equal, 40, algorithm={"name": "grpo", "samples_per_prompt": 3})
    lines = run(pulled, 3)
    pulled.progress.require_any()
    assert [len(line["warnings"]) for line in lines] == [0, 0, 1]
    assert lines[2]["warnings"] == ["all rewards have been equal for 3 steps (now 1): nothing tells good from bad"]


def test_rewards_that_transforms_make_equal_are_told_apart() -> None:
    clipped = {"kind": "function", "path": "my_rewards:score", "transforms": [{"name": "clip", "high": -1.0}]}
    lines = run(make_loop(distinct, 40, reward=clipped), 3)
    assert lines[2]["warnings"][-1].startswith(
        "all rewards after reward.transforms have been equal for 3 steps (now -1)"
    )
    assert lines[1]["warnings"] == ["no prompt taught anything (tie 4)"]


# A builder of the user's own


def misspelt_for(numbers: Sequence[int]) -> Algorithm:
    def build(rollout: Rollout, feedback: Any, rng: random.Random) -> Any:
        if number(rollout) in numbers:
            return {}["anwser"]
        return (TrainingItem((1, 0), (1.0, -1.0)),)

    return Algorithm("own", (Source("policy", 2),), build, Preference((Contrast(),)))


def test_a_builder_that_breaks_on_some_prompts_drops_them_and_is_warned_of() -> None:
    loop = make_loop(distinct, own=misspelt_for([1]))
    (line,) = run(loop)
    assert line["loop/prompts_trained"] == 3 and line["dropped/build_failed"] == 1
    (warning,) = line["warnings"]
    assert warning.startswith(
        "the builder failed for 1 prompts; the first: KeyError: 'anwser' (tests/loop/test_progress.py:"
    )


def test_a_builder_that_breaks_on_most_prompts_ends_the_run() -> None:
    loop = make_loop(distinct, own=misspelt_for([0, 1, 2]))
    with pytest.raises(
        BuilderFailing, match=r"algorithm.name=own failed for 3 of 4 prompts; the first: KeyError: 'anwser' \(tests/"
    ):
        run(loop)
    assert not loop.roles.policy.learned


# With a model


@pytest.mark.engine
def test_a_run_replaces_groups_of_equal_rewards(tmp_path: Path) -> None:
    options = ["loop.steps=2", "loop.refill=4", "algorithm.samples_per_prompt=2", "reward.path=tests.helpers:coin"]
    for line in train("dr_grpo", tmp_path / "run", *options):
        assert line["loop/prompts_trained"] == 6 and line["dropped/equal_rewards"] == line["refill/prompts"] - line.get(
            "dropped/surplus", 0
        )
        assert line["refill/prompts"] >= 1 and line["rollout/responses"] == 2 * (6 + line["refill/prompts"])
        assert line["policy/advantage_size"] == pytest.approx(0.5), (
            "every response is 1/2 above or below its group's mean"
        )


@pytest.mark.engine
def test_a_reward_that_tells_nothing_apart_ends_the_run_and_exports_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["loop.max_empty_steps=2", "reward.path=tests.helpers:constant", "checkpoint.export=true"]
    with pytest.raises(NothingLearned, match="2 steps in a row .*: tie 12"):
        train("online_dpo", folder, *options)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["warnings"] for line in lines] == [["no prompt taught anything (tie 6)"]] * 2
    assert not (folder / "export").exists()
    assert (folder / "samples.jsonl").read_text(), "what the policy wrote can be looked at"
