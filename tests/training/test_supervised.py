"""Supervised training: the course of units, the loss against transformers' own, and real DeepSpeed on one rank and several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.cluster import LocalRuntime, Runtime
from rlhf.config.cluster import ClusterSettings
from rlhf.config.loader import UserError
from rlhf.config.sft import SftPolicySettings
from rlhf.data.conversations import Conversation, ReadConversations
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.loading import load_causal_lm
from rlhf.training.model import LogProbModel
from rlhf.training.sft import Conversations, NextToken
from rlhf.training.supervised import Batch, Course, Saving, SupervisedGroup, train
from tests.helpers import rank_inside

CPU = torch.device("cpu")


class Lengths:
    """Units that are numbers of tokens; every second epoch makes others of the same texts."""

    def __init__(self, costs: Sequence[int]):
        self.costs = list(costs)

    def units(self, epoch: int) -> list[tuple[int, int]]:
        return [(epoch % 2, i) for i in range(len(self.costs))]

    def cost(self, unit: tuple[int, int]) -> int:
        return self.costs[unit[1]]

    def batch(self, units: Sequence[tuple[int, int]]) -> Batch:
        return Batch(units, float(len(units)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=90), st.integers(1, 7), st.integers(0, 3), st.booleans())
def test_every_epoch_has_each_unit_once_and_every_step_is_a_function_of_the_seed(
    costs: list[int], batch_size: int, seed: int, like_lengths: bool
) -> None:
    course = Course(Lengths(costs), batch_size, epochs=3, seed=seed, like_lengths=like_lengths)
    again = Course(Lengths(costs), batch_size, epochs=3, seed=seed, like_lengths=like_lengths)
    steps = [course.units(step) for step in range(1, course.updates + 1)]
    for epoch in range(3):
        own = steps[epoch * course.updates_per_epoch : (epoch + 1) * course.updates_per_epoch]
        assert sorted(unit for units in own for unit in units) == Lengths(costs).units(epoch)
        assert all(1 <= len(units) <= batch_size for units in own)
    assert [again.units(step) for step in reversed(range(1, course.updates + 1))] == steps[::-1]


def test_another_seed_or_epoch_is_another_order() -> None:
    def order(seed: int, first: int) -> list[int]:
        course = Course(Lengths([1] * 40), 8, epochs=2, seed=seed)
        return [unit[1] for step in range(first, first + 5) for unit in course.units(step)]

    assert len({tuple(order(0, 1)), tuple(order(0, 6)), tuple(order(1, 1)), tuple(range(40))}) == 4


def test_like_lengths_leave_little_padding() -> None:
    costs = np.random.default_rng(0).integers(1, 100, 200).tolist()

    def padded(like_lengths: bool) -> int:
        course = Course(Lengths(costs), 10, epochs=1, seed=0, like_lengths=like_lengths)
        return sum(10 * max(costs[i] for _, i in course.units(step)) for step in range(1, 21))

    assert padded(True) < 1.15 * sum(costs) < padded(False)


# The loss of a conversation


def conversations(count: int = 8) -> list[Conversation]:
    """Ragged token ids, of which one or two stretches are learned."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        learned = np.zeros(int(rng.integers(6, 24)), dtype=bool)
        learned[-int(rng.integers(1, 4)) :] = True
        learned[2 : 2 + number % 3] = True
        made.append(Conversation(rng.integers(0, 256, len(learned)).astype(np.int32), learned))
    made.append(Conversation(np.array([5, 6, 7, 8], np.int32), np.array([False, True, False, False])))
    return made


def test_the_loss_is_transformers_own(tiny_model: Path) -> None:
    """Its labels are -100 wherever a token is not learned; the gradient is the same too."""
    data = Conversations(ReadConversations(conversations(), {}), 0)
    learner = NextToken(SftPolicySettings(model=str(tiny_model), dtype="fp32"))
    model = LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=5)
    batch = data.batch(data.units(0))
    payload, count = batch.payload, batch.count
    (row,) = learner.inputs(payload, CPU)
    loss = learner.loss(model(row), payload) / count
    loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    expected, tokens = torch.zeros(()), 0
    for conversation in conversations():
        ids = torch.from_numpy(conversation.token_ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(conversation.learned), ids, -100)
        tokens += int(conversation.learned.sum())
        expected = (
            expected
            + plain(input_ids=ids[None], labels=labels[None], use_cache=False).loss * conversation.learned.sum()
        )
    (expected / tokens).backward()
    assert count == tokens
    assert loss.item() == pytest.approx(expected.item() / tokens, abs=1e-5)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.causal_lm.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name


def test_a_rank_without_work_has_a_loss_and_a_gradient_of_zero(tiny_model: Path) -> None:
    learner = NextToken(SftPolicySettings(model=str(tiny_model), dtype="fp32"))
    model = LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=5)
    loss = learner.loss(model(*learner.inputs(None, CPU)), None)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


# Real DeepSpeed


class Notes:
    """A journal in memory."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: dict[int, float] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(dict(metrics))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations[step] = metrics["heldout/loss"]

    def rewind(self, step: int) -> None:
        self.steps = self.steps[:step]


CLUSTER = ClusterSettings(device="cpu", threads=1, startup_deadline_s=300)


def policy(tiny_model: Path, **fields: Any) -> SftPolicySettings:
    base = {"model": str(tiny_model), "dtype": "fp32", "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1}
    return SftPolicySettings(**(base | fields))


def saving(folder: Path) -> Saving:
    return Saving(Checkpoints(str(folder), keep=1), every=0, resume=False, identity={})


async def learn(runtime: Runtime, settings: SftPolicySettings, folder: Path, learner: Any = None) -> tuple[Notes, dict]:
    """What was noted, and the weights in the end. Batches of 4, 4 and 1: with two ranks the last leaves one without work."""
    data, notes = Conversations(ReadConversations(conversations(), {}), 0), Notes()
    course = Course(data, batch_size=4, epochs=2, seed=0)
    group = await SupervisedGroup.start(runtime, learner or NextToken(settings), settings, CLUSTER, 0, course.updates)
    await train(group, course, notes, saving(folder), held_out=data, eval_every=3)
    await group.export(str(folder / "export"))
    await group.close()
    return notes, load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, run: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Notes, dict]:
    """One rank, nothing sharded, one micro-batch: what all the others must equal."""
    return run(learn(LocalRuntime(), policy(tiny_model, zero_stage=0), tmp_path_factory.mktemp("whole")))


@pytest.fixture
def again(tiny_model: Path, run: Callable, tmp_path: Path) -> Callable[..., tuple[Notes, dict]]:
    return lambda runtime, **fields: run(learn(runtime, policy(tiny_model, **fields), tmp_path))


@pytest.fixture
def local() -> Iterator[LocalRuntime]:
    yield LocalRuntime()


def assert_same(got: tuple[Notes, dict], expected: tuple[Notes, dict]) -> None:
    for one, other in zip(got[0].steps, expected[0].steps, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"):
            assert one[name] == pytest.approx(other[name], rel=2e-3), name
    assert got[0].evaluations == pytest.approx(expected[0].evaluations, rel=2e-3)
    for name, tensor in expected[1].items():
        assert torch.allclose(got[1][name], tensor, atol=2e-3), name


@pytest.mark.engine
def test_it_learns_and_measures(whole: tuple[Notes, dict]) -> None:
    notes, _ = whole
    assert list(notes.evaluations) == [0, 3, 6]
    assert notes.evaluations[6] < notes.evaluations[3] < notes.evaluations[0]
    assert [step["train/epoch"] for step in notes.steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert notes.steps[0]["train/learning_rate"] == 1e-2 > notes.steps[-1]["train/learning_rate"] > 1e-3


@pytest.mark.engine
@pytest.mark.parametrize(
    "fields", [{"zero_stage": 1}, {"zero_stage": 3, "gradient_checkpointing": True}], ids=["zero1", "zero3"]
)
def test_other_micro_batches_learn_the_same(whole: Any, again: Callable, local: LocalRuntime, fields: dict) -> None:
    assert_same(again(local, micro_batch_tokens=20, logprob_chunk_tokens=3, **fields), whole)


@pytest.mark.engine
def test_two_ranks_learn_the_same(whole: Any, again: Callable, scratch_runtime: Any) -> None:
    assert_same(again(scratch_runtime, ranks=2, zero_stage=2, micro_batch_tokens=20), whole)


class NotANumber(NextToken):
    """Its second loss is not finite."""

    calls = 0

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        return super().loss(outputs, batch) * (float("nan") if self.calls == 2 else 1.0)


@pytest.mark.engine
def test_a_loss_that_is_not_finite_ends_the_run_with_words(
    tiny_model: Path, run: Callable, tmp_path: Path, local: LocalRuntime
) -> None:
    settings = policy(tiny_model)
    with pytest.raises(
        UserError, match=r"step 2 of 6: the loss or its gradient is not finite.*Lower the learning rate"
    ):
        run(learn(local, settings, tmp_path, NotANumber(settings)))


@pytest.mark.engine
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_resumed_training_takes_the_present_learning_rate_and_decay(
    tiny_model: Path, run: Callable, tmp_path: Path, stage: int, dtype: str
) -> None:
    """Not those that DeepSpeed's checkpoint remembers: users resume to lower the rate."""
    data = Conversations(ReadConversations(conversations(), {}), 0)

    async def step(restored: bool, **fields: Any) -> tuple[float, dict[str, Any]]:
        settings = policy(tiny_model, zero_stage=stage, dtype=dtype, schedule="constant", warmup_steps=0, **fields)
        group = await SupervisedGroup.start(LocalRuntime(), NextToken(settings), settings, CLUSTER, 0, 4)
        if restored:
            await group.load(str(tmp_path), "step")
        metrics = await group.learn(1, data, list(data.units(0)))
        await group.save(str(tmp_path), "again" if restored else "step")
        rank = rank_inside(group)
        await group.close()
        return metrics["train/learning_rate"], rank.trainer.engine.optimizer.param_groups[0]

    assert run(step(False, learning_rate=1e-2))[0] == 1e-2
    rate, used = run(step(True, learning_rate=1e-4, weight_decay=0.5, adam_betas=(0.5, 0.6)))
    assert rate == 1e-4
    assert (used["weight_decay"], tuple(used["betas"]), used["lr"]) == (0.5, (0.5, 0.6), 1e-4)
