"""Mixtures without an engine: the mixing function, both logits processors over made-up batches, what may be mixed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from rlhf.engines import mixture
from rlhf.engines.mixture import CannotMix, mix, mixture_overrides
from rlhf.engines.mixture_processors import MixtureProcessor, MixtureProcessorV2
from rlhf.engines.plugin import MIXTURE_ARCHITECTURE, register

VOCABULARY = 7
betas = st.sampled_from([0.0, 0.125, 0.5, 1.0])


def geometric(policy: torch.Tensor, partner: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Probabilities of the mixture from its definition in probabilities, in float64; [rows, vocabulary]."""
    weight = beta.double()[:, None]
    powers = policy.double().softmax(-1) ** (1 - weight) * partner.double().softmax(-1) ** weight
    return powers / powers.sum(-1, keepdim=True)


def some_logits(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def params(beta: float) -> SamplingParams:
    return SamplingParams(extra_args={"mixture": beta} if beta else None)


def test_the_mixture_with_uniform_has_its_known_value() -> None:
    policy = torch.tensor([[0.6, 0.3, 0.1]]).log()
    mixed = mix(policy.clone(), torch.zeros(1, 3), torch.tensor([0.5]), None).softmax(-1)
    assert mixed[0].tolist() == pytest.approx([0.472734, 0.334273, 0.192993], abs=1e-6)


@given(st.lists(betas, min_size=1, max_size=6), st.integers(0, 99))
def test_mixing_logits_is_mixing_probabilities(beta: list[float], seed: int) -> None:
    policy, partner, weight = some_logits(len(beta), seed), some_logits(len(beta), seed + 100), torch.tensor(beta)
    mixed = mix(policy.clone(), partner, weight, None)
    torch.testing.assert_close(mixed.double().softmax(-1), geometric(policy, partner, weight), atol=1e-6, rtol=0)
    normalised = mix(policy.log_softmax(-1), partner.log_softmax(-1), weight, None)
    torch.testing.assert_close(mixed.softmax(-1), normalised.softmax(-1), atol=1e-6, rtol=0)


def test_at_the_ends_a_mixture_is_exactly_one_of_the_two() -> None:
    policy, partner = some_logits(2, 0), some_logits(2, 1)
    mixed = mix(policy.clone(), partner, torch.tensor([0.0, 1.0]), None)
    assert torch.equal(mixed, torch.stack([policy[0], partner[1]]))


def test_rows_that_are_not_named_stay_as_they_are() -> None:
    policy, partner = some_logits(4, 0), some_logits(2, 1)
    logits = policy.clone()
    mixed = mix(logits, partner.bfloat16(), torch.tensor([0.5, 1.0]), torch.tensor([3, 1]))
    assert mixed.data_ptr() == logits.data_ptr()
    assert torch.equal(mixed[[0, 2]], policy[[0, 2]])
    assert torch.equal(mixed[1], partner[1].bfloat16().float())
    torch.testing.assert_close(mixed[3], (policy[3] + partner[0].bfloat16().float()) / 2)


class Engine:
    """Stands in for an engine's configuration and its model: partner logits only for the rows that were asked for."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(mixed_rows=None, partner_logits=None)
        context = {mixture.CONTEXT_KEY: self.model}
        self.config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))

    def compute(self, partner: torch.Tensor) -> None:
        self.model.partner_logits = partner if self.model.mixed_rows is None else partner[self.model.mixed_rows]


class Batch:
    """vLLM's batch in small: requests leave gaps, new ones fill the lowest gaps, the last ones move into the others."""

    def __init__(self) -> None:
        self.rows: list[float] = []

    def step(self, leaving: set[int], entering: list[float], swap: tuple[int, int] | None) -> BatchUpdate | None:
        gaps = sorted(row for row in leaving if row < len(self.rows))
        slots: list[float | None] = [None if row in gaps else beta for row, beta in enumerate(self.rows)]
        added = []
        for beta in entering:
            row = gaps.pop(0) if gaps else len(slots)
            slots[row : row + 1] = [beta]
            added.append((row, params(beta), None, []))
        removed, moved = sorted(gaps, reverse=True), []
        while gaps:
            last = len(slots) - 1
            if slots[last] is None:
                slots.pop()
                gaps.remove(last)
                continue
            gap = gaps.pop(0)
            slots[gap] = slots.pop()
            moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
        self.rows = [beta for beta in slots if beta is not None]
        if swap is not None and max(swap) < len(self.rows) and swap[0] != swap[1]:
            i, j = swap
            self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
            moved.append((i, j, MoveDirectionality.SWAP))
        return BatchUpdate(len(self.rows), removed, added, moved) if removed or added or moved else None


steps = st.lists(
    st.tuples(
        st.sets(st.integers(0, 5), max_size=3),
        st.lists(betas, max_size=3),
        st.none() | st.tuples(st.integers(0, 5), st.integers(0, 5)),
    ),
    min_size=1,
    max_size=12,
)


@given(steps)
def test_each_row_is_mixed_by_its_own_request_however_rows_move(plan: list[Any]) -> None:
    engine, batch = Engine(), Batch()
    processor = MixtureProcessor(engine.config, torch.device("cpu"), False)
    for number, (leaving, entering, swap) in enumerate(plan):
        processor.update_state(batch.step(leaving, entering, swap))
        policy, partner = some_logits(len(batch.rows), number), some_logits(len(batch.rows), 100 + number)
        engine.compute(partner)
        mixed = processor.apply(policy.clone())
        expected = geometric(policy, partner, torch.tensor(batch.rows))
        torch.testing.assert_close(mixed.double().softmax(-1), expected, atol=1e-6, rtol=0)


def test_the_partner_is_asked_for_no_more_rows_than_are_mixed() -> None:
    engine, batch = Engine(), Batch()
    processor = MixtureProcessor(engine.config, torch.device("cpu"), False)
    processor.update_state(batch.step(set(), [0.0, 0.5, 0.0], None))
    assert engine.model.mixed_rows.tolist() == [1]
    processor.update_state(batch.step({1}, [], None))
    assert engine.model.mixed_rows.tolist() == []
    logits = some_logits(2, 0)
    assert processor.apply(logits) is logits
    processor.update_state(batch.step({0, 1}, [0.25, 1.0], None))
    assert engine.model.mixed_rows is None


def context(slots: list[int]) -> LogitsContext:
    mapping, rows = torch.tensor(slots), len(slots)
    nothing = torch.zeros(rows, dtype=torch.long)
    return LogitsContext(mapping, mapping, np.array(slots), nothing, nothing, nothing, np.ones(rows))


@given(st.lists(betas, min_size=4, max_size=4), st.lists(betas, min_size=4, max_size=4), st.permutations(range(4)))
def test_model_runner_v2_finds_each_rows_coefficient_by_its_slot(
    first: list[float], second: list[float], order: list[int]
) -> None:
    engine = Engine()
    processor = MixtureProcessorV2(engine.config, SimpleNamespace(max_num_reqs=4, device=torch.device("cpu")))
    for generation in (first, second):  # slots are used again
        for slot, beta in enumerate(generation):
            assert processor.add_request(slot, params(beta)) == (beta > 0)
        processor.apply_staged_writes()
        for slots in (order, order[:2]):
            policy, partner = some_logits(len(slots), 0), some_logits(len(slots), 1)
            engine.compute(partner)
            mixed = processor.apply(policy.clone(), context(slots))
            expected = geometric(policy, partner, torch.tensor([generation[slot] for slot in slots]))
            torch.testing.assert_close(mixed.double().softmax(-1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("processor", [MixtureProcessor, MixtureProcessorV2])
def test_a_coefficient_outside_its_range_is_refused(processor: type) -> None:
    for beta in (0.0, 0.125, 1.0):
        processor.validate_params(params(beta))
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie between 0"):
            processor.validate_params(params(beta))


PLAIN = {
    "is_pooling_model": False,
    "is_text_generation_model": True,
    "attn_type": "decoder",
    "has_inner_state": False,
    "is_hybrid": False,
    "is_attention_free": False,
    "supports_multimodal": False,
    "requires_raw_input_tokens": False,
}


@pytest.mark.parametrize(
    "fact, reason",
    [
        ({}, None),
        ({"is_pooling_model": True}, "does not generate text"),
        ({"attn_type": "encoder_decoder"}, "not a decoder"),
        ({"is_hybrid": True}, "keeps a state"),
        ({"supports_multimodal": True}, "reads more than token ids"),
    ],
)
def test_only_plain_decoders_are_mixed(tmp_path: Path, monkeypatch, fact: dict[str, Any], reason: str | None) -> None:
    register()
    info = SimpleNamespace(**(PLAIN | fact))
    monkeypatch.setitem(mixture.ModelRegistry.models, "Made", SimpleNamespace(inspect_model_cls=lambda: info))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Made"], "model_type": "llama"}))
    if reason is None:
        expected = {"architectures": [MIXTURE_ARCHITECTURE], "mixture_of": "Made"}
        assert mixture_overrides(str(tmp_path)) == expected
        return
    with pytest.raises(CannotMix, match=f"policy.model=.*{reason}"):
        mixture_overrides(str(tmp_path))


@pytest.mark.parametrize(
    "architecture, reason", [("NoSuchModel", "no implementation"), ("GptOssForCausalLM", "by name")]
)
def test_what_vllm_does_not_know_or_treats_by_name_is_refused(tmp_path: Path, architecture: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "llama"}))
    with pytest.raises(CannotMix, match=reason):
        mixture_overrides(str(tmp_path))


class Reusing(torch.nn.Module):
    """A model whose output lies in memory that others may be given as soon as it returns, as under piecewise CUDA graphs."""

    def __init__(self, memory: torch.Tensor, factor: float):
        super().__init__()
        self.memory, self.factor = memory, factor

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return self.memory.copy_(self.factor * input_ids[:, None])


def test_the_policys_states_survive_a_partner_that_reuses_their_memory() -> None:
    model = mixture.GeometricMixtureForCausalLM.__new__(mixture.GeometricMixtureForCausalLM)
    torch.nn.Module.__init__(model)
    memory = torch.zeros(3, 2)
    model.policy, model.partner = Reusing(memory, 1.0), Reusing(memory, 10.0)
    states = model(torch.tensor([1.0, 2.0, 3.0]), torch.arange(3))
    memory.zero_()  # a later forward
    assert states.tolist() == [[n, n, 10 * n, 10 * n] for n in (1.0, 2.0, 3.0)]
