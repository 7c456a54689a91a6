"""Mixtures in real engines: exact log-probs and frequencies, and weights that reach one slot only.

Three architectures, each with an engine in this process: Llama with tied embeddings, Qwen2 with an output layer of its own
and biases, GPT-2 with another layout of its weights. Then one engine as a Ray actor with two workers, each with a part of both models; that
one worker in Ray samples as an engine in this process does is shown in tests/test_end_to_end.py. fp32, tiny.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from rlhf.cluster import LocalRuntime, fetch
from rlhf.cluster.lives import Member
from rlhf.rollout import RolloutPool, Sampling, StaleWeights
from rlhf.rollout.engine import RolloutEngine
from rlhf.transfer import TransferFailed
from rlhf.types import Completion, ModelSlot, Prompt, Shipment
from tests.rollout.publishing import GAP, PROMPTS, Publisher, asked_until_one_answers, load_model, sample_all

pytestmark = pytest.mark.engine

BETAS = (0.0, 0.125, 0.5, 1.0)
OTHER: dict[ModelSlot, ModelSlot] = {"policy": "partner", "partner": "policy"}
SIZES = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}


def build(architecture: str, folder: Path) -> None:
    """A tiny model with random weights, sharp enough that likely and unlikely tokens differ."""
    torch.manual_seed(1)
    if architecture == "qwen2":
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = Qwen2Config(hidden_size=64, intermediate_size=96, tie_word_embeddings=False, **heads, **SIZES)
        model = Qwen2ForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=512, **SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)


class Engines:
    """A pool whose policy has learned something and whose partner has not."""

    def __init__(
        self, pool: RolloutPool, run: Any, folder: Path, prompts: Sequence[Prompt] = PROMPTS, tokens: int = 32
    ):
        self.pool, self.folder, self.run, self.prompts, self.tokens = pool, folder, run, prompts, tokens
        self.publisher = Publisher(pool, run)
        self.models: dict[ModelSlot, torch.nn.Module] = {"partner": load_model(folder)}
        self.publish(1.1)

    def publish(self, scale: float, slot: ModelSlot = "policy") -> None:
        self.models[slot] = load_model(self.folder, scale)
        self.publisher.publish(self.models[slot], slot=slot)

    def sample(self, drawn: Sequence[Sampling]) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Each prompt with its answers."""
        return zip(self.prompts, sample_all(self.pool, self.run, *drawn, prompts=self.prompts), strict=True)

    def held(self) -> dict[ModelSlot, tuple[str, ...]]:
        return dict(self.pool._versions.checksums(Member(0)))

    def logits(self, prompt: Prompt, answer: Completion) -> tuple[torch.Tensor, torch.Tensor]:
        """Policy's and partner's by transformers, each [n_tokens, vocabulary]."""
        row = torch.tensor([*prompt.token_ids, *answer.token_ids.tolist()])[None]
        with torch.no_grad():
            both = [self.models[slot](row).logits[0, len(prompt.token_ids) - 1 : -1] for slot in ("policy", "partner")]
        return both[0], both[1]

    def gap(self, prompt: Prompt, answer: Completion, beta: float) -> float:
        """The largest of `gaps`."""
        return float(self.gaps(prompt, answer, beta).max())

    def gaps(self, prompt: Prompt, answer: Completion, beta: float) -> torch.Tensor:
        """Differences (nats) between the engine's log-probs and those of the mixture with this coefficient, [n_tokens]."""
        policy, partner = self.logits(prompt, answer)
        mixed = ((1 - beta) * policy.log_softmax(-1) + beta * partner.log_softmax(-1)).log_softmax(-1)
        expected = mixed.gather(1, torch.tensor(answer.token_ids, dtype=torch.long)[:, None])[:, 0]
        return (expected - torch.tensor(answer.logprobs)).abs()


def samplings(n: int = 2, tokens: int = 32, seed: int = 0, temperature: float = 1.0) -> list[Sampling]:
    return [Sampling(n, tokens, temperature, seed=seed, source=f"beta {b}", mixture=b) for b in BETAS]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def engines(request, tiny_model, tiny_settings, tmp_path_factory, run) -> Iterator[Engines]:
    folder = tiny_model
    if request.param != "llama":
        folder = tmp_path_factory.mktemp(request.param)
        build(request.param, folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    before = dict(os.environ)
    # Fewer places than requests, so that requests wait, leave at different times and move to other rows.
    settings = tiny_settings(policy={"model": str(folder), "dtype": "fp32"}, rollout={"max_num_seqs": 7})
    pool = run(RolloutPool.start(LocalRuntime(), settings, mixes=True))
    yield Engines(pool, run, folder)
    run(pool.close())
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def remote_engines(ray_runtime, tiny_model, tiny_settings, run) -> Iterator[Engines]:
    """Two workers, which talk at every token: so there are fewer of them."""
    rollout = {"max_num_seqs": 7, "tensor_parallel_size": 2, "in_flight": "wait"}
    pool = run(RolloutPool.start(ray_runtime, tiny_settings(rollout=rollout), mixes=True))
    yield Engines(pool, run, tiny_model, PROMPTS[:3], tokens=16)
    run(pool.close())


def check_logprobs(engines: Engines) -> None:
    """All coefficients in one batch, each response against its own mixture, and against the other coefficients."""
    drawn = samplings(tokens=engines.tokens)
    for prompt, answers in engines.sample(drawn):
        for position, answer in enumerate(answers):
            beta = drawn[position // 2].mixture
            assert answer.source == f"beta {beta}"
            assert answer.spans[0].by_policy == (beta == 0)
            assert answer.info().weight_version == engines.publisher.version
            assert engines.gap(prompt, answer, beta) < GAP
            if len(answer.token_ids) > 8:
                assert min(engines.gap(prompt, answer, other) for other in BETAS if other != beta) > 100 * GAP


def test_logprobs_are_those_of_the_mixture(engines) -> None:
    check_logprobs(engines)


def test_logprobs_are_those_of_the_mixture_in_ray(remote_engines) -> None:
    check_logprobs(remote_engines)


def test_the_temperature_applies_to_the_mixture(engines) -> None:
    prompt = PROMPTS[0]
    (answers,) = sample_all(engines.pool, engines.run, *samplings(n=1, temperature=0.7), prompts=[prompt])
    for beta, answer in zip(BETAS, answers, strict=True):
        policy, partner = engines.logits(prompt, answer)
        expected = (((1 - beta) * policy + beta * partner) / 0.7).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(answer.token_ids, dtype=torch.long)[:, None])[:, 0]
        assert (chosen - torch.tensor(answer.logprobs)).abs().max() < GAP


def test_greedy_takes_the_mixtures_likeliest_token(engines) -> None:
    for prompt, answers in engines.sample(samplings(n=1, temperature=0.0)):
        for beta, answer in zip(BETAS, answers, strict=True):
            policy, partner = engines.logits(prompt, answer)
            assert ((1 - beta) * policy + beta * partner).argmax(-1).tolist() == answer.token_ids.tolist()


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square test of goodness of fit; outcomes expected less than five times are counted together."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    rare[expected.argmin()] = True  # at least one, so that the last count is never expected to be zero
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def test_tokens_have_the_mixtures_frequencies(engines) -> None:
    """Also that the test would notice another coefficient, one of the two alone, or a mixture of the probabilities."""
    prompt = PROMPTS[1]
    engines.publish(-1.0)  # a policy far from its partner
    for beta in (0.125, 0.5):
        draw = Sampling(3000, 1, seed=11, source="one token", mixture=beta)
        (answers,) = sample_all(engines.pool, engines.run, draw, prompts=[prompt])
        counts = torch.bincount(torch.tensor([answer.token_ids[0] for answer in answers]), minlength=320)
        policy, partner = (logits[0].double() for logits in engines.logits(prompt, answers[0]))
        mixed = {b: ((1 - b) * policy + b * partner).softmax(-1) for b in (0.0, beta, beta + 0.125, 1.0)}
        assert p_value(counts, mixed.pop(beta)) > 1e-3
        arithmetic = (1 - beta) * policy.softmax(-1) + beta * partner.softmax(-1)
        assert max(p_value(counts, wrong) for wrong in (*mixed.values(), arithmetic)) < 1e-4
    engines.publish(1.1)


def tokens_of(engines: Engines) -> dict[float, list[list[int]]]:
    answers = [of_prompt for _, of_prompt in engines.sample(samplings(n=1, tokens=engines.tokens, seed=4))]
    return {b: [of_prompt[i].token_ids.tolist() for of_prompt in answers] for i, b in enumerate(BETAS)}


@pytest.mark.parametrize("slot", ["policy", "partner"])
def test_new_weights_change_one_slot_only(engines, slot: ModelSlot) -> None:
    check_one_slot_changes(engines, slot)


@pytest.mark.parametrize("slot", ["policy", "partner"])
def test_new_weights_change_one_slot_only_in_ray(remote_engines, slot: ModelSlot) -> None:
    check_one_slot_changes(remote_engines, slot)


def check_one_slot_changes(engines: Engines, slot: ModelSlot) -> None:
    ends = {"policy": 0.0, "partner": 1.0}
    version, before, held = engines.publisher.version, tokens_of(engines), engines.held()
    engines.publish(0.95, slot)
    after, now = tokens_of(engines), engines.held()
    assert engines.publisher.version == version + (slot == "policy")
    assert after[ends[OTHER[slot]]] == before[ends[OTHER[slot]]]
    assert now[OTHER[slot]] == held[OTHER[slot]]
    assert all(after[beta] != before[beta] for beta in (ends[slot], 0.5))
    assert now[slot] != held[slot]
    check_logprobs(engines)
    engines.publish(1.1 if slot == "policy" else 1.0, slot)
    assert engines.held() == held
    assert tokens_of(engines) == before


def test_the_checksum_sees_each_single_tensor(engines) -> None:
    """On CPU vLLM hides packed weights from its parameters; an attestation that read only those would miss most of these."""
    model = load_model(engines.folder, 1.1)
    seen = {engines.held()["policy"]}
    names = [name for name, parameter in model.named_parameters() if "layers.0" in name or "h.0" in name]
    names += [name for name, _ in model.named_parameters() if "embed" in name or "wte" in name or "lm_head" in name]
    for name in names:
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.001).add_(1e-3)
        engines.publisher.publish(model)
        seen.add(engines.held()["policy"])
        with torch.no_grad():
            parameter.copy_(kept)
    assert len(seen) == 1 + len(names) > 9
    engines.publisher.publish(model)


def test_the_pool_notices_when_the_other_slot_has_changed(engines) -> None:
    inside = engines.pool._handles[0].target._engine
    behind = Shipment(engines.publisher.version, "partner", ())
    inside.load(load_model(engines.folder, 1.02).named_parameters(), behind)  # behind the pool's back
    with pytest.raises(StaleWeights, match="sent for the policy, but in engine 0 those of the partner changed"):
        engines.publish(1.1)
    with pytest.raises(StaleWeights, match="not yet confirmed"):
        engines.run(engines.pool.sample(PROMPTS[0], samplings()))
    inside.load(engines.models["partner"].named_parameters(), behind)
    engines.publish(1.1)
    check_logprobs(engines)


def test_a_slot_whose_transfer_failed_is_not_made_good_by_the_other(engines) -> None:
    model = load_model(engines.folder, 1.3)
    most = list(model.named_parameters())[:-3]
    with pytest.raises(TransferFailed, match="would have kept their old"):
        engines.publisher.publish(most)
    engines.publisher.connect()
    with pytest.raises(StaleWeights, match=f"engines attest engine 0: version {engines.publisher.version - 1}"):
        engines.publish(1.0, "partner")
    engines.publisher.version -= 1
    engines.publish(1.0, "partner")
    with pytest.raises(StaleWeights):
        engines.run(engines.pool.sample(PROMPTS[0], samplings()))
    engines.publish(1.1)
    engines.publish(1.0, "partner")
    check_logprobs(engines)


def test_the_slots_share_no_compiled_code(engines) -> None:
    """vLLM caches compiled code under a hash of the configuration, and the code names the layers whose cache it uses."""
    inside = engines.pool._handles[0].target._engine._llm
    model = inside.collective_rpc(lambda worker: worker.model_runner.get_model())[0]
    hashes = {
        layers.vllm_config.compute_hash()
        for slot in (model.policy, model.partner)
        for layers in (slot.model if hasattr(slot, "model") else slot.transformer,)
    }
    assert len(hashes) == 2


@pytest.mark.parametrize("slot", ["policy", "partner"])
def test_new_weights_in_flight(engines, slot: ModelSlot) -> None:
    check_in_flight(engines, slot, keep=True)


@pytest.mark.parametrize("slot", ["policy", "partner"])
def test_new_weights_wait_for_what_is_in_flight_in_ray(remote_engines, slot: ModelSlot) -> None:
    check_in_flight(remote_engines, slot, keep=False)


def check_in_flight(engines: Engines, slot: ModelSlot, *, keep: bool) -> None:
    """Every token of a mixture is written by the weights that both slots held at its time, and those of one response change once."""
    old, version, draw = dict(engines.models), engines.publisher.version, Sampling(4, 48, seed=9, mixture=0.5)

    async def finished() -> list[Any]:
        return await asyncio.gather(*asked)

    asked = engines.run(asked_until_one_answers(engines.pool, replace(draw, ignore_eos=True), PROMPTS))
    engines.publish(0.9, slot)
    new, changes = dict(engines.models), set()
    answers = fetch([rollout.completions for rollout in engines.run(finished())])
    for prompt, answer in [(prompt, one) for prompt, several in zip(PROMPTS, answers, strict=True) for one in several]:
        engines.models = old
        before = engines.gaps(prompt, answer, 0.5) < GAP
        engines.models = new
        after = engines.gaps(prompt, answer, 0.5) < GAP
        change = int(before.long().cumprod(0).sum())  # tokens of the old weights
        assert after[change:].all()
        changes.add("before" if after.all() else "after" if before.all() else "within")
        if slot == "policy":
            change = sum(len(span) for span in answer.spans if span.version == version)
            assert before[:change].all() and after[change:].all(), "the spans say where"
        else:
            assert {span.version for span in answer.spans} == {version}
    assert changes == {"before", "after"} | ({"within"} if keep else set())
    engines.publish(1.1 if slot == "policy" else 1.0, slot)


def test_an_engine_without_a_partner_refuses_mixtures(tiny_settings, run) -> None:
    engine = RolloutEngine(tiny_settings(), 0, local=True, backend="local", gpu=False)
    with pytest.raises(ValueError, match="start the pool with mixes"):
        run(engine.sample(PROMPTS[0], samplings()))
    with pytest.raises(ValueError, match="start the pool with mixes"):
        run(engine.receive_weights(Shipment(1, "partner", ())))


def test_the_checkpoint_is_read_once_for_both(engines) -> None:
    """Both slots begin with the model's files; the checkpoint on disk is the partner's by now."""
    on_disk = AutoModelForCausalLM.from_pretrained(engines.folder, dtype=torch.float32)
    for name, parameter in on_disk.named_parameters():
        assert torch.equal(parameter, engines.models["partner"].get_parameter(name))


def test_weights_for_one_slot_are_not_taken_for_the_other(engines) -> None:
    """The last test of an engine: afterwards both slots are in doubt."""
    pool, publisher = engines.pool, engines.publisher
    named = list(engines.models["partner"].named_parameters())
    publisher.sender.send(named, Shipment(publisher.version, "partner", ()))
    with pytest.raises(
        TransferFailed, match="announced weights for the policy, but the sender sent them for the partner"
    ):
        engines.run(pool.receive(Shipment(publisher.version, "policy", ())))
