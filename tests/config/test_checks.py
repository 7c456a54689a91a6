"""Each cross-field check fires on its mistake, names the field, offers a remedy, and the remedy works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import ConfigError, Settings
from rlhf.config.checks import largest_assignment, optimizer_steps, problems
from rlhf.config.data import DataSettings
from rlhf.config.loop import LoopSettings
from rlhf.config.policy import PolicySettings
from rlhf.config.reward import RewardSettings

# (overrides that are wrong, what the message must say, overrides that put it right)
CASES = [
    (
        ["algorithm.name=onlin_dpo"],
        ["`algorithm.name`", "online_dpo", "module:function"],
        ["algorithm.name=online_dpo"],
    ),
    (
        ["loop.prompts_per_step=3", "policy.ranks=2", "loop.updates_per_step=2"],
        ["`loop.prompts_per_step`", "2 x 2 = 4", "`policy.ranks`"],
        ["loop.prompts_per_step=4"],
    ),
    (
        ["policy.micro_batch_tokens=1023"],
        ["`policy.micro_batch_tokens`", "512 + 2 x 256 = 1024", "`data.max_prompt_tokens`", "`rollout.max_tokens`"],
        ["policy.micro_batch_tokens=1024"],
    ),
    (
        ["policy.warmup_steps=7", "loop.steps=3", "loop.updates_per_step=2"],
        ["`policy.warmup_steps`", "3 steps x 2 updates x 1 epochs = 6", "`loop.steps`"],
        ["policy.warmup_steps=6"],
    ),
    (
        ["policy.min_learning_rate_ratio=0.2"],
        ["`policy.min_learning_rate_ratio`", "`policy.schedule`"],
        ["policy.schedule=cosine"],
    ),
    (["rollout.temperature=0"], ["`rollout.temperature`", "identical"], ["rollout.temperature=1.0"]),
    (
        ["policy.offload_parameters=cpu", "policy.zero_stage=2"],
        ["`policy.offload_parameters`", "`policy.zero_stage: 3`"],
        ["policy.zero_stage=3"],
    ),
    (
        ["policy.offload_optimizer=cpu", "policy.zero_stage=0"],
        ["`policy.offload_optimizer`", "1, 2 or 3"],
        ["policy.zero_stage=1"],
    ),
    (
        ["cluster.device=cpu", "rollout.transfer=nccl"],
        ["`rollout.transfer`", "`cluster.device` is cpu", "gloo"],
        ["rollout.transfer=gloo"],
    ),
    (
        ["cluster.device=cpu", "policy.zero_stage=1", "policy.offload_optimizer=cpu"],
        ["`policy.offload_optimizer: none`"],
        ["policy.offload_optimizer=none"],
    ),
    (
        ["cluster.device=cpu", "rollout.sleep_level=2"],
        ["`rollout.sleep_level`", "unused"],
        ["rollout.sleep_level=1"],
    ),
    (
        ["cluster.device=cpu", "rollout.gpu_memory_utilization=0.5"],
        ["`rollout.gpu_memory_utilization`", "`rollout.cpu_kv_cache_gb`"],
        ["rollout.gpu_memory_utilization=0.6"],
    ),
    (
        ["cluster.device=cuda", "rollout.cpu_kv_cache_gb=2"],
        ["`rollout.cpu_kv_cache_gb`", "`rollout.gpu_memory_utilization`"],
        ["rollout.cpu_kv_cache_gb=1"],
    ),
    (["cluster.device=cpu", "reward.gpus=0.5"], ["`reward.gpus`", "Remove it"], ["reward.gpus=0.0"]),
    (
        ["cluster.device=cuda", "reward.kind=model", "reward.path=some/folder"],
        ["`reward.gpus`", "`reward.gpus: 1`", "`cluster.device: auto`", "`cluster.placement: colocated`"],
        ["reward.gpus=1.0"],
    ),
    (
        ["cluster.device=cuda", "reward.kind=model", "reward.path=some/folder"],
        ["`reward.gpus`"],
        ["cluster.placement=colocated"],
    ),
    (
        ["cluster.device=cuda", "cluster.placement=colocated", "reward.kind=llm_judge", "reward.path=some/folder"],
        ["`reward.gpus: 1`"],
        ["reward.gpus=1.0"],
    ),
    (
        [
            "cluster.device=cuda",
            "cluster.placement=colocated",
            "reward.kind=model",
            "reward.path=some/folder",
            "reward.servers=2",
        ],
        ["`reward.servers`", "another policy rank", "`policy.ranks` is 1"],
        ["reward.servers=1"],
    ),
    (
        ["rollout.transfer=ipc"],
        ["`rollout.transfer`", "`cluster.placement` is disaggregated", "`cluster.placement: colocated`"],
        ["cluster.placement=colocated"],
    ),
    (
        ["rollout.transfer=nccl", "cluster.placement=colocated"],
        ["`rollout.transfer`", "two ranks on one GPU", "gloo"],
        ["rollout.transfer=gloo"],
    ),
    (
        ["cluster.device=cpu", "cluster.placement=colocated"],
        ["`cluster.placement`", "`cluster.device` is cpu"],
        ["cluster.device=auto"],
    ),
    (
        ["cluster.colocated_engines=1"],
        ["`cluster.colocated_engines`", "`cluster.placement: mixed`"],
        ["cluster.placement=mixed", "rollout.engines=2"],
    ),
    (
        ["cluster.placement=mixed", "rollout.engines=2"],
        ["`cluster.colocated_engines`", "fewer than all", "colocated", "disaggregated"],
        ["cluster.colocated_engines=1"],
    ),
    (
        ["cluster.placement=colocated", "rollout.engines=2", "rollout.tensor_parallel_size=2", "policy.ranks=2"],
        ["`cluster.placement`", "2 x 2 = 4", "`policy.ranks` is 2"],
        ["policy.ranks=4"],
    ),
    (
        ["cluster.policy_nodes=2", "cluster.address=auto"],
        ["`cluster.policy_nodes`", "1 rank(s)"],
        ["policy.ranks=2"],
    ),
    (
        ["cluster.policy_nodes=2", "policy.ranks=2"],
        ["`cluster.policy_nodes`", "`cluster.address`", "`auto`"],
        ["cluster.address=auto"],
    ),
    (
        ["cluster.node_resources={rollout: big}"],
        ["`cluster.node_resources`", "`cluster.address`"],
        ["cluster.address=auto"],
    ),
    (
        ["cluster.node_resources={rolout: big}"],
        ["`cluster.node_resources`", "did you mean `rollout`"],
        ["cluster.node_resources={rollout: big}", "cluster.address=auto"],
    ),
    (
        ["rollout.straddle_nodes=true", "cluster.address=auto"],
        ["`rollout.straddle_nodes`", "`rollout.tensor_parallel_size`"],
        ["rollout.tensor_parallel_size=2"],
    ),
    (
        ["rollout.straddle_nodes=true", "rollout.tensor_parallel_size=2"],
        ["`rollout.straddle_nodes`", "`cluster.address`"],
        ["cluster.address=auto"],
    ),
    (
        [
            "rollout.straddle_nodes=true",
            "rollout.tensor_parallel_size=2",
            "cluster.address=auto",
            "cluster.device=cpu",
        ],
        ["`rollout.straddle_nodes`", "GPUs only"],
        ["cluster.device=cuda"],
    ),
    (
        [
            "rollout.straddle_nodes=true",
            "rollout.tensor_parallel_size=2",
            "cluster.address=auto",
            "cluster.placement=colocated",
            "policy.ranks=2",
        ],
        ["`rollout.straddle_nodes`", "lies in one node"],
        ["cluster.placement=disaggregated"],
    ),
    (["reward.gpus=1.5"], ["`reward.gpus`", "not 1.5", "whole"], ["reward.gpus=2.0"]),
    (["reward.path=some/folder"], ["`reward.path`", "module:name", "`reward.kind: model`"], ["reward.kind=model"]),
    (["reward.kind=model"], ["`reward.path`", "`reward.kind: function`"], ["reward.kind=function"]),
    (["reward.input=conversation"], ["`reward.input`", "`reward.kind: model`"], ["reward.input=response"]),
    (["reward.kind=pairwise_model"], ["`reward.path`", "pairwise_model"], ["reward.path=some/folder"]),
    (["reward.path=null"], ["`reward.path` is missing", "module:name"], ["reward.path=my.module:reward"]),
    (
        ["reward.kind=model", "reward.path=null"],
        ["`reward.path` is missing", "`reward.url`"],
        ["reward.path=some/folder"],
    ),
    (
        ["reward.kind=remote", "reward.path=null"],
        ["`reward.url` is missing", "rlhf reward serve"],
        ["reward.url=http://host:8000"],
    ),
    (
        ["reward.kind=pairwise_remote", "reward.path=null", "reward.url=host:8000"],
        ["`reward.url`", "http://"],
        ["reward.url=https://host:8000"],
    ),
    (
        ["reward.kind=remote", "reward.url=http://host:8000"],
        ["`reward.path` would change nothing", "remote"],
        ["reward.path=null"],
    ),
    (["reward.url=http://host:8000"], ["`reward.url` would change nothing", "function"], ["reward.url=null"]),
    (["reward.cache=9"], ["`reward.cache`", "function"], ["reward.kind=model", "reward.path=some/folder"]),
    (
        ["reward.batch_tokens=99"],
        ["`reward.batch_tokens`", "function"],
        ["reward.kind=model", "reward.path=some/folder"],
    ),
    (["reward.canaries_every=3"], ["`reward.canaries_every`", "no `reward.canaries`"], ["reward.canaries=pairs.jsonl"]),
    (["reward.canaries_tolerance=3"], ["`reward.canaries_tolerance`"], ["reward.canaries=pairs.jsonl"]),
    (
        ["reward.kind=verifier", "reward.path=maths"],
        ["`reward.path`", "instructions, reasoning_gym"],
        ["reward.path=math"],
    ),
    (
        ["reward.kind=verifier", "reward.path=math", "reward.judge_prompt=ask.txt"],
        ["`reward.judge_prompt`", "verifier"],
        ["reward.judge_prompt=null"],
    ),
    (
        ["reward.kind=llm_judge", "reward.path=null", "reward.url=http://host/v1"],
        ["`reward.path` is missing", "the endpoint knows"],
        ["reward.path=some-model"],
    ),
    (
        ["reward.kind=llm_judge", "reward.path=m", "reward.url=host/v1"],
        ["`reward.url`", "`http://host:8000/v1`"],
        ["reward.url=http://host/v1"],
    ),
    (
        ["reward.kind=llm_judge", "reward.path=some/folder", "reward.max_wait_ms=5"],
        ["`reward.max_wait_ms`", "vLLM"],
        ["reward.max_wait_ms=10"],
    ),
    (
        ["reward.kind=pairwise_function", "reward.input=conversation"],
        ["`reward.input`", "pairwise_function"],
        ["reward.input=response"],
    ),
    (
        ["reward.kind=pairwise_function", "reward.transforms=[{name: missing_eos, penalty: 1}]"],
        ["`reward.transforms`", "probabilities"],
        ["reward.kind=function"],
    ),
    (
        ["policy.lora.alpha=32", "policy.lora.publish=adapter"],
        ["`policy.lora.alpha`, `policy.lora.publish`", "`policy.lora.rank`"],
        ["policy.lora.rank=8"],
    ),
    (
        ["policy.lora.rank=8", "policy.lora.target_modules=[]"],
        ["`policy.lora.target_modules`", "all-linear"],
        ["policy.lora.target_modules=[q_proj]"],
    ),
    (
        ["policy.lora.rank=8", "algorithm.reference=ema"],
        ["`algorithm.reference`", "fixed or previous", "`policy.lora.rank: 0`"],
        ["algorithm.reference=previous"],
    ),
    (
        ["policy.lora.rank=8", "algorithm.name=nash_ema"],
        ["`algorithm.name`", "nash_md", "`policy.lora.rank: 0`"],
        ["algorithm.name=nash_md"],
    ),
    (
        ["policy.lora.rank=8", "policy.lora.publish=adapter", "algorithm.name=xpo"],
        ["`policy.lora.publish`", "xpo", "`policy.lora.publish: merged`"],
        ["policy.lora.publish=merged"],
    ),
    (
        ["policy.lora.rank=8", "policy.lora.publish=adapter", "rollout.sleep_level=2", "cluster.placement=colocated"],
        ["`rollout.sleep_level`", "`rollout.sleep_level: 1`"],
        ["rollout.sleep_level=1"],
    ),
    (
        ["policy.lora.rank=8", "policy.lora.quantize_base=4bit", "policy.lora.publish=adapter"],
        ["`policy.lora.publish: merged`", "`policy.lora.quantize_base`"],
        ["policy.lora.publish=merged"],
    ),
    (
        ["policy.lora.rank=8", "policy.lora.quantize_base=4bit", "policy.zero_stage=3"],
        ["`policy.zero_stage`", "0, 1 or 2"],
        ["policy.zero_stage=2"],
    ),
    (["loop.eval_every=5"], ["`loop.eval_every`", "`data.eval_prompts`"], ["data.eval_prompts=held_out.jsonl"]),
]


@pytest.mark.parametrize(("wrong", "words", "remedy"), CASES, ids=[case[0][0] for case in CASES])
def test_check(load_with: Callable[..., Settings], wrong: list[str], words: list[str], remedy: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_with(*wrong)
    assert "problems" not in str(caught.value), "one mistake, one message"
    for word in words:
        assert word in str(caught.value)
    load_with(*wrong, *remedy)


def test_an_asset_is_not_an_import_path(load_with: Callable[..., Settings]) -> None:
    settings = load_with("reward.kind=model", "reward.path=asset:minilm-l6-v2")
    assert settings.reward.path == "asset:minilm-l6-v2"


@given(
    prompts=st.integers(1, 40),
    ranks=st.integers(1, 8),
    updates=st.integers(1, 8),
    steps=st.integers(1, 9),
    warmup=st.integers(0, 99),
    budget=st.integers(1, 2000),
)
def test_a_plan_without_problems_fits(**sizes: int) -> None:
    settings = Settings(
        data=DataSettings(prompts="p"),
        reward=RewardSettings(kind="function", path="m:f"),
        policy=PolicySettings(
            model="m", ranks=sizes["ranks"], warmup_steps=sizes["warmup"], micro_batch_tokens=sizes["budget"]
        ),
        loop=LoopSettings(steps=sizes["steps"], prompts_per_step=sizes["prompts"], updates_per_step=sizes["updates"]),
    )
    fits = (
        sizes["prompts"] // (sizes["ranks"] * sizes["updates"]) >= 1
        and sizes["warmup"] <= optimizer_steps(settings)
        and sizes["budget"] >= largest_assignment(settings)
    )
    assert fits == (not problems(settings))
