"""LoRA on real DeepSpeed: splits, checkpoints and anchors as without it, and only adapters change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed, Previous, UpdateRule
from rlhf.cluster import LocalRuntime, Runtime
from rlhf.policy import InvariantBroken, PolicyGroup
from rlhf.policy.rank import PolicyRank
from rlhf.training import lora
from rlhf.training.packing import Experience, pack
from rlhf.training.weights import whole_weights
from tests.helpers import rank_inside, reproducible
from tests.policy.test_anchor import algorithm
from tests.policy.test_group import PPO, PREFERENCE, assert_same, context, declare, learn, make_assignments

pytestmark = pytest.mark.engine
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def settings(tiny_settings: Callable) -> Callable:
    def make(loop: dict | None = None, **policy: Any) -> Any:
        policy = {"learning_rate": 1e-2, "micro_batch_tokens": 4096, "lora": LORA} | policy
        return tiny_settings(policy=policy, loop=loop or {}, run={"invariants": False})

    return make


@pytest.fixture(scope="module")
def whole(settings: Callable, run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One rank, nothing sharded, one micro-batch: metrics and merged weights, which all others must equal."""
    folder = str(tmp_path_factory.mktemp("whole"))
    return run(learn(LocalRuntime(), settings(zero_stage=0), folder, False, PREFERENCE))


@pytest.fixture
def rank(settings: Callable) -> Callable:
    def start(rule: UpdateRule, partner: UpdateRule | None = None, **policy: Any) -> PolicyRank:
        made = PolicyRank(0, settings(**policy), algorithm(rule, partner), total_updates=10)
        made.setup(*made.address())
        return made

    return start


SPLITS = {
    "stage1-many-micro-batches": {"zero_stage": 1, "micro_batch_tokens": 1},
    "stage2-chunks-checkpointing": {
        "zero_stage": 2, "micro_batch_tokens": 40, "logprob_chunk_tokens": 3, "gradient_checkpointing": True,
    },
    "stage3-offload": {
        "zero_stage": 3, "micro_batch_tokens": 40, "offload_parameters": "cpu", "offload_optimizer": "cpu", "gradient_checkpointing": True,
    },
}  # fmt: skip


def test_the_policy_starts_as_the_reference_and_only_adapted_matrices_move(whole: Any, tiny_model: Path) -> None:
    metrics, weights = whole
    assert metrics[0]["policy/kl"] == metrics[0]["policy/margin"] == 0
    assert metrics[-1]["policy/kl_k3"] > 1e-3
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, before.get_parameter(name))}
    assert moved == {name for name in weights if name.endswith("_proj.weight")}


@pytest.mark.parametrize("split", SPLITS)
def test_one_rank_in_any_split(settings: Callable, run: Callable, whole: Any, tmp_path: Path, split: str) -> None:
    assert_same(run(learn(LocalRuntime(), settings(**SPLITS[split]), str(tmp_path), False, PREFERENCE)), whole)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one(
    scratch_runtime: Runtime, settings: Callable, run: Callable, whole: Any, tmp_path: Path, stage: int
) -> None:
    two = settings(ranks=2, zero_stage=stage, micro_batch_tokens=40)
    assert_same(run(learn(scratch_runtime, two, str(tmp_path), True, PREFERENCE)), whole)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("objective", "stage", "dtype"), [("preference", 0, "fp32"), ("ppo", 1, "bf16"), ("ppo", 3, "fp32")]
)
def test_a_checkpoint_holds_what_learns_and_restores_it(
    settings: Callable, run: Callable, tmp_path: Path, objective: str, stage: int, dtype: str
) -> None:
    """Two updates, a checkpoint, two more; a new group that loads it makes the same two."""
    made = settings(zero_stage=stage, dtype=dtype)
    goal = PPO if objective == "ppo" else PREFERENCE
    learned = make_assignments(goal, False)

    async def steps(group: PolicyGroup, first: int) -> list[dict[str, float]]:
        return [reproducible(await group.learn(learned, context(goal, n, equal=False))) for n in (first, first + 1)]

    async def use() -> None:
        group = await PolicyGroup.start(LocalRuntime(), made, declare(goal), 6)
        await steps(group, 1)
        await group.save(str(tmp_path), "two")
        expected = await steps(group, 3)
        await group.close()
        again = await PolicyGroup.start(LocalRuntime(), made, declare(goal), 6)
        await again.load(str(tmp_path), "two")
        assert await steps(again, 3) == expected
        await again.close()
        fewer = settings(zero_stage=stage, dtype=dtype, lora=LORA | {"target_modules": ["q_proj"]})
        other = await PolicyGroup.start(LocalRuntime(), fewer, declare(goal), 6)
        with pytest.raises(RuntimeError, match="policy.lora"):
            await other.load(str(tmp_path), "two")
        await other.close()

    run(use())
    for file in (tmp_path / "two" / "policy").glob("*model_states.pt"):
        held = torch.load(file, weights_only=False)["module"]
        assert held and all(".lora_" in name for name in held)
    assert load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")


def test_the_critic_learns_with_adapters_and_head_only(settings: Callable, run: Callable) -> None:
    async def use() -> None:
        group = await PolicyGroup.start(LocalRuntime(), settings(), declare(PPO), 6)
        trainer = rank_inside(group).learner.trainers["critic"]
        before = {name: parameter.detach().clone() for name, parameter in trainer.engine.module.named_parameters()}
        learned = make_assignments(PPO, False)
        losses = [
            (await group.learn(learned, context(PPO, step, equal=step == 1)))["critic/loss"] for step in (1, 2, 3)
        ]
        assert losses[-1] < losses[0]
        moved = {n for n, p in trainer.engine.module.named_parameters() if not torch.equal(p, before[n])}
        assert moved and all(".lora_" in name or name.startswith("head.") for name in moved)
        await group.close()

    run(use())


def experience(rank: PolicyRank) -> Experience:
    learned = make_assignments(PREFERENCE, False)[:3]
    return pack(learned, [one.rollout.completions.value for one in learned], rank.device)


def fill(rank: PolicyRank, value: float) -> None:
    """Make every entry of the policy's adapter `value`."""
    rank.policy.set_masters(torch.full_like(master, value) for master in rank.policy.masters())


def logprobs(rank: PolicyRank) -> torch.Tensor:
    with torch.no_grad():
        return rank.policy.forward(experience(rank))[0]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_fixed_reference_is_the_base_and_costs_no_memory(rank: Callable, stage: int) -> None:
    one = rank(Fixed(), zero_stage=stage)
    start = logprobs(one)
    assert torch.equal(one.reference.logprobs(experience(one)), start)
    fill(one, 0.05)
    assert (logprobs(one) - start).abs().max() > 0.1
    assert torch.equal(one.reference.logprobs(experience(one)), start)
    assert one.follow(1) == {"reference": False, "partner": False}
    assert one.reference.model is one.policy.engine.module, "no second model"
    base = AutoModelForCausalLM.from_pretrained(one.settings.policy.model, dtype=torch.float32)
    assert all(torch.equal(tensor, base.get_parameter(name)) for name, tensor in one.reference.weights())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_previous_reference_keeps_an_adapter_of_its_own(rank: Callable, stage: int, tmp_path: Path) -> None:
    one = rank(Previous(every=2), zero_stage=stage)
    start = logprobs(one)
    fill(one, 0.05)
    moved = logprobs(one)
    assert one.follow(1) == {"reference": False, "partner": False}
    assert torch.equal(one.reference.logprobs(experience(one)), start)
    assert one.follow(2) == {"reference": True, "partner": True}
    assert torch.equal(one.reference.logprobs(experience(one)), moved)
    expected = {name: tensor.clone() for name, tensor in whole_weights(one._causal_lm, lora.POLICY)}
    fill(one, 0.1)
    one.check_anchors()
    assert torch.equal(one.reference.logprobs(experience(one)), moved), "a copy, not the policy itself"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.reference.weights())
    one.save(str(tmp_path), "two")
    again = rank(Previous(every=2), zero_stage=stage)
    again.load(str(tmp_path), "two")
    assert torch.equal(again.reference.logprobs(experience(again)), moved)
    assert torch.equal(logprobs(again), logprobs(one))


def test_a_base_that_changes_by_itself_is_found(rank: Callable) -> None:
    one = rank(Fixed())
    fill(one, 0.1)
    one.check_anchors()
    next(lora.base_parameters(one._causal_lm)).data[0] += 1e-3
    with pytest.raises(InvariantBroken, match="reference changed by themselves"):
        one.check_anchors()


@pytest.mark.parametrize("rule", [Ema(0.9), Extrapolated(1, 0.5)])
def test_rules_that_mix_iterates_are_refused(rank: Callable, rule: UpdateRule) -> None:
    with pytest.raises(lora.LoraError, match="policy.lora.rank: the reference mixes .* fixed or previous"):
        rank(rule)
    with pytest.raises(lora.LoraError, match="the partner mixes"):
        rank(Fixed(), partner=rule)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "bf16")])
def test_a_base_in_four_bits_stays_and_its_adapters_learn(
    settings: Callable, run: Callable, tmp_path: Path, stage: int, dtype: str
) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = settings(zero_stage=stage, dtype=dtype, lora=LORA | {"quantize_base": "4bit"})

    async def use() -> None:
        group = await PolicyGroup.start(LocalRuntime(), quantized, declare(PPO), 6)
        rank = rank_inside(group)
        assert [spec.shape for spec in group.specs] == [tuple(t.shape) for _, t in rank._whole()]
        learned = make_assignments(PPO, False)
        first = await group.learn(learned, context(PPO, 1, equal=True))
        assert first["policy/kl"] == pytest.approx(0, abs=1e-6)
        await group.save(str(tmp_path), "one")
        expected = reproducible(await group.learn(learned, context(PPO, 2, equal=False)))
        assert expected["policy/kl_k3"] > 0
        await group.check_anchors()
        await group.load(str(tmp_path), "one")
        assert reproducible(await group.learn(learned, context(PPO, 2, equal=False))) == expected
        await group.close()

    run(use())
