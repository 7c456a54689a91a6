"""What tests of engines and their weights share: prompts, the tiny model, log-probs by transformers, a publisher."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf.cluster import fetch
from rlhf.cluster.network import free_port
from rlhf.rollout import RolloutPool, Sampling
from rlhf.transfer import WeightSender
from rlhf.types import Completion, ModelSlot, Prompt, Shipment, content_id
from tests.transfer.test_gloo import spec_of

GAP = 1e-4  # nats; engine and transformers round differently


def make_prompt(seed: int, n: int = 12) -> Prompt:
    ids = torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(content_id(ids), tuple(ids), "")


Named = list[tuple[str, torch.Tensor]]
PROMPTS = [make_prompt(seed, 5 + seed) for seed in range(8)]


def load_model(folder: Path, scale: float = 1.0) -> torch.nn.Module:
    """The tiny model with all its weights multiplied, as if it had learned something."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def reference_logprobs(model: torch.nn.Module, prompt: Prompt, answer: Completion, temperature: float) -> torch.Tensor:
    """Log-probs of the sampled tokens by transformers, [n_tokens]."""
    tokens = torch.tensor(answer.token_ids, dtype=torch.long)
    row = torch.cat([torch.tensor(prompt.token_ids), tokens])[None]
    with torch.no_grad():
        logits = model(row).logits[0, len(prompt.token_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def largest_gap(model: torch.nn.Module, prompt: Prompt, answers: list[Completion], temperature: float = 1.0) -> float:
    gaps = [
        (reference_logprobs(model, prompt, answer, temperature) - torch.tensor(answer.logprobs)).abs().max()
        for answer in answers
    ]
    return float(max(gaps))


def span_gap(models: Mapping[int, torch.nn.Module], prompt: Prompt, answer: Completion) -> float:
    """Largest difference (nats) between the engine's log-probs and transformers', of each span by the model of its version."""
    behaviour = torch.tensor(answer.logprobs)
    expected = {span: reference_logprobs(models[span.version], prompt, answer, 1.0) for span in answer.spans}
    return max(float((expected[span] - behaviour)[span.start : span.stop].abs().max()) for span in answer.spans)


async def asked_until_one_answers(
    pool: RolloutPool, sampling: Sampling, prompts: Sequence[Prompt]
) -> list[asyncio.Task[Any]]:
    """Requests of various lengths, of which the first has been answered, so that others are half-written."""
    samplings = [replace(sampling, max_tokens=sampling.max_tokens - 3 * (i % 8)) for i in range(len(prompts))]
    asked = [asyncio.ensure_future(pool.sample(p, [some])) for p, some in zip(prompts, samplings, strict=True)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    return asked


@dataclass
class Publisher:
    """A sender as policy rank 0 would be, with the driver's part of a publication."""

    pool: RolloutPool
    run: Callable[..., Any]
    sender: WeightSender | None = None
    version: int = 0
    shipment: Shipment = Shipment(0, "policy", ())

    def connect(self) -> None:
        session = self.pool.new_session("127.0.0.1", free_port())
        if self.sender is not None:
            self.sender.close()

        async def both() -> WeightSender:
            sender, _ = await asyncio.gather(asyncio.to_thread(WeightSender.open, session), self.pool.connect(session))
            return sender

        self.sender = self.run(both())

    def publish(
        self,
        weights: torch.nn.Module | Named,
        really_sent: Named | None = None,
        slot: ModelSlot = "policy",
        *,
        sender_first: bool = False,
    ) -> str:
        """
        Args:
            sender_first: the sender's part begins before the engines'.
        """
        if self.sender is None:
            self.connect()
        self.version += slot == "policy"
        named = list(weights.named_parameters()) if isinstance(weights, torch.nn.Module) else weights
        self.shipment = Shipment(self.version, slot, tuple(spec_of(*item) for item in named))
        tensors = named if really_sent is None else really_sent

        async def send() -> str:
            if self.pool.backend == "local":
                return self.sender.send(tensors, self.shipment)
            return await asyncio.to_thread(self.sender.send, tensors, self.shipment)

        async def both() -> str:
            calls = (self.pool.receive(self.shipment), send())
            if sender_first:
                mark, _ = await asyncio.gather(*reversed(calls))
            else:
                _, mark = await asyncio.gather(*calls)
            return mark

        mark = self.run(both())
        self.pool.accept(self.shipment, mark)
        return mark


def sample_all(
    pool: RolloutPool, run: Callable[..., Any], *samplings: Sampling, prompts: Sequence[Prompt] = PROMPTS
) -> list[list[Completion]]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*(pool.sample(prompt, samplings) for prompt in prompts))

    rollouts = run(gather())
    answers = fetch([rollout.completions for rollout in rollouts])
    for rollout, completions in zip(rollouts, answers, strict=True):
        assert rollout.infos == tuple(completion.info() for completion in completions)
    return answers
