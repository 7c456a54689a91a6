"""Reward servers behind the pool: in this process, and as Ray actors that break."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cluster import LocalRuntime
from rlhf.cluster.precision import Bf16
from rlhf.config import UserError
from rlhf.reward.errors import NoServerLeft, RewardError
from rlhf.reward.judges.model_judge import judging_device
from rlhf.reward.models import load_model
from rlhf.reward.reading import Example
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Invalid, Score, TimedOut
from tests.reward import sample_rewards

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
    settings = tiny_settings(reward={"path": MOODY, "deadline_s": 0.2})
    (outcomes,) = judged(run, settings, make_text_rollout(["four", "bad", "slow", "nan", "quits", "cut"], cut=[5]))
    assert (outcomes[0], outcomes[2], outcomes[5]) == (Score(4.0), TimedOut(0.2), Score(3.0))
    assert isinstance(outcomes[3], Invalid)
    assert outcomes[1].reason.startswith("ValueError: I do not judge this (tests/reward/sample_rewards.py:")
    assert outcomes[4].reason.startswith("SystemExit: 3 (tests/reward/sample_rewards.py:")


def test_a_function_gets_prompt_and_payload(run, tiny_settings, make_text_rollout):
    settings = tiny_settings(reward={"path": "tests.reward.sample_rewards:sees"})
    assert judged(run, settings, make_text_rollout(["x"])) == [(Score(1.0),)]


def test_a_function_may_judge_all_responses_in_one_call(run, tiny_settings, make_text_rollout):
    settings = tiny_settings(reward={"path": "tests.reward.sample_rewards:all_at_once"})
    rollouts = [make_text_rollout(texts) for texts in (["four", "sixsix"], ["few", "x"], ["none", "x"])]
    right, few, none = judged(run, settings, *rollouts)
    assert right == (Score(-1.0), Score(1.0))
    assert few == (Failed("the function returned 1 values for 2"),) * 2
    assert none == (Failed("the function returned 3.0, which is not a list"),) * 2
    compare = {"kind": "pairwise_function", "path": "tests.reward.sample_rewards:all_pairs"}
    assert judged(run, tiny_settings(reward=compare), rollouts[0]) == [(Score(0.0), Score(1.0))]


def test_a_classifier_scores_as_it_does_alone(run, tiny_settings, make_text_rollout, classifier):
    texts = ["good", "a much longer text than that", "", "é"]
    settings = tiny_settings(reward={"kind": "model", "path": str(classifier), "batch_size": 3})
    (outcomes,) = judged(run, settings, make_text_rollout(texts))
    model = load_model(str(classifier))
    alone = [model.score([Example((), text)])[0] for text in texts]
    assert [outcome.value for outcome in outcomes] == pytest.approx(alone, abs=1e-5)
    assert np.std(alone) > 0


def test_the_conversation_is_read_when_asked(run, tiny_settings, make_text_rollout, classifier):
    reward = {"kind": "model", "path": str(classifier)}
    rollouts = [make_text_rollout(["same"], prompt=prompt) for prompt in ("One.", "Two!")]
    one, two = judged(run, tiny_settings(reward=reward), *rollouts)
    assert one == two
    one, two = judged(run, tiny_settings(reward=reward | {"input": "conversation"}), *rollouts)
    assert one != two


@pytest.fixture(scope="module")
def half(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier in bf16, which a CPU that emulates it widens: its weights are then no longer those of the mapped file."""
    folder = tmp_path_factory.mktemp("half")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["model", "pairwise_model", "several"])
def test_a_model_lies_in_host_memory_while_the_policy_has_its_gpu(
    run, tiny_settings, make_text_rollout, half, monkeypatch, kind
):
    """Forced on a CPU, whose memory is its own host's: it is taken and given back all the same."""
    monkeypatch.setattr("rlhf.reward.serving.pool.shared_rewards", lambda settings, local: local)
    monkeypatch.setattr("rlhf.reward.models.look", lambda gpu: Bf16(False, "as told"))
    reward: dict = {"kind": kind, "path": str(half)}
    if kind == "several":
        member = {"name": "one", "kind": "model", "path": str(half)}
        reward = {"kind": kind, "members": [member, {"name": "two", "kind": "function", "path": MOODY}]}
    runtime, rollout = LocalRuntime(), make_text_rollout(["four", "sixsix"])

    async def scenario():
        pool = await RewardPool.start(runtime, tiny_settings(reward=reward))
        workplace = pool._servers[0].handle.target._workplace
        before = await pool.judge(rollout)
        await pool.offload()
        await pool.offload()  # asking twice changes nothing
        weights = [parameter for model in workplace._models for parameter in model.parameters()]
        assert all(weight.untyped_storage().nbytes() == 0 for weight in weights)
        meanwhile = await pool.judge(rollout)
        await pool.reload()
        return before, meanwhile, await pool.judge(rollout), pool.infos[0].fingerprint, await pool.fingerprints()

    before, meanwhile, after, first, last = run(scenario())
    runtime.stop()
    assert all("the policy has its GPU" in outcome.reason for outcome in meanwhile.outcomes)
    assert (after.outcomes, last["reward-0"]) == (before.outcomes, first)


def test_a_server_without_a_gpu_judges_on_the_cpu_only_where_none_was_left_for_it(
    tiny_settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(cluster={"device": "cuda"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the runtime sets it for an actor without a GPU
    assert judging_device(settings, local=True) == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RewardError, match="sees no GPU"):
        judging_device(settings, local=True)


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


@pytest.mark.parametrize(("servers", "rollouts", "most"), [(1, 6, 4), (2, 6, 8), (1, 1, 2)])
def test_servers_are_given_no_more_than_they_may_hold(run, tiny_settings, make_text_rollout, servers, rollouts, most):
    reward = {"path": "tests.reward.sample_rewards:gated", "max_waiting": 5, "servers": servers}
    assert all_at_once(run, tiny_settings(reward=reward), [make_text_rollout(["a", "b"])] * rollouts) == most


def test_a_rollout_larger_than_the_limit_is_judged_alone(run, tiny_settings, make_text_rollout):
    reward = {"path": "tests.reward.sample_rewards:gated", "max_waiting": 1}
    assert all_at_once(run, tiny_settings(reward=reward), [make_text_rollout(["a", "b", "c"])] * 2) == 3


def all_at_once(run, settings, rollouts):
    """Judge all rollouts; how many responses were inside the function before the first one came out."""
    runtime = LocalRuntime()

    async def scenario():
        sample_rewards.GATE[:] = [asyncio.Event()]
        sample_rewards.INSIDE[0] = 0
        pool = await RewardPool.start(runtime, settings)
        judging = [asyncio.create_task(pool.judge(rollout)) for rollout in rollouts]
        for _ in range(100):  # turns of the loop, until everybody waits for the gate or for a server
            await asyncio.sleep(0)
        inside = sample_rewards.INSIDE[0]
        sample_rewards.GATE[0].set()
        feedbacks = await asyncio.gather(*judging)
        assert all(outcome == Score(1.0) for feedback in feedbacks for outcome in feedback.outcomes)
        return inside

    try:
        return run(scenario())
    finally:
        runtime.stop()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "model", "path": "no/such/folder"}, "no folder `no/such/folder`"),
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
        settings = tiny_settings(reward={"path": MOODY, "servers": 2, "deadline_s": 2.0, "restarts": 0})
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
    assert (mixed[0], mixed[2]) == (Score(4.0), TimedOut(2.0)) and isinstance(mixed[3], Invalid)
    assert mixed[1].reason.startswith("ValueError: I do not judge this (")
    assert isinstance(after_kill[0], Failed) and "died" in after_kill[0].reason
    assert after_kill[1:] == [Score(4.0)] * 3
    assert all(isinstance(outcome, Failed) for outcome in last)


@pytest.mark.engine
def test_a_dead_server_is_started_again_with_the_same_weights_or_not(
    run, scratch_runtime, tiny_settings, make_text_rollout, classifier, tmp_path
):
    import ray

    folder = tmp_path / "model"
    shutil.copytree(classifier, folder)

    async def scenario():
        settings = tiny_settings(reward={"kind": "model", "path": str(folder), "restarts": 2})
        pool = await RewardPool.start(scratch_runtime, settings)
        pids = [pool.infos[0].pid]

        async def judge():
            return (await pool.judge(make_text_rollout(["four"], keep=ray.put))).outcomes[0]

        async def kill():
            os.kill(pool.infos[0].pid, signal.SIGKILL)
            return await judge(), await pool.health()

        first = await judge()
        lost, health = await kill()
        again = await judge()  # waits until the new server is ready
        pids.append(pool.infos[0].pid)
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        await kill()
        with pytest.raises(NoServerLeft, match="judges with .* instead of"):
            await judge()
        return pids, first, lost, health, again

    pids, first, lost, health, again = run(scenario())
    assert len(set(pids)) == 2
    assert isinstance(lost, Failed) and "died" in lost.reason and health == {"reward-0": None}
    assert again == first


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
        with pytest.raises(UserError) as caught:
            await RewardPool.start(scratch_runtime, tiny_settings(reward=reward | {"path": "no/such/folder"}))
        return outcomes, str(caught.value), pool.infos[0].fingerprint, await pool.fingerprints()

    outcomes, message, before, after = run(scenario())
    alone = load_model(str(classifier)).score([Example((), "good"), Example((), "bad")])
    assert [outcome.value for outcome in outcomes] == pytest.approx(list(alone), abs=1e-5)
    assert message.startswith("`reward.path`: there is no folder `no/such/folder`")
    assert list(after.values()) == [before]
