"""The policy group on real DeepSpeed: any split of the same work learns the same, and what must not change does not."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf.algorithms import Algorithm, Contrast, Critic, PolicyGradient, Preference, Source
from rlhf.algorithms.algorithm import Objective
from rlhf.cluster import LocalRef, LocalRuntime, Runtime
from rlhf.policy import InvariantBroken, PolicyGroup, StepContext
from rlhf.policy.gradient_learner import GradientLearner
from rlhf.policy.kl import KlController
from rlhf.training.deepspeed import Trainer
from rlhf.types import Assignment, Completion, Prompt, Rollout, TrainingItem
from tests.helpers import rank_inside, reproducible

UPDATES = 2
"""The second begins from weights and moments that the first has left."""
PREFERENCE = Preference((Contrast("logistic", scale=0.1),))
PPO = PolicyGradient(
    critic=Critic(model=None, learning_rate=1e-3, warmup_steps=0, value_clip=0.2, lam=0.9),
    gamma=0.98,
    whiten=True,
    kl_placement="reward",
    kl_coef=0.1,
    entropy_coef=0.01,
    correction="tis",
    correction_low=0.05,
    correction_high=0.3,
)
GRPO = PolicyGradient(
    baseline="mean_std",
    kl_placement="loss",
    kl_estimator="k3",
    kl_coef=0.1,
    ratio="sequence",
    aggregation="seq_mean_token_mean",
    correction="sequence_mask",
    correction_low=0.01,
    correction_high=0.2,
)
RLOO = PolicyGradient(baseline="leave_one_out", kl_placement="reward", kl_before_baseline=True, kl_coef=0.1)
OBJECTIVES = {"preference": PREFERENCE, "ppo": PPO, "grpo": GRPO}


def declare(objective: Objective) -> Algorithm:
    """An algorithm for a group that is given its assignments: it samples and builds nothing."""
    return Algorithm("test", (Source("policy", 4),), lambda rollout, feedback, rng: (), objective)


def context(objective: Objective, step: int, *, equal: bool) -> StepContext:
    """A step with the factor on the KL that the objective starts with."""
    return StepContext(step, equal=equal, kl_coef=objective.kl_coef if isinstance(objective, PolicyGradient) else 0.0)


def make_assignments(objective: Objective, remote: bool, count: int = 7) -> list[Assignment]:
    """Prompts with four responses of ragged lengths, the same at every call: a pair each, or a reward for every response."""
    import ray

    rng, made = random.Random(0), []
    for group in range(count):
        tokens = [[rng.randrange(5, 200) for _ in range(rng.randrange(1, 14))] for _ in range(4)]
        completions = [
            Completion.of_one_version(str(group), np.array(t, np.int32), np.full(len(t), -5.0, np.float32), 0, "stop")
            for t in tokens
        ]
        prompt = Prompt(str(group), tuple(rng.randrange(5, 200) for _ in range(rng.randrange(2, 12))), "")
        held = ray.put(completions) if remote else LocalRef(completions)
        rollout = Rollout(prompt, tuple(c.info() for c in completions), held)
        items: tuple[TrainingItem, ...] = (TrainingItem((3, 1), (1.0, -1.0)),)
        if isinstance(objective, PolicyGradient):
            items = tuple(TrainingItem((i,), (1.0,), target=rng.gauss(0, 1)) for i in range(4))
        made.append(Assignment(rollout, items))
    return made


async def learn(
    runtime: Runtime, settings: Any, folder: str, remote: bool, objective: Objective = PREFERENCE, pieces: bool = False
) -> tuple[list[dict[str, float]], dict]:
    """Metrics of each step, and the weights after the last.

    Args:
        pieces: the ranks are not given everything at once.
    """
    group = await PolicyGroup.start(runtime, settings, declare(objective), UPDATES)
    assignments = make_assignments(objective, remote)
    give = learn_in_pieces if pieces else PolicyGroup.learn
    contexts = [context(objective, step, equal=step == 1) for step in range(1, UPDATES + 1)]
    metrics = [reproducible(await give(group, assignments, one)) for one in contexts]
    metrics.append(await group.measure(assignments))
    await group.check_anchors()
    await group.export(folder)
    await group.close()
    return metrics, load_file(f"{folder}/model.safetensors")


async def learn_in_pieces(group: PolicyGroup, assignments: Sequence[Assignment], step: StepContext) -> dict[str, float]:
    """One or two assignments at a time, the last ones first: on two ranks, one of them is idle now and then."""
    await group.begin(step)
    updates, n = group._settings.loop.updates_per_step, len(assignments)
    for update in reversed(range(updates)):
        own = assignments[update * n // updates : (update + 1) * n // updates]
        for place in reversed(range(0, len(own), 2)):
            await group.accumulate(own[place : place + 2], update)
    return await group.finish()


@pytest.fixture(scope="module")
def settings(tiny_settings: Callable) -> Callable:
    def make(loop: dict | None = None, run: dict | None = None, **policy: Any) -> Any:
        policy = {"learning_rate": 1e-3, "micro_batch_tokens": 4096} | policy
        return tiny_settings(policy=policy, loop=loop or {}, run={"invariants": False} | (run or {}))

    return make


@pytest.fixture(scope="module")
def whole(settings: Callable, run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """One rank, nothing sharded, one micro-batch: what all the others must equal."""

    @functools.cache
    def make(method: str) -> Any:
        folder = str(tmp_path_factory.mktemp("whole"))
        one = settings(zero_stage=0, loop=LOOPS[method])
        return run(learn(LocalRuntime(), one, folder, False, OBJECTIVES[method]))

    return make


LOOPS: dict[str, dict] = {"preference": {}, "ppo": {"updates_per_step": 2, "epochs_per_step": 2}, "grpo": {}}
SPLITS = {
    "stage1-many-micro-batches": {"zero_stage": 1, "micro_batch_tokens": 1},
    "stage2-chunks-checkpointing": {
        "zero_stage": 2, "micro_batch_tokens": 40, "logprob_chunk_tokens": 3, "gradient_checkpointing": True,
    },
    "stage3-offload": {
        "zero_stage": 3, "micro_batch_tokens": 40, "offload_parameters": "cpu", "offload_optimizer": "cpu",
        "gradient_checkpointing": True,
    },
}  # fmt: skip


def assert_same(got: Any, expected: Any) -> None:
    for one, other in zip(got[0], expected[0], strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert got[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.allclose(got[1][name], tensor, atol=2e-4), name


@pytest.mark.engine
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_a_response_of_weight_0_is_as_if_it_were_not_there(settings: Callable, run: Callable, aggregation: Any) -> None:
    """Where no baseline needs its reward: in losses, means, whitening and the critic."""
    critic = Critic(model=None, learning_rate=1e-3, warmup_steps=0, value_clip=0.2, lam=0.9)
    objective = PolicyGradient(
        critic=critic, whiten=True, kl_placement="loss", kl_estimator="k2", kl_coef=0.1, aggregation=aggregation
    )

    async def step(masked: bool) -> tuple[dict[str, float], dict[str, float]]:
        group = await PolicyGroup.start(LocalRuntime(), settings(zero_stage=0), declare(objective), UPDATES)
        assignments = []
        for one in make_assignments(objective, False):
            *kept, last = one.items
            left_out = (replace(last, weight=0.0),) if masked else ()
            assignments.append(replace(one, items=(*kept, *left_out)))
        metrics = [await group.learn(assignments, context(objective, number, equal=False)) for number in (1, 2)]
        await group.close()
        return metrics[0], metrics[1]

    for masked, absent in zip(run(step(True)), run(step(False)), strict=True):
        for name in ("policy/loss", "policy/grad_norm", "critic/grad_norm"):
            assert masked[name] == pytest.approx(absent[name], rel=1e-3, abs=1e-6), name


@pytest.mark.engine
def test_the_first_update_starts_at_log_2_and_the_policy_moves(whole: Callable) -> None:
    first, *_, measured = whole("preference")[0]
    assert first["policy/loss"] == pytest.approx(np.log(2))
    assert first["policy/kl"] == first["policy/margin"] == 0
    assert measured["policy/kl"] != 0


@pytest.mark.engine
def test_the_first_step_of_a_policy_gradient_starts_at_the_reference(whole: Callable) -> None:
    first, *_, last, measured = whole("ppo")[0]
    assert first["policy/kl"] == 0
    assert measured["policy/kl_k3"] > last["policy/kl_k3"] > 0
    assert abs(first["critic/value"]) < 0.5 < abs(first["policy/advantage_size"])
    assert last["critic/loss"] < first["critic/loss"]
    first, *_, measured = whole("grpo")[0]
    assert first["policy/ratio"] == 1
    assert first["policy/kl_old"] == first["policy/clip_fraction"] == first["policy/kl"] == 0
    assert 0 < first["policy/mismatch_corrected"] < 1


@pytest.mark.engine
@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("split", SPLITS)
def test_one_rank_in_any_split(
    settings: Callable, run: Callable, whole: Callable, tmp_path: Any, split: str, method: str
) -> None:
    one = settings(**SPLITS[split], loop=LOOPS[method])
    pieces = split != "stage1-many-micro-batches"
    assert_same(run(learn(LocalRuntime(), one, str(tmp_path), False, OBJECTIVES[method], pieces)), whole(method))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("method", "stage", "budget", "pieces"),
    [
        ("preference", 0, 4096, False),
        ("preference", 3, 40, True),
        ("ppo", 1, 40, False),
        ("ppo", 3, 40, True),
        ("grpo", 2, 40, True),
    ],
)
def test_two_ranks_equal_one(
    scratch_runtime: Runtime,
    settings: Callable,
    run: Callable,
    whole: Callable,
    tmp_path: Any,
    method: str,
    stage: int,
    budget: int,
    pieces: bool,
) -> None:
    """Seven prompts on two ranks: shares are ragged, so one rank has an empty micro-batch."""
    two = settings(ranks=2, zero_stage=stage, micro_batch_tokens=budget, loop=LOOPS[method])
    assert_same(run(learn(scratch_runtime, two, str(tmp_path), True, OBJECTIVES[method], pieces)), whole(method))


@pytest.mark.engine
@pytest.mark.parametrize("method", ["preference", "ppo"])
def test_learning_rate_zero_changes_nothing_and_epochs_and_updates_count(
    settings: Callable, run: Callable, method: str
) -> None:
    async def use() -> None:
        still = settings(learning_rate=0.0, loop={"updates_per_step": 3, "epochs_per_step": 2})
        objective = OBJECTIVES[method]
        group = await PolicyGroup.start(LocalRuntime(), still, declare(objective), 6)
        rank = rank_inside(group)
        before = [p.detach().clone() for p in rank.policy.engine.module.parameters()]
        metrics = await group.learn(make_assignments(objective, False), context(objective, 1, equal=True))
        assert metrics["policy/kl"] == 0
        assert all(torch.equal(a, b) for a, b in zip(before, rank.policy.engine.module.parameters(), strict=True))
        assert [trainer.engine.global_steps for trainer in rank.learner.trainers.values()] == [6] * (
            1 + (method == "ppo")
        )
        await group.close()

    run(use())


@pytest.mark.engine
@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_changed_reference_and_foreign_log_probs_stop_the_run(settings: Callable, run: Callable, method: str) -> None:
    async def use() -> None:
        objective = OBJECTIVES[method]
        group = await PolicyGroup.start(LocalRuntime(), settings(run={"invariants": True}), declare(objective), 6)
        with pytest.raises(InvariantBroken, match="differ from the trainer's by .*run.max_logprob_gap"):
            await group.learn(
                make_assignments(objective, False), context(objective, 1, equal=True)
            )  # completions claim -5 per token
        with pytest.raises(InvariantBroken, match="before the first update"):
            await group.learn(make_assignments(objective, False), context(objective, 2, equal=True))  # no longer equal
        with torch.no_grad():
            next(rank_inside(group).reference.model.parameters()).add_(1.0)
        with pytest.raises(InvariantBroken, match="weights of the reference changed"):
            await group.check_anchors()
        await group.close()

    run(use())


@pytest.mark.engine
@pytest.mark.parametrize("method", ["preference", "ppo"])
def test_a_checkpoint_restores_weights_optimizer_and_schedule(
    settings: Callable, run: Callable, tmp_path: Any, method: str
) -> None:
    """Two updates, a checkpoint, two more; a new group that loads it makes the same two."""
    decaying = settings(schedule="linear", warmup_steps=2, min_learning_rate_ratio=0.0)
    objective = OBJECTIVES[method]
    if method == "ppo":
        objective = replace(PPO, kl_target=0.5, kl_horizon=100)
    learned = make_assignments(objective, False)

    async def steps(group: PolicyGroup, kl: KlController, first: int) -> list[dict[str, float]]:
        made = []
        for step in (first, first + 1):
            metrics = reproducible(await group.learn(learned, StepContext(step, equal=False, kl_coef=kl.coef)))
            made.append(metrics | kl.after(step, metrics, 28))
        return made

    async def use() -> None:
        group = await PolicyGroup.start(LocalRuntime(), decaying, declare(objective), 6)
        kl, restored = KlController(objective), KlController(objective)
        await steps(group, kl, 1)
        await group.save(str(tmp_path), "two")
        state = kl.state()
        expected = await steps(group, kl, 3)
        await group.close()
        again = await PolicyGroup.start(LocalRuntime(), decaying, declare(objective), 6)
        await again.load(str(tmp_path), "two")
        restored.restore(state)
        assert await steps(again, restored, 3) == expected
        assert expected[1]["policy/learning_rate"] == pytest.approx(0.75e-3)
        if method == "ppo":
            assert state["kl_coef"] == expected[0]["policy/kl_coef"] != PPO.kl_coef
            assert expected[1]["policy/kl_coef"] != expected[0]["policy/kl_coef"]
        with pytest.raises(FileNotFoundError, match="no DeepSpeed checkpoint 'policy' in .*three"):
            await again.load(str(tmp_path), "three")
        await again.close()

    run(use())


@pytest.mark.engine
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_engines_side_by_side_in_bf16(
    settings: Callable, run: Callable, tmp_path: Any, whole: Callable, stage: int
) -> None:
    """Policy and critic in bf16 start where they do in fp32, up to bf16's three digits, and the critic learns."""
    half = settings(zero_stage=stage, dtype="bf16", loop=LOOPS["ppo"])
    metrics, weights = run(learn(LocalRuntime(), half, str(tmp_path), False, PPO))
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    expected = whole("ppo")[0]
    for name in ("policy/logprob_gap", "policy/entropy", "critic/return", "critic/loss", "policy/advantage_size"):
        assert metrics[0][name] == pytest.approx(expected[0][name], rel=0.05, abs=0.02), name
    assert metrics[1]["critic/loss"] < metrics[0]["critic/loss"]


@pytest.mark.engine
@pytest.mark.parametrize("objective", [RLOO, GRPO], ids=["kl-in-reward", "kl-in-loss"])
def test_a_single_step_saves_a_forward_pass_and_learns_the_same(
    settings: Callable, run: Callable, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, objective: PolicyGradient
) -> None:
    forwards = []
    forward = Trainer.forward
    monkeypatch.setattr(Trainer, "forward", lambda self, *args: forwards.append(1) or forward(self, *args))
    saved = run(learn(LocalRuntime(), settings(), str(tmp_path), False, objective))
    assert len(forwards) == UPDATES + 1, "one in each step, and one to measure"
    assert saved[0][1]["policy/kl"] != 0
    monkeypatch.setattr(GradientLearner, "_must_look_first", lambda self, update: True)
    assert_same(run(learn(LocalRuntime(), settings(), str(tmp_path), False, objective)), saved)
    assert len(forwards) == (UPDATES + 1) + (2 * UPDATES + 1)


@pytest.mark.engine
def test_while_the_critic_warms_up_the_policy_stays(settings: Callable, run: Callable) -> None:
    async def use() -> None:
        critic = replace(PPO.critic, warmup_steps=2)
        objective = replace(PPO, critic=critic, kl_target=0.5, kl_horizon=100)
        group = await PolicyGroup.start(LocalRuntime(), settings(schedule="linear"), declare(objective), 3)
        rank = rank_inside(group)
        before = [p.detach().clone() for p in rank.policy.engine.module.parameters()]
        for step in (1, 2):
            metrics = await group.learn(make_assignments(objective, False), context(objective, step, equal=True))
            assert "policy/loss" not in metrics
        assert all(torch.equal(a, b) for a, b in zip(before, rank.policy.engine.module.parameters(), strict=True))
        metrics = await group.learn(make_assignments(objective, False), context(objective, 3, equal=True))
        assert metrics["policy/learning_rate"] == 1e-3, "the policy's schedule starts with its own first step"
        assert metrics["critic/learning_rate"] < 1e-3
        assert not all(torch.equal(a, b) for a, b in zip(before, rank.policy.engine.module.parameters(), strict=True))
        await group.close()

    run(use())


@pytest.mark.engine
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_offloading_between_steps_changes_nothing(
    settings: Callable, run: Callable, tmp_path: Any, stage: int, dtype: str
) -> None:
    """Policy, critic and frozen models leave the device after every step and come back, and a checkpoint still restores."""
    one = settings(zero_stage=stage, dtype=dtype)
    assignments = make_assignments(PPO, False)

    async def steps(turns: bool) -> list[dict[str, float]]:
        group = await PolicyGroup.start(LocalRuntime(), one, declare(PPO), 3)
        metrics = []
        for step in (1, 2, 3):
            metrics.append(reproducible(await group.learn(assignments, context(PPO, step, equal=False))))
            if turns:
                await group.offload()
                await group.reload()
            if step == 2:
                await group.save(str(tmp_path / str(turns)), "two")
                await group.load(str(tmp_path / str(turns)), "two")
        await group.check_anchors()
        await group.close()
        return metrics

    assert run(steps(turns=True)) == run(steps(turns=False))
