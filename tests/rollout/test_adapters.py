"""Engines that are sent LoRA adapters: in this process, and as a Ray actor with two workers that each hold a part of the model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.cluster import LocalRuntime, fetch
from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings
from rlhf.config.settings import Settings
from rlhf.engines.arguments import EngineSpec, engine_arguments
from rlhf.engines.lora import peft_config
from rlhf.rollout import RolloutPool, Sampling
from rlhf.rollout.spec import rollout_spec
from rlhf.training import lora
from rlhf.training.weights import whole_weights
from rlhf.transfer import TransferFailed
from tests.rollout.publishing import (
    GAP,
    PROMPTS,
    Named,
    Publisher,
    asked_until_one_answers,
    largest_gap,
    load_model,
    sample_all,
    span_gap,
)

LORA = {"rank": 4, "alpha": 8.0, "publish": "adapter"}  # vLLM pads to a rank of 8
SAMPLING = Sampling(n=2, max_tokens=24, temperature=1.0, seed=0, source="policy")
SOME = PROMPTS[:4]  # eight responses, one more than the engines write at once


def test_what_vllm_is_told(tiny_settings: Any) -> None:
    def settings(**values: Any) -> Any:
        return tiny_settings(policy={"lora": values})

    def spec(made: Settings, mixes: bool = False) -> EngineSpec:
        return rollout_spec(made, "model", backend="gloo", gpu=False, local=False, mixes=mixes)

    merged = settings(rank=8)
    assert spec(merged).lora_rank is None and peft_config(merged.policy.lora) is None
    assert "enable_lora" not in engine_arguments(spec(merged))
    ranks = [(4, 8), (8, 8), (17, 32), (400, 512)]
    told = [engine_arguments(spec(settings(rank=rank, publish="adapter"))) for rank, _ in ranks]
    assert [arguments["max_lora_rank"] for arguments in told] == [padded for _, padded in ranks]
    assert peft_config(settings(**LORA).policy.lora) == {"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear"}
    with pytest.raises(UserError, match="policy.lora.publish=merged"):
        engine_arguments(spec(settings(**LORA), mixes=True))


@pytest.fixture(scope="module", params=["local", "two workers"])
def pool(request: Any, tiny_settings: Any, run: Any, ray_runtime: Any) -> Iterator[RolloutPool]:
    before, local = dict(os.environ), request.param == "local"
    rollout = {"max_num_seqs": 7, "tensor_parallel_size": 1 if local else 2}
    made = tiny_settings(policy={"lora": LORA}, rollout=rollout)
    runtime = LocalRuntime() if local else ray_runtime
    started = run(RolloutPool.start(runtime, made))
    yield started
    run(started.close())
    if local:
        os.environ.clear()
        os.environ.update(before)


def adapter(folder: Path, seed: int, **settings: Any) -> tuple[Named, torch.nn.Module]:
    """An adapter's matrices, and an ordinary model with their product added."""
    torch.manual_seed(seed)
    model = load_model(folder)
    lora.add_adapters(model, LoraSettings(**LORA | settings))
    for parameter in lora.adapter_parameters(model, lora.POLICY):
        torch.nn.init.normal_(parameter, std=0.15)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged.load_state_dict(dict(whole_weights(model, lora.POLICY)), strict=False)
    return list(lora.adapter_weights(model)), merged


@pytest.mark.engine
def test_responses_are_of_the_base_with_the_adapter_that_came_last(pool: Any, tiny_model: Path, run: Any) -> None:
    publisher, base = Publisher(pool, run), load_model(tiny_model)

    def gaps(*models: torch.nn.Module) -> list[list[float]]:
        drawn = sample_all(pool, run, SAMPLING, prompts=SOME)
        pairs = list(zip(SOME, drawn, strict=True))
        return [[largest_gap(model, prompt, answers) for prompt, answers in pairs] for model in models]

    assert max(gaps(base)[0]) < GAP, "before the first adapter"
    for seed, some in ((1, {}), (2, {"target_modules": ["q_proj", "down_proj"]}), (3, {})):
        matrices, merged = adapter(tiny_model, seed, **some)
        sent = [(name, tensor.clone()) for name, tensor in matrices]
        publisher.publish(matrices)
        of_merged, of_base = gaps(merged, base)
        assert max(of_merged) < GAP
        assert min(of_base) > 100 * GAP
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(matrices, sent, strict=True)), "vLLM scales copies"


@pytest.mark.engine
def test_responses_in_flight_go_on_with_the_new_adapter(pool: Any, tiny_model: Path, run: Any) -> None:
    publisher, (first, old), (second, new) = Publisher(pool, run), adapter(tiny_model, 4), adapter(tiny_model, 5)

    async def finished() -> list[Any]:
        return await asyncio.gather(*asked)

    publisher.publish(first)
    models = {publisher.version: old, publisher.version + 1: new}
    asked = run(asked_until_one_answers(pool, replace(SAMPLING, max_tokens=48, n=4, ignore_eos=True), PROMPTS))
    publisher.publish(second)
    answers = fetch([rollout.completions for rollout in run(finished())])
    assert max(len(answer.spans) for of_prompt in answers for answer in of_prompt) == 2
    for prompt, of_prompt in zip(PROMPTS, answers, strict=True):
        assert max(span_gap(models, prompt, answer) for answer in of_prompt) < GAP


@pytest.mark.engine
def test_layers_that_vllm_would_ignore_are_refused(pool: Any, tiny_model: Path, run: Any) -> None:
    matrices, _ = adapter(tiny_model, 1)
    wrong = [(name.replace("layers.1", "layers.7"), tensor) for name, tensor in matrices]
    with pytest.raises(TransferFailed, match=r"cannot adapt .*layers\.7\..*policy.lora.publish=merged"):
        Publisher(pool, run).publish(wrong)
