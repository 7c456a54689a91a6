"""Canaries: read from a file, right at the start, and an alarm when the judge changes."""

from __future__ import annotations

import json

import pytest

from rlhf.cluster import LocalRuntime
from rlhf.config.loader import UserError
from rlhf.config.reward import RewardSettings
from rlhf.reward.errors import RewardError
from rlhf.reward.serving.canaries import CanaryAlarm, Watch, load_canaries
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Feedback, Invalid, Score, TimedOut
from tests.reward import sample_rewards


def write(folder, *rows):
    path = folder / "canaries.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_file_is_read(tmp_path):
    path = write(tmp_path, {"good": "g", "bad": "b", "prompt": "Say it.", "answer": 4}, "", {"good": "h", "bad": "c"})
    first, second = load_canaries(path)
    assert (first.where, first.good, first.bad, first.prompt.text) == (f"{path}:1", "g", "b", "Say it.")
    assert first.prompt.payload == {"answer": 4}
    assert (second.where, second.prompt.text, second.prompt.payload) == (f"{path}:3", "", {})
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say it."}]
    (chat,) = load_canaries(write(tmp_path, {"good": "g", "bad": "b", "messages": turns}))
    assert [turn.message() for turn in chat.prompt.conversation] == turns and chat.prompt.payload == {}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], ":1: not JSON"),
        ([{"good": "g", "bad": "b"}, {"good": "g"}], ":2: a pair needs the texts `good` and `bad`"),
        ([[1]], ", row 1: a number, not an object with the texts `good`"),
        ([{"good": "g", "bad": "b", "prompt": 3}], ":1: field `prompt` must be a text"),
        ([{"good": "g", "bad": "b", "messages": []}], ":1: field `messages` must be a list"),
        ([{"good": "g", "bad": "b", "messages": [], "prompt": ""}], ":1: has `prompt` and `messages`"),
        ([], "holds no pairs"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        load_canaries(write(tmp_path, *rows))


def test_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file. Correct `reward.canaries`"):
        load_canaries(str(tmp_path / "none.jsonl"))


def verdicts(*pairs):
    """Feedback of the server `s` on (good, bad); a number is a score."""
    as_outcomes = ([Score(one) if isinstance(one, float) else one for one in pair] for pair in pairs)
    return {"s": [Feedback("p", tuple(pair)) for pair in as_outcomes]}


@pytest.fixture
def watch(tmp_path):
    def make(**fields) -> Watch:
        path = write(tmp_path, {"good": "g", "bad": "b"}, {"good": "h", "bad": "c"})
        return Watch(RewardSettings(canaries=path, **fields), load_canaries(path))

    return make


def test_wrong_orders_at_the_start_are_listed(watch):
    with pytest.raises(RewardError) as caught:
        watch().begin(verdicts((1.0, 0.0), (0.0, 1.0)))
    assert "1 of 2 pairs" in str(caught.value) and ":2, good 'h', bad 'c': 0 against 1" in str(caught.value)
    assert ":1, good" not in str(caught.value)
    for pair in ((1.0, 1.0), (Invalid("None"), 0.0), (Failed("broke"), 0.0)):
        with pytest.raises(RewardError, match=":2, good"):
            watch().begin(verdicts((1.0, 0.0), pair))
    watch(canaries_wrong=1).begin(verdicts((1.0, 0.0), (0.0, 1.0)))


def test_later_the_accuracy_and_the_drift_are_measured(watch):
    one = watch(canaries_wrong=1)
    one.begin(verdicts((1.0, 0.0), (0.0, 1.0)))
    measured = one.compare(verdicts((1.0005, 0.0), (0.0, 0.9998)))
    assert measured == {"reward/canary_accuracy": 0.5, "reward/canary_drift": pytest.approx(0.0005)}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((1.0, 0.0011), ":1, good 'g', bad 'b': 1 against 0.0011; at the start: 1 against 0"),
        ((Invalid("None"), 0.0), "Invalid"),
    ],
)
def test_a_verdict_that_moved_is_an_alarm(watch, pair, words):
    one = watch()
    one.begin(verdicts((1.0, 0.0), (1.0, 0.0)))
    with pytest.raises(CanaryAlarm, match="Nothing was learned") as caught:
        one.compare(verdicts(pair, (1.0, 0.0)))
    assert words in str(caught.value)


def test_a_new_wrong_order_is_an_alarm_whatever_the_tolerance(watch):
    one = watch(canaries_tolerance=10.0)
    one.begin(verdicts((1.0, 0.9), (1.0, 0.0)))
    assert one.compare(verdicts((1.0, 0.95), (1.0, 0.0)))["reward/canary_accuracy"] == 1.0
    with pytest.raises(CanaryAlarm):
        one.compare(verdicts((0.9, 0.95), (1.0, 0.0)))


def test_a_verdict_that_is_late_is_no_alarm_but_none_at_all_is(watch):
    one = watch()
    one.begin(verdicts((1.0, 0.0), (1.0, 0.0)))
    assert one.compare(verdicts((TimedOut(1.0), 0.0), (1.0, 0.0)))["reward/canary_accuracy"] == 1.0
    with pytest.raises(CanaryAlarm, match="no server has a verdict"):
        one.compare(verdicts((TimedOut(1.0), 0.0), (1.0, Failed("broke"))))


def test_the_pool_judges_them_at_the_start_and_now_and_then(run, tiny_settings, tmp_path):
    path = write(tmp_path, {"good": "long enough", "bad": "short"}, {"good": "xxx", "bad": "xx"})
    runtime = LocalRuntime()

    async def scenario(**fields):
        reward = {"path": "tests.reward.sample_rewards:fickle", "canaries": path, "servers": 2} | fields
        pool = await RewardPool.start(runtime, tiny_settings(reward=reward))
        return [await pool.check(step) for step in (1, 2, 3, 4)]

    sample_rewards.BIAS[0] = 0.0
    steps = run(scenario(canaries_every=2))
    good = {"reward/canary_accuracy": 1.0, "reward/canary_drift": 0.0}
    assert steps == [{}, good, {}, good]
    sample_rewards.BIAS[0] = -100.0  # what is short is good now
    with pytest.raises(RewardError, match="2 of 2 pairs"):
        run(scenario())
    sample_rewards.BIAS[0] = 0.0

    async def changed():
        reward = {"path": "tests.reward.sample_rewards:fickle", "canaries": path, "canaries_every": 1}
        pool = await RewardPool.start(runtime, tiny_settings(reward=reward))
        sample_rewards.BIAS[0] = 1.0
        try:
            await pool.check(1)
        finally:
            sample_rewards.BIAS[0] = 0.0

    with pytest.raises(CanaryAlarm, match="reward-0 does not judge as it did"):
        run(changed())
    runtime.stop()


def test_judges_that_compare_have_canaries_too(run, tiny_settings, tmp_path):
    path = write(tmp_path, {"good": "long enough", "bad": "short"})
    runtime = LocalRuntime()

    async def scenario(path):
        reward = {"kind": "pairwise_function", "path": "tests.reward.sample_rewards:picky", "canaries": path}
        pool = await RewardPool.start(runtime, tiny_settings(reward=reward | {"canaries_every": 1}))
        return await pool.check(1)

    assert run(scenario(path)) == {"reward/canary_accuracy": 1.0, "reward/canary_drift": 0.0}
    with pytest.raises(RewardError, match="0.1 against 0.9"):
        run(scenario(write(tmp_path, {"good": "short", "bad": "long enough"})))
    runtime.stop()
