"""Operations of learning: the formula against what torch counts, and their rate over a step that comes in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.policy.throughput import Learners, Throughput
from rlhf.training.flops import learning_flops
from rlhf.training.shapes import ModelShape, model_shape
from rlhf.types import Assignment, Completion, Prompt, Rollout, TrainingItem

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)
TOKENS = 24


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(CONFIG)


def counted(*, trained: bool) -> int:
    """What torch counts for a forward and backward pass over one sequence, whose attention computes all pairs."""
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained or "embed" in name)  # what adapters do: gradients pass through to the bottom
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(TOKENS)[None]).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", [True, False])
def test_the_formula_is_what_torch_counts(shape: ModelShape, trained: bool) -> None:
    above_diagonal = 3 * 4 * shape.layers * shape.queries * TOKENS**2 / 2
    expected = counted(trained=trained) - above_diagonal
    assert learning_flops(shape, 0, [TOKENS], trained=trained) == pytest.approx(expected, rel=1e-6)


def test_a_prompt_is_shared_and_not_projected_to_the_vocabulary(shape: ModelShape) -> None:
    alone = learning_flops(shape, 10, [5])
    both = learning_flops(shape, 10, [5, 5])
    weights = 6 * (shape.linear + shape.vocabulary * shape.hidden) * 5
    attention = 3 * 4 * shape.layers * shape.queries * 5 * (10 + 2.5)
    assert both - alone == pytest.approx(weights + attention)
    head = 6 * shape.vocabulary * shape.hidden * 5
    assert alone - learning_flops(shape, 10, [5], head=False) == pytest.approx(head)


def assignment(prompt: int, lengths: list[int], used: tuple[int, ...]) -> Assignment:
    made = [
        Completion.of_one_version("p", np.zeros(length, np.int32), np.zeros(length, np.float32), 0, "stop")
        for length in lengths
    ]
    rollout = Rollout(Prompt("p", tuple(range(prompt)), ""), tuple(one.info() for one in made), None)
    return Assignment(rollout, (TrainingItem(members=used, coefficients=(1.0,) * len(used)),))


def test_the_rate_of_a_step_is_of_all_its_pieces_and_starts_anew(shape: ModelShape) -> None:
    meter = Throughput(Learners(shape, True, trained=True, epochs=2, ranks=4, peak=1e9))
    work = [assignment(7, [3, 9, 4], (0, 2)), assignment(5, [6], (0,))]
    meter.learned(work[:1], 1.5)
    meter.learned(work[1:], 2.0)
    meter.learned([], 0.5)
    flops = sum(
        learning_flops(shape, prompt, lengths, head=head)
        for prompt, lengths in ((7, [3, 4]), (5, [6]))
        for head in (True, False)
    )
    per_s = 2 * flops / 4.0 / 4
    assert meter.finish() == pytest.approx({"throughput/train_tflops": per_s / 1e12, "throughput/mfu": per_s / 1e9})
    meter.learned(work, 1.0)
    assert meter.finish()["throughput/mfu"] == pytest.approx(4 * per_s / 1e9)


def test_without_a_known_peak_there_is_no_utilisation(shape: ModelShape) -> None:
    meter = Throughput(Learners(shape, False, trained=True, epochs=1, ranks=1, peak=None))
    meter.learned([assignment(7, [3], (0,))], 1.0)
    assert meter.finish().keys() == {"throughput/train_tflops"}
