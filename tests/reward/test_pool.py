"""Reward servers behind the pool: in this process, and as Ray actors that break."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from rlhf.cluster import LocalRuntime
from rlhf.reward.errors import NoServerLeft, RewardError
from rlhf.reward.models import Example, load_model
from rlhf.reward.pool import RewardPool
from rlhf.types import Failed, Invalid, Score, TimedOut

MOODY = "tests.reward.sample_rewards:moody"


def judged(run, settings, *rollouts):
    """Outcomes of the rollouts from a pool in this process."""
    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings)
        feedback = [await pool.judge(rollout) for rollout in rollouts]
        await pool.close()
        return [f.outcomes for f in feedback]

    try:
        return run(scenario())
    finally:
        runtime.stop()


def test_a_function_scores_and_fails_by_response(run, tiny_settings, make_text_rollout):
    settings = tiny_settings(reward={"path": MOODY, "deadline_s": 0.2, "missing_eos_penalty": 10.0})
    (outcomes,) = judged(run, settings, make_text_rollout(["four", "bad", "slow", "nan", "quits", "cut"], cut=[5]))
    assert outcomes[:3] == (Score(4.0), Failed("ValueError: I do not judge this"), TimedOut(0.2))
    assert isinstance(outcomes[3], Invalid) and outcomes[4] == Failed("SystemExit: 3") and outcomes[5] == Score(-7.0)


def test_a_function_gets_prompt_and_payload(run, tiny_settings, make_text_rollout):
    settings = tiny_settings(reward={"path": "tests.reward.sample_rewards:sees"})
    assert judged(run, settings, make_text_rollout(["x"])) == [(Score(1.0),)]


def test_a_classifier_scores_as_it_does_alone(run, tiny_settings, make_text_rollout, classifier):
    texts = ["good", "a much longer text than that", "", "é"]
    settings = tiny_settings(reward={"kind": "model", "path": str(classifier), "batch_size": 3})
    (outcomes,) = judged(run, settings, make_text_rollout(texts))
    model = load_model(str(classifier))
    alone = [model.score([Example("", text)])[0] for text in texts]
    assert [outcome.value for outcome in outcomes] == pytest.approx(alone, abs=1e-5)
    assert np.std(alone) > 0


def test_the_conversation_is_read_when_asked(run, tiny_settings, make_text_rollout, classifier):
    reward = {"kind": "model", "path": str(classifier)}
    rollouts = [make_text_rollout(["same"], prompt=prompt) for prompt in ("One.", "Two!")]
    one, two = judged(run, tiny_settings(reward=reward), *rollouts)
    assert one == two
    one, two = judged(run, tiny_settings(reward=reward | {"input": "conversation"}), *rollouts)
    assert one != two


def test_weights_stay_as_they_are_while_serving(run, tiny_settings, make_text_rollout, classifier):
    runtime = LocalRuntime()
    settings = tiny_settings(reward={"kind": "model", "path": str(classifier), "servers": 2})

    async def scenario():
        pool = await RewardPool.start(runtime, settings)
        for _ in range(3):
            await pool.judge(make_text_rollout(["some", "text"]))
        return [info.fingerprint for info in pool.infos], await pool.fingerprints()

    before, after = run(scenario())
    runtime.stop()
    assert before == list(after.values()) and len(set(before)) == 1 and before[0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "model", "path": "no/such/folder"}, "no model in the folder"),
        ({"kind": "function", "path": "no.such.module:f"}, "cannot import"),
    ],
)
def test_a_server_that_cannot_start_says_why(run, tiny_settings, reward, message):
    with pytest.raises(RewardError, match=message):
        judged(run, tiny_settings(reward=reward))


def test_a_model_without_a_head_is_refused(run, tiny_settings, encoder):
    with pytest.raises(RewardError, match="BertModel, which gives no reward"):
        judged(run, tiny_settings(reward={"kind": "model", "path": str(encoder)}))


@pytest.mark.engine
def test_ray_servers_break_and_the_pool_goes_on(run, scratch_runtime, tiny_settings, make_text_rollout):
    import ray

    def make(texts):
        return make_text_rollout(texts, keep=ray.put)

    async def scenario():
        settings = tiny_settings(reward={"path": MOODY, "servers": 2, "deadline_s": 2.0})
        pool = await RewardPool.start(scratch_runtime, settings)
        mixed = (await pool.judge(make(["four", "bad", "slow", "nan"]))).outcomes
        os.kill(pool.infos[0].pid, signal.SIGKILL)
        after_kill = [(await pool.judge(make(["four"]))).outcomes[0] for _ in range(4)]
        os.kill(pool.infos[1].pid, signal.SIGKILL)
        last = (await pool.judge(make(["four", "six"]))).outcomes
        with pytest.raises(NoServerLeft, match="all 2 reward servers have died"):
            await pool.judge(make(["four"]))
        await pool.close()
        return mixed, after_kill, last

    mixed, after_kill, last = run(scenario())
    assert mixed[:3] == (Score(4.0), Failed("ValueError: I do not judge this"), TimedOut(2.0))
    assert isinstance(mixed[3], Invalid)
    assert isinstance(after_kill[0], Failed) and "died" in after_kill[0].reason
    assert after_kill[1:] == [Score(4.0)] * 3
    assert all(isinstance(outcome, Failed) for outcome in last)


@pytest.mark.engine
def test_ray_server_survives_a_function_that_blocks(run, scratch_runtime, tiny_settings, make_text_rollout):
    import ray

    async def scenario():
        settings = tiny_settings(reward={"path": "tests.reward.sample_rewards:blocking", "deadline_s": 1.0})
        pool = await RewardPool.start(scratch_runtime, settings)
        stuck = (await pool.judge(make_text_rollout(["slow"], keep=ray.put))).outcomes
        after = (await pool.judge(make_text_rollout(["four"], keep=ray.put))).outcomes
        return stuck, after

    assert run(scenario()) == ((TimedOut(1.0),), (Score(4.0),))


@pytest.mark.engine
def test_ray_serves_a_model_and_reports_a_bad_path_in_its_own_words(
    run, scratch_runtime, tiny_settings, make_text_rollout, classifier
):
    import ray

    async def scenario():
        reward = {"kind": "model", "path": str(classifier)}
        pool = await RewardPool.start(scratch_runtime, tiny_settings(reward=reward))
        outcomes = (await pool.judge(make_text_rollout(["good", "bad"], keep=ray.put))).outcomes
        with pytest.raises(RewardError) as caught:
            await RewardPool.start(scratch_runtime, tiny_settings(reward=reward | {"path": "no/such/folder"}))
        return outcomes, str(caught.value), pool.infos[0].fingerprint, await pool.fingerprints()

    outcomes, message, before, after = run(scenario())
    alone = load_model(str(classifier)).score([Example("", "good"), Example("", "bad")])
    assert [outcome.value for outcome in outcomes] == pytest.approx(list(alone), abs=1e-5)
    assert message.startswith("there is no model in the folder no/such/folder")
    assert list(after.values()) == [before]
