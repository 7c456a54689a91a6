"""A mixture of experts in a real engine: after new weights it computes what transformers computes, its router's bias included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

from rlhf.cluster import LocalRuntime
from rlhf.rollout import RolloutPool, Sampling
from rlhf.training.weights import whole_weights
from tests.rollout.publishing import GAP, PROMPTS, Publisher, largest_gap, load_model, sample_all

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """One dense layer and one of four experts, whose width vLLM pads for a CPU, behind a router with a bias that is a buffer."""
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            n_shared_experts=1,
            max_position_embeddings=256,
            eos_token_id=258,
            pad_token_id=256,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    path = tmp_path_factory.mktemp("experts")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pool(tiny_settings: Callable[..., Any], run: Callable[..., Any], folder: Path) -> Iterator[RolloutPool]:
    before = dict(os.environ)
    started = run(RolloutPool.start(LocalRuntime(), tiny_settings(policy={"model": str(folder)})))
    yield started
    run(started.close())
    os.environ.clear()
    os.environ.update(before)


def test_new_weights_are_packed_as_the_first_ones(pool: RolloutPool, run: Callable[..., Any], folder: Path) -> None:
    publisher = Publisher(pool, run)
    for scale in (None, 1.0, 1.1, 1.0):  # the first is what the engine has read from the folder
        model = load_model(folder, scale or 1.0)
        if scale is not None:
            publisher.publish(list(whole_weights(model)))
        for prompt, answers in zip(PROMPTS, sample_all(pool, run, Sampling(2, 16, seed=3)), strict=True):
            assert largest_gap(model, prompt, answers) < GAP
