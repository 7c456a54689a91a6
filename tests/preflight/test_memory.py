"""Bytes by hand: what the planner says a role needs is what its parts add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.algorithms import make
from rlhf.cluster.gpus import GPUS
from rlhf.config import Settings, load, yamls
from rlhf.config.policy import LoraSettings, PolicySettings
from rlhf.data.assets import resolve
from rlhf.preflight import memory
from rlhf.preflight.estimate import Cluster, estimate
from rlhf.preflight.memory import (
    PolicyMemory,
    activations,
    engine_memory,
    model_states,
    policy_memory,
    trained_parameters,
)
from rlhf.training.shapes import KNOWN, ModelShape, known_name, known_shape, model_shape
from rlhf.transfer.buckets import BUCKET_BYTES
from rlhf.transfer.fingerprint import SCRATCH_BYTES

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
DPO = make(load(TINY))


def tiny(*overrides: str) -> Settings:
    return load(TINY, overrides)


def tiny_shape() -> ModelShape:
    return model_shape(AutoConfig.from_pretrained(resolve("asset:tiny-llama")))


def policy(**fields: Any) -> PolicySettings:
    return PolicySettings(**({"model": "m", "dtype": "bf16"} | fields))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.030261248),
        ("llama-3.1-70b", 70.553706496),
        ("llama-3.1-405b", 405.8533888),
        ("qwen2.5-0.5b", 0.494032768),
        ("qwen2.5-1.5b", 1.543714304),
        ("qwen2.5-7b", 7.615616512),
    ],
)
def test_known_models_have_their_published_sizes(name: str, billions: float) -> None:
    assert known_shape(name).parameters == round(billions * 1e9)


def test_hub_names_of_known_models_need_no_network() -> None:
    names = (
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "llama-3.1-70b",
    )
    assert [known_name(name) for name in names] == ["llama-3.1-8b", "llama-3.1-8b", "qwen2.5-0.5b", "llama-3.1-70b"]
    assert known_name("someone/llama-3.1-9b") is None


def test_an_8b_model_by_the_book() -> None:
    shape = known_shape("llama-3.1-8b")
    states = model_states(shape, policy(zero_stage=0))
    assert states.weights / 1e9 == pytest.approx(16.06, abs=0.005)
    assert shape.cached * 2 == 128 * 1024, "bytes of key-value cache per token"
    assert shape.linear == 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    lora = policy(lora=LoraSettings(rank=16))
    assert trained_parameters(shape, lora) == 41_943_040, "as peft counts them for all linear layers"
    only = policy(lora=LoraSettings(rank=16, target_modules=["q_proj", "v_proj"]))
    assert trained_parameters(shape, only) == 32 * 16 * (4096 + 4096 + 4096 + 1024)


def test_parameters_are_counted_as_the_real_model_counts_them() -> None:
    path = resolve("asset:tiny-llama")
    real = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(path).parameters())
    assert model_shape(AutoConfig.from_pretrained(path)).parameters == real


@pytest.mark.parametrize(
    ("dtype", "stage", "per_parameter"),
    [
        # weights, gradients, optimizer: bytes per parameter on one of two ranks, as counted in DeepSpeed 0.19.8
        # (benchmarks/planner_accuracy.py counts them again)
        ("bf16", 0, (2, 2, 12)),
        ("bf16", 1, (2, 6, 6)),
        ("bf16", 2, (2, 2, 6)),
        ("bf16", 3, (1, 2, 6)),
        ("fp32", 0, (4, 4, 8)),
        ("fp32", 1, (4, 4, 6)),
        ("fp32", 2, (4, 2, 6)),
        ("fp32", 3, (2, 2, 6)),
    ],
)
def test_states_at_every_stage(dtype: str, stage: int, per_parameter: tuple[int, ...]) -> None:
    shape = tiny_shape()
    states = model_states(shape, policy(dtype=dtype, zero_stage=stage, ranks=2))
    assert tuple(states) == tuple(share * shape.parameters for share in per_parameter)


def test_offload_moves_states_to_the_host() -> None:
    shape = tiny_shape()
    offloaded = policy_memory(shape, tiny("policy.offload_optimizer=cpu").policy, DPO)
    assert offloaded.optimizer == 0 and offloaded.host == 6 * shape.parameters
    both = ["policy.zero_stage=3", "policy.offload_optimizer=cpu", "policy.offload_parameters=cpu"]
    offloaded = policy_memory(shape, tiny(*both).policy, DPO)
    assert offloaded.policy == offloaded.reference == 0
    assert offloaded.host == (6 + 2 + 2) * shape.parameters, "optimizer, policy and reference of one of two ranks"


def test_activations_of_a_layer_by_hand() -> None:
    """bf16, hidden 64, heads 2 x 32, one key-value head of 32, feed-forward 128: bytes that one token leaves in one layer."""
    shape, tokens = tiny_shape(), 100
    settings = policy(micro_batch_tokens=tokens)
    norms = 2 * (64 * 4 + 64 * 2 + 64 * 2)
    attention = 2 * (64 + 32 + 32 + 64 + 64)
    normalisers = 2 * 4  # fp32, one for each head
    feedforward = 4 * 2 * 128
    plain = activations(shape, settings, tokens)
    assert plain == 2 * tokens * (norms + attention + feedforward + normalisers)
    checkpointed = activations(shape, settings.model_copy(update={"gradient_checkpointing": True}), tokens)
    assert checkpointed == 2 * tokens * 64 * 2 + plain / 2, "every layer's input, and one layer in full"
    assert activations(shape, settings, 50) == plain, "no masks, however the row is divided"
    on_cpu = activations(shape, settings, 50, gpu=False)
    weights, masks = 2 * 2 * 50**2 * 2 * 2, 2 * 50**2
    assert on_cpu == plain - 2 * tokens * normalisers + weights + masks, (
        "of two heads, two groups and two layers instead"
    )


def test_the_output_projection_and_the_buckets() -> None:
    shape = known_shape("llama-3.1-8b")
    settings = policy(logprob_chunk_tokens=1024, zero_stage=2, ranks=8)
    need = policy_memory(shape, settings, DPO)
    assert need.head == 128256 * (1024 * 2 + 2 * 64 * 4) + 128256 * 4096 * (4 + 2)
    assert need.buckets == 500_000_000 * 2
    assert policy_memory(shape, settings.model_copy(update={"zero_stage": 1}), DPO).buckets == 500_000_000 * 4
    assert policy_memory(shape, settings.model_copy(update={"zero_stage": 3}), DPO).buckets == 1_500_000_000 * 2
    lora = settings.model_copy(update={"lora": LoraSettings(rank=8)})
    assert policy_memory(shape, lora, DPO).head == 128256 * (1024 * 2 + 2 * 64 * 4), "its weight is frozen"


def test_adapters_share_the_base() -> None:
    shape = known_shape("llama-3.1-8b")
    full = policy_memory(shape, policy(zero_stage=1, ranks=2), DPO)
    lora = policy_memory(shape, policy(zero_stage=1, ranks=2, lora=LoraSettings(rank=16)), DPO)
    adapters = 41_943_040
    assert lora.policy == 2 * (shape.parameters + adapters) and lora.reference == 0
    assert lora.gradients == 6 * adapters and lora.optimizer == 6 * adapters
    assert full.reference == full.policy
    quantised = policy_memory(
        shape, policy(zero_stage=1, ranks=2, lora=LoraSettings(rank=16, quantize_base="4bit")), DPO
    )
    assert 5e9 < quantised.policy < 6.2e9, "4 bits and their scales for the layers, bf16 for the embeddings"


@pytest.fixture
def with_method(tmp_path: Path) -> Callable[..., PolicyMemory]:
    """What the tiny run needs with another method, at ZeRO 0 unless an override says otherwise."""

    def need(algorithm: dict[str, Any], *overrides: str, evaluates: bool = False) -> PolicyMemory:
        raw = yamls.parse(Path(TINY).read_text()) | {"algorithm": algorithm}
        path = tmp_path / "run.yaml"
        path.write_text(yamls.dump(raw))
        settings = load(path, ["policy.zero_stage=0", *overrides])
        return policy_memory(tiny_shape(), settings.policy, make(settings), evaluates)

    return need


def test_memory_follows_the_method(with_method: Callable[..., PolicyMemory]) -> None:
    need, parameters = with_method, tiny_shape().parameters
    plain = need({"name": "online_dpo"})
    assert plain.policy == plain.reference == plain.gradients == 4 * parameters
    assert need({"name": "ppo"}).critic == plain.policy + plain.gradients + plain.optimizer
    assert need({"name": "nash_ema"}).partner == plain.reference
    assert need({"name": "nash_ema"}).host == 4 * parameters, "the average, in fp32"
    assert need({"name": "online_dpo", "reference": "extrapolated"}).host == 4 * parameters
    sharded = need({"name": "online_dpo", "reference": "extrapolated"}, "policy.zero_stage=1", "policy.ranks=2")
    assert sharded.host == 2 * parameters, "its part of the fp32 masters"
    assert need({"name": "iterative_dpo"}) == plain
    assert need({"name": "iterative_dpo"}, evaluates=True).start == plain.reference
    assert need({"name": "online_dpo"}, evaluates=True) == plain, "a fixed reference is the start"
    assert plain.critic == plain.partner == plain.start == plain.host == 0
    assert {"critic", "partner", "host"}.isdisjoint(plain.parts())
    assert plain.device == sum(plain.parts().values())


def test_what_stays_beside_engines(with_method: Callable[..., PolicyMemory]) -> None:
    parameters = tiny_shape().parameters
    assert with_method({"name": "online_dpo"}).staying == 4 * parameters, "the weights alone"
    assert with_method({"name": "ppo"}).staying == 8 * parameters, "and the critic's"
    sharded = with_method({"name": "online_dpo"}, "policy.zero_stage=3")
    assert sharded.staying == (2 + 2 + 2 + 4) * parameters, "DeepSpeed keeps shards and its bucket"


def test_a_mixing_engine_holds_everything_twice() -> None:
    shape, settings = tiny_shape(), tiny("rollout.dtype=bf16", "rollout.tensor_parallel_size=2")
    assert shape.cached == 2 * 2 * 1 * 32, "key and value, 2 layers, 1 head of 32"
    one = engine_memory(shape, settings.rollout, settings.policy)
    assert one.weights == shape.parameters and one.cached_token == shape.cached
    two = engine_memory(shape, settings.rollout, settings.policy, mixes=True)
    assert two.weights == 2 * one.weights and two.cached_token == 2 * one.cached_token
    assert one.room(10 * shape.cached + 1) == 10 and one.room(-5.0) == 0


def test_weights_on_their_way_take_the_buckets_that_the_transfer_uses() -> None:
    shape, bf16 = known_shape("llama-3.1-8b"), policy(dtype="bf16")
    largest = 128256 * 4096 * 2
    assert memory.publishing(shape, bf16) == BUCKET_BYTES + SCRATCH_BYTES, "with LoRA merged into the weights or not"
    rollout = tiny("rollout.tensor_parallel_size=2").rollout
    assert engine_memory(shape, rollout, bf16).arriving == BUCKET_BYTES + largest + largest / 2 + SCRATCH_BYTES
    sharded = policy(dtype="bf16", zero_stage=3, ranks=2)
    gathered = memory.GATHER_ELEMENTS * 2 + largest
    assert memory.publishing(shape, sharded) == gathered + BUCKET_BYTES + SCRATCH_BYTES


def test_repeated_constants_are_those_of_the_trainer() -> None:
    from rlhf.training import deepspeed, model, sharded, weights

    assert memory.REDUCE_BUCKET == deepspeed.REDUCE_BUCKET
    assert memory.ROWS == model.ROWS and memory.GATHER_ELEMENTS == weights.GATHER_ELEMENTS
    assert memory.READ_ELEMENTS == sharded.READ_ELEMENTS


SHAPES = {name: known_shape(name) for name in KNOWN}


@given(
    name=st.sampled_from(sorted(KNOWN)),
    dtype=st.sampled_from(["bf16", "fp32"]),
    ranks=st.integers(1, 512),
    tokens=st.integers(256, 65536),
    checkpointing=st.booleans(),
)
def test_saving_means_save(name: str, dtype: str, ranks: int, tokens: int, checkpointing: bool) -> None:
    """A higher stage, more ranks, checkpointing and offload never need more states or activations on the device."""
    shape = SHAPES[name]
    base = policy(dtype=dtype, ranks=ranks, micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
    sizes = []
    for stage in (1, 2, 3):
        states = model_states(shape, base.model_copy(update={"zero_stage": stage}))
        sizes.append(sum(states))
        more = model_states(shape, base.model_copy(update={"zero_stage": stage, "ranks": ranks + 1}))
        assert sum(more) <= sum(states)
    assert sizes == sorted(sizes, reverse=True)
    plain = activations(shape, base.model_copy(update={"gradient_checkpointing": False}), tokens)
    assert activations(shape, base.model_copy(update={"gradient_checkpointing": True}), tokens) < plain
    need = policy_memory(shape, base.model_copy(update={"zero_stage": 3}), DPO)
    spared = policy_memory(
        shape, base.model_copy(update={"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}), DPO
    )
    assert spared.device <= need.device
    assert spared.host + spared.policy + spared.reference + spared.optimizer == pytest.approx(
        need.policy + need.reference + need.optimizer
    )


def test_shapes_make_no_weights() -> None:
    before = torch.get_default_device()
    known_shape("llama-3.1-405b")
    assert torch.get_default_device() == before


def test_loading_a_70b_model_fits_eight_gpus_of_80_gb() -> None:
    shape, ranks = known_shape("llama-3.1-70b"), 8
    settings = policy(zero_stage=3, ranks=ranks, offload_optimizer="cpu", gradient_checkpointing=True)
    need = policy_memory(shape, settings, DPO)
    whole = 2 * shape.parameters
    assert shape.largest == 128256 * 8192, "the embedding"
    assert need.loading == 2 * shape.largest
    assert need.loaded == 2 * whole / ranks + need.loading, "shards of policy and reference, and a tensor on its way"
    assert need.loaded < 40e9 < 80e9 < whole
    assert need.loading_host == 3 * need.loading < 7e9, "on the first rank's host alone"
    assert need.exporting == whole, "gathered on the first rank's host, tensor by tensor"
    each = policy_memory(shape, settings.model_copy(update={"zero_stage": 2}), DPO)
    assert each.loading_host == whole and each.loaded == 2 * whole, "below stage 3 every rank holds it all"


def test_a_layout_that_does_not_fit_while_it_loads_is_refused() -> None:
    """Little is trained and shards are small, but one tensor on its way is as large as the GPU."""
    shape = replace(known_shape("llama-3.1-70b"), largest=int(30e9))
    settings = tiny(
        "policy.zero_stage=3", "policy.ranks=8", "policy.dtype=bf16", "policy.lora.rank=8", "rollout.engines=8"
    )
    settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"device": "cuda"})})
    made = estimate(settings, shape, make(settings), Cluster(3, 8, GPUS["h100-80gb"]))
    assert any("while its models are loaded, a policy rank needs" in problem for problem in made.problems)
