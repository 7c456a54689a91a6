"""Packed, chunked log-probs against plain transformers: packing, order, chunking and temperature change nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

from rlhf.cluster import fetch
from rlhf.training.loading import load_causal_lm
from rlhf.training.model import ChunkedLogProbs, LogProbModel, ModelError, check_forward
from rlhf.training.packing import idle, pack
from rlhf.types import Assignment, Completion, TrainingItem
from tests.helpers import make_rollout

CPU = torch.device("cpu")
TEXTS = [
    ((1, 5, 9, 4), [[7, 8, 9, 10, 11], [12, 13], [14]]),
    ((3, 2), [[20, 21, 22], [23, 24, 25, 26]]),
    ((6, 6, 6, 6, 6, 6), [[30], [31, 32]]),
]


def assignments(order: tuple[int, ...] = (0, 1, 2)) -> list[Assignment]:
    made = []
    for i in order:
        prompt, responses = TEXTS[i]
        items = tuple(TrainingItem((m,), (1.0,)) for m in range(len(responses)))
        made.append(Assignment(make_rollout(responses, prompt, name=str(i)), items))
    return made


def completions(made: list[Assignment]) -> list[list[Completion]]:
    return fetch([a.rollout.completions for a in made])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LogProbModel:
    return LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=4)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> torch.nn.Module:
    """The same weights with transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()


def separate(plain: torch.nn.Module, order: tuple[int, ...] = (0, 1, 2), temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of every response token from one forward pass per sequence."""
    parts = []
    for i in order:
        prompt, responses = TEXTS[i]
        for response in responses:
            ids = torch.tensor([[*prompt, *response]])
            logprobs = (plain(ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
            parts.append(logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,)])
def test_a_packed_row_equals_separate_sequences(
    model: LogProbModel, plain: torch.nn.Module, order: tuple[int, ...]
) -> None:
    made = assignments(order)
    logprobs, _ = model(pack(made, completions(made), CPU))
    assert torch.allclose(logprobs, separate(plain, order), atol=1e-5)


def test_gradients_of_a_packed_row_equal_those_of_separate_sequences(
    model: LogProbModel, plain: torch.nn.Module
) -> None:
    made = assignments()
    weights = torch.linspace(-1, 1, 18)
    model.zero_grad()
    plain.zero_grad()
    (model(pack(made, completions(made), CPU))[0] * weights).sum().backward()
    (separate(plain) * weights).sum().backward()
    ours, theirs = dict(model.causal_lm.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_chunks_change_neither_values_nor_gradients(cap: float | None, chunk: int, temperature: float) -> None:
    """Log-probs and entropies at a temperature, and the gradient of a loss of both, against autograd on whole logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, upstream, bonus = torch.arange(7), torch.linspace(-1, 1, 7), torch.linspace(0.5, -0.3, 7)
    logprobs, beside, entropy = ChunkedLogProbs.apply(
        hidden, weight, bias, targets, chunk, temperature, None, True, cap
    )
    assert beside is None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    everything = (logits / temperature).log_softmax(-1)
    expected, entropies = everything.gather(1, targets[:, None])[:, 0], -(everything.exp() * everything).sum(-1)
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), entropies, atol=1e-5)
    parameters = (hidden, weight, bias)
    for mine, other in (
        (logprobs @ upstream, expected @ upstream.double()),
        (entropy @ bonus, entropies @ bonus.double()),
        (logprobs @ upstream + entropy @ bonus, expected @ upstream.double() + entropies @ bonus.double()),
    ):
        ours = torch.autograd.grad(mine, parameters, retain_graph=True)
        theirs = torch.autograd.grad(other, parameters, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_log_probs_at_the_sampling_temperature(tiny_model: Path, plain: torch.nn.Module) -> None:
    model = LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=4, temperature=0.7)
    made = assignments()
    logprobs, tempered = model(pack(made, completions(made), CPU))
    assert torch.allclose(tempered, separate(plain, temperature=0.7), atol=1e-5)
    assert torch.allclose(logprobs, separate(plain), atol=1e-5)
    assert logprobs.requires_grad
    assert not tempered.requires_grad


def test_a_tempered_model_gives_its_gradient_and_entropy_at_the_sampling_temperature(
    tiny_model: Path, plain: torch.nn.Module
) -> None:
    model = LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=4, temperature=0.7, tempered=True)
    made = assignments()
    weights = torch.linspace(-1, 1, 18)
    logprobs, entropy = model(pack(made, completions(made), CPU))
    assert torch.allclose(logprobs, separate(plain, temperature=0.7), atol=1e-5)
    assert (entropy > 0).all()
    plain.zero_grad()
    (logprobs * weights).sum().backward()
    (separate(plain, temperature=0.7) * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.causal_lm.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=2e-5), name
    with torch.no_grad():
        assert model(pack(made, completions(made), CPU))[1] is None
    assert check_forward(model, model.causal_lm.config.vocab_size, CPU, 1e-3) < 1e-4


def test_the_check_at_start_passes_and_catches_a_model_that_scales_its_logits(tiny_model: Path) -> None:
    model = LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=4)
    vocabulary = model.causal_lm.config.vocab_size
    assert check_forward(model, vocabulary, CPU, 1e-3) < 1e-4
    model.causal_lm.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 2)
    with pytest.raises(ModelError, match="differ from the model's own"):
        check_forward(model, vocabulary, CPU, 1e-3)


def test_a_model_that_ignores_packed_attention_is_refused(tiny_model: Path) -> None:
    model = LogProbModel(load_causal_lm(str(tiny_model), "fp32"), chunk_tokens=4)
    model.causal_lm.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="differ from the model's own"):
        check_forward(model, model.causal_lm.config.vocab_size, CPU, 1e-3)


def test_a_sliding_window_is_respected(tmp_path: Path) -> None:
    """A window shorter than a group: compared with transformers' own sliding attention."""
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    model = LogProbModel(load_causal_lm(str(tmp_path), "fp32"), chunk_tokens=4)
    made = assignments()
    assert torch.allclose(model(pack(made, completions(made), CPU))[0], separate(plain), atol=1e-5)


def test_soft_capped_scores_and_logits_are_learned_through(tmp_path: Path) -> None:
    """Gemma 2 in small: caps of both kinds that bite, windows in every other layer; values and gradients."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=3, max_position_embeddings=64, query_pre_attn_scalar=16,
        attn_logit_softcapping=0.5, final_logit_softcapping=0.3, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    model = LogProbModel(load_causal_lm(str(tmp_path), "fp32"), chunk_tokens=4)
    made, weights = assignments(), torch.linspace(-1, 1, 18)
    logprobs, _ = model(pack(made, completions(made), CPU))
    assert torch.allclose(logprobs, separate(plain), atol=1e-5)
    (logprobs * weights).sum().backward()
    (separate(plain) * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.causal_lm.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-4), name
    assert check_forward(model, 64, CPU, 1e-3) < 1e-4
    assert model.head.cap == 0.3


def test_only_used_responses_are_packed() -> None:
    rollout = make_rollout([[7, 8, 9], [10, 11], [12]], (1, 2))
    pair = Assignment(rollout, (TrainingItem((2, 0), (1.0, -1.0)),))
    experience = pack([pair], completions([pair]), CPU)
    assert experience.targets.tolist() == [7, 8, 9, 12]
    assert experience.input_ids.tolist() == [[1, 2, 7, 8]]
    assert experience.position_ids.tolist() == [[0, 1, 2, 3]]
    assert experience.source.tolist() == [1, 2, 3, 1]
    assert experience.coefficients.tolist() == [[-1.0, 1.0]]
    assert pair.n_tokens() == 6


def test_a_rank_without_work_has_a_row_that_runs(model: LogProbModel) -> None:
    experience = idle(CPU)
    logprobs, _ = model(experience)
    (experience.coefficients @ logprobs).sum().backward()
    assert len(experience.target) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_products_in_fp32_are_those_of_bf16_layers(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """On a CPU without a bf16 matrix unit; forward and gradients, to the rounding of bf16."""
    from rlhf.training import cpu_products

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    fast = copy.deepcopy(plain)
    cpu_products.use_fast_linear(torch.nn.Sequential(fast))
    inputs = [torch.randn(5, 7, 64, dtype=torch.bfloat16, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    monkeypatch.setattr(cpu_products, "_has_bf16_unit", lambda: False)
    outputs = [layer(x) for layer, x in zip((plain, fast), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    pairs = [
        outputs,
        [x.grad for x in inputs],
        *zip(*([p.grad for p in m.parameters()] for m in (plain, fast)), strict=True),
    ]
    for one, other in pairs:
        assert one.dtype == other.dtype == torch.bfloat16
        assert torch.allclose(one.float(), other.float(), rtol=0.02, atol=0.02 * one.float().abs().max().item())
    monkeypatch.setattr(cpu_products, "_has_bf16_unit", lambda: True)
    assert torch.equal(fast(inputs[1]), plain(inputs[1])), "elsewhere it is the plain layer"
