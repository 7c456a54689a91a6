"""The policy group on real DeepSpeed: any split of the same work learns the same, and what must not change does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf.algorithms.contrast import Contrast
from rlhf.cluster import LocalRef, LocalRuntime, Runtime
from rlhf.policy import PolicyGroup
from rlhf.policy.rank import InvariantBroken
from rlhf.types import Assignment, Completion, Prompt, Rollout, TrainingItem

OBJECTIVE = Contrast("logistic", scale=0.1)
UPDATES = 3


def make_assignments(remote: bool, count: int = 7) -> list[Assignment]:
    """Prompts with four responses of ragged lengths and one pair each, the same at every call."""
    import ray

    rng, made = random.Random(0), []
    for group in range(count):
        tokens = [[rng.randrange(5, 200) for _ in range(rng.randrange(1, 14))] for _ in range(4)]
        completions = [
            Completion(str(group), np.array(t, np.int32), np.full(len(t), -5.0, np.float32), 0, "stop") for t in tokens
        ]
        prompt = Prompt(str(group), tuple(rng.randrange(5, 200) for _ in range(rng.randrange(2, 12))), "")
        held = ray.put(completions) if remote else LocalRef(completions)
        rollout = Rollout(prompt, tuple(c.info() for c in completions), held)
        made.append(Assignment(rollout, (TrainingItem((3, 1), (1.0, -1.0)),)))
    return made


async def learn(runtime: Runtime, settings: Any, folder: str, remote: bool) -> tuple[list[dict[str, float]], dict]:
    """Metrics of each update, and the weights after the last."""
    group = await PolicyGroup.start(runtime, settings, OBJECTIVE, UPDATES)
    assignments = make_assignments(remote)
    metrics = [await group.learn(assignments, first=update == 0) for update in range(UPDATES)]
    metrics.append(await group.measure(assignments))
    await group.check_reference()
    await group.export(folder)
    await group.close()
    return metrics, load_file(f"{folder}/model.safetensors")


@pytest.fixture(scope="module")
def settings(tiny_settings: Callable) -> Callable:
    def make(loop: dict | None = None, run: dict | None = None, **policy: Any) -> Any:
        policy = {"learning_rate": 1e-3, "micro_batch_tokens": 4096} | policy
        return tiny_settings(policy=policy, loop=loop or {}, run={"invariants": False} | (run or {}))

    return make


@pytest.fixture(scope="module")
def whole(settings: Callable, run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One rank, nothing sharded, one micro-batch: what all the others must equal."""
    folder = str(tmp_path_factory.mktemp("whole"))
    return run(learn(LocalRuntime(), settings(zero_stage=0), folder, remote=False))


def assert_same(got: Any, expected: Any) -> None:
    for one, other in zip(got[0], expected[0], strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert got[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.allclose(got[1][name], tensor, atol=2e-4), name


@pytest.mark.engine
def test_the_first_update_starts_at_log_2_and_the_policy_moves(whole: Any) -> None:
    first, *_, measured = whole[0]
    assert first["policy/loss"] == pytest.approx(np.log(2))
    assert first["policy/kl"] == first["policy/margin"] == 0
    assert measured["policy/accuracy"] == 1.0
    assert measured["policy/margin"] > 0


@pytest.mark.engine
@pytest.mark.parametrize(
    "policy",
    [
        {"zero_stage": 1, "micro_batch_tokens": 1},
        {"zero_stage": 2, "micro_batch_tokens": 40, "logprob_chunk_tokens": 3, "gradient_checkpointing": True},
        {"zero_stage": 3, "micro_batch_tokens": 40, "offload_parameters": "cpu", "offload_optimizer": "cpu"},
    ],
    ids=["stage1-many-micro-batches", "stage2-chunks-checkpointing", "stage3-offload"],
)
def test_one_rank_in_any_split(settings: Callable, run: Callable, whole: Any, tmp_path: Any, policy: dict) -> None:
    assert_same(run(learn(LocalRuntime(), settings(**policy), str(tmp_path), remote=False)), whole)


@pytest.mark.engine
@pytest.mark.parametrize(("stage", "budget"), [(0, 4096), (2, 40), (3, 40)])
def test_two_ranks_equal_one(
    scratch_runtime: Runtime, settings: Callable, run: Callable, whole: Any, tmp_path: Any, stage: int, budget: int
) -> None:
    """Seven prompts on two ranks: shares are ragged, so one rank has an empty micro-batch."""
    two = settings(ranks=2, zero_stage=stage, micro_batch_tokens=budget)
    assert_same(run(learn(scratch_runtime, two, str(tmp_path), remote=True)), whole)


@pytest.mark.engine
def test_learning_rate_zero_changes_nothing_and_epochs_and_updates_count(settings: Callable, run: Callable) -> None:
    async def use() -> None:
        still = settings(learning_rate=0.0, loop={"updates_per_step": 3, "epochs_per_step": 2})
        group = await PolicyGroup.start(LocalRuntime(), still, OBJECTIVE, 6)
        rank = group._ranks[0].target
        before = [p.detach().clone() for _, p in rank._parameters()]
        metrics = await group.learn(make_assignments(False), first=True)
        assert metrics["policy/kl"] == 0
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, rank._parameters(), strict=True))
        assert rank.trainer.engine.global_steps == 6
        await group.close()

    run(use())


@pytest.mark.engine
def test_a_changed_reference_and_foreign_log_probs_stop_the_run(settings: Callable, run: Callable) -> None:
    async def use() -> None:
        group = await PolicyGroup.start(LocalRuntime(), settings(run={"invariants": True}), OBJECTIVE, 6)
        with pytest.raises(InvariantBroken, match="differ from the trainer's by .*run.max_logprob_gap"):
            await group.learn(make_assignments(False), first=True)  # the completions claim -5 per token
        with pytest.raises(InvariantBroken, match="before the first update"):
            await group.learn(make_assignments(False), first=True)  # it is no longer the first
        with torch.no_grad():
            next(group._ranks[0].target.reference.parameters()).add_(1.0)
        with pytest.raises(InvariantBroken, match="reference's weights changed"):
            await group.check_reference()
        await group.close()

    run(use())


@pytest.mark.engine
def test_a_checkpoint_restores_weights_optimizer_and_schedule(settings: Callable, run: Callable, tmp_path: Any) -> None:
    """Two updates, a checkpoint, two more; a new group that loads it makes the same two."""
    decaying = settings(schedule="linear", warmup_steps=2, min_learning_rate_ratio=0.0)

    async def use() -> None:
        group = await PolicyGroup.start(LocalRuntime(), decaying, OBJECTIVE, 6)
        for _ in range(2):
            await group.learn(make_assignments(False), first=False)
        await group.save(str(tmp_path), "two")
        expected = [await group.learn(make_assignments(False), first=False) for _ in range(2)]
        await group.close()
        again = await PolicyGroup.start(LocalRuntime(), decaying, OBJECTIVE, 6)
        await again.load(str(tmp_path), "two")
        assert [await again.learn(make_assignments(False), first=False) for _ in range(2)] == expected
        assert expected[1]["policy/learning_rate"] == pytest.approx(0.75e-3)
        with pytest.raises(FileNotFoundError, match="no DeepSpeed checkpoint 'three'"):
            await again.load(str(tmp_path), "three")
        await again.close()

    run(use())
