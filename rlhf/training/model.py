"""The model that learns, as a module whose forward takes an `Experience` and returns log-probs.

The vocabulary is projected in chunks of response tokens only, in the forward and again in the backward pass, so that
[tokens, vocabulary] never exists whole. Everything else is transformers' model, untouched.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config.loader import UserError
from rlhf.training.packing import Experience, Row, pack
from rlhf.training.segments import Segments
from rlhf.types import Assignment, Completion, Prompt, Rollout, TrainingItem

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

FORWARD_TOLERANCE = {"bf16": 0.3, "fp32": 0.01}
"""Mean gap, in nats on random tokens, that rounding alone explains: other shapes take other kernels. A wrong mask costs several."""


ROWS = 64
"""Rows of logits that are in fp32 at a time: few enough for a CPU's cache; a GPU does not mind."""


class ModelError(UserError):
    """The model cannot be used for training; the message says why."""


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(z)[target] with z = cap(hidden W^T + b) / divisor, chunk by chunk; cap(x) = c tanh(x / c), or x without a cap c.

    forward(hidden [N, H], weight [V, H], bias [V] or None, targets [N], chunk, divisor, temperature, entropy, c) -> fp32
    ([N] log-probs of z; [N] log-probs of z / temperature, without gradient, or None without a temperature; [N] entropy of
    softmax(z), or None unless `entropy`). An entropy that no loss uses costs nothing in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        divisor: float,
        temperature: float | None,
        with_entropy: bool,
        cap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        normaliser = hidden.new_empty(len(targets), dtype=torch.float32)
        logprobs = torch.empty_like(normaliser)
        tempered = None if temperature is None else torch.empty_like(normaliser)
        entropy = torch.empty_like(normaliser) if with_entropy else None
        for part in _parts(0, len(targets), chunk):
            projected = nn.functional.linear(hidden[part], weight, bias)
            for rows in _parts(part.start, part.stop, ROWS):
                logits = projected[rows.start - part.start : rows.stop - part.start].float()
                if cap is not None:
                    logits = (logits / cap).tanh_().mul_(cap)
                if divisor != 1:
                    logits.div_(divisor)
                chosen = logits.gather(1, targets[rows, None])[:, 0]
                normaliser[rows] = logits.logsumexp(1)
                logprobs[rows] = chosen - normaliser[rows]
                if entropy is not None:
                    probabilities = (logits - normaliser[rows, None]).exp_()
                    entropy[rows] = normaliser[rows] - probabilities.mul_(logits).sum(1)
                if tempered is not None and temperature is not None:
                    if temperature == 1:
                        tempered[rows] = logprobs[rows]
                    else:
                        tempered[rows] = chosen / temperature - logits.div_(temperature).logsumexp(1)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.chunk, ctx.divisor, ctx.cap = chunk, divisor, cap
        ctx.set_materialize_grads(False)
        if tempered is not None:
            ctx.mark_non_differentiable(tempered)
        return logprobs, tempered, entropy

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor | None, _: None, entropy_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        gradient = torch.zeros_like(normaliser) if gradient is None else gradient
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        )
        for part in _parts(0, len(targets), ctx.chunk):
            projected = nn.functional.linear(hidden[part], weight, bias)
            for rows in _parts(part.start, part.stop, ROWS):
                block = projected[rows.start - part.start : rows.stop - part.start]
                grad_logits = block.float()
                if ctx.cap is not None:
                    capped = (grad_logits / ctx.cap).tanh_()
                    grad_logits = capped * ctx.cap
                if ctx.divisor != 1:
                    grad_logits.div_(ctx.divisor)
                grad_logits.sub_(normaliser[rows, None])  # log p
                if entropy_gradient is None:
                    grad_logits.exp_().mul_(-gradient[rows, None])
                else:  # dH/dz = -p (log p + H)
                    slope = (grad_logits + entropy[rows, None]).mul_(entropy_gradient[rows, None])
                    grad_logits.exp_().mul_(slope.add_(gradient[rows, None]).neg_())
                grad_logits[torch.arange(len(grad_logits), device=block.device), targets[rows]] += gradient[rows]
                if ctx.divisor != 1:
                    grad_logits.div_(ctx.divisor)
                if ctx.cap is not None:
                    grad_logits.mul_(1 - capped.square_())
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                block.copy_(grad_logits)  # from here on `projected` holds the gradient
            grad_hidden[part] = projected @ weight
            if grad_weight is not None:
                grad_weight += projected.T @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


class LogProbHead(nn.Module):
    """The output projection as a module of its own, so that ZeRO-3 gathers its weight once per call, however many chunks.

    Args:
        cap: of the logits (Gemma 2), or None.
    """

    def __init__(
        self, projection: nn.Linear, chunk_tokens: int, temperature: float, tempered: bool, cap: float | None = None
    ):
        super().__init__()
        self.cap = cap
        self.weight, self.bias = projection.weight, projection.bias
        self.chunk_tokens, self.temperature, self.tempered = chunk_tokens, temperature, tempered

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        apply = partial(ChunkedLogProbs.apply, hidden, self.weight, self.bias, targets, self.chunk_tokens)
        if self.tempered:
            logprobs, _, entropy = apply(self.temperature, None, torch.is_grad_enabled(), self.cap)
            return logprobs, entropy
        logprobs, tempered, _ = apply(1.0, self.temperature, False, self.cap)
        return logprobs, tempered


class LogProbModel(nn.Module):
    """A causal language model whose forward returns log-probs of a row's targets.

    Args:
        causal_lm: transformers model with the attention implementation of `rlhf.training.attention`.
        temperature: the sampling temperature.
        tempered: whether the policy, and its gradient, are those at the sampling temperature (policy-gradient methods: the
            distribution that really wrote the tokens) or the model itself (contrasts).
    """

    def __init__(self, causal_lm: nn.Module, chunk_tokens: int, temperature: float = 1.0, tempered: bool = False):
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature, self.tempered = temperature, tempered
        cap = getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)
        self.head = LogProbHead(causal_lm.get_output_embeddings(), chunk_tokens, temperature, tempered, cap)

    def forward(self, row: Row) -> tuple[torch.Tensor, torch.Tensor | None]:
        """fp32 [N] log-probs with gradient, and beside them

        fp32 [N] log-probs at the sampling temperature, without gradient; or, if the model is `tempered` (then the first are at the
        sampling temperature), fp32 [N] entropies with gradient, None under no_grad.
        """
        output = self.causal_lm.base_model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            segments=row.segments,
            use_cache=False,
        )
        return self.head(output.last_hidden_state[0, row.source], row.targets)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass.

    transformers does so in training mode only; models here are in evaluation mode (see `disable_dropout`), so just the flag of the
    layers themselves is set, not of what is inside them.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def disable_dropout(model: nn.Module) -> None:
    """Dropout would make log-probs (and values) random; preference learning goes without."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@torch.no_grad()
def check_forward(model: LogProbModel, vocabulary: int, device: torch.device, tolerance: float) -> float:
    """Compare the packed, chunked forward with transformers' own logits, on random tokens; returns the mean gap in nats.

    Guards against models that ignore packed attention, scale or cap their logits, or have another head than we think.
    Collective under ZeRO-3: every rank makes the same calls.

    Raises:
        ModelError: the gap exceeds `tolerance` (see `FORWARD_TOLERANCE`).
    """
    experience, sequences = probe_rows(vocabulary, device)
    ours, _ = model(experience)
    expected = []
    for prompt, answer in sequences:
        ids = torch.cat([prompt, answer])[None]
        alone = Segments.of_texts([ids.shape[1]])
        logits = model.causal_lm(input_ids=ids, segments=alone, use_cache=False).logits[0].float()
        if model.tempered:
            logits /= model.temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected.append(logprobs.gather(1, answer[:, None])[:, 0])
    gap = (ours - torch.cat(expected)).abs().mean().item()
    if not gap <= tolerance:
        raise ModelError(
            f"policy.model: log-probs of the packed forward differ from the model's own by {gap:.3g} nats on average "
            f"(allowed: {tolerance:g}). {type(model.causal_lm).__name__} does something to attention or logits that this project "
            "does not know."
        )
    return gap


def probe_rows(vocabulary: int, device: torch.device) -> tuple[Experience, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two groups of random tokens, the first with two responses; and the same as (prompt, response) sequences."""
    generator = np.random.default_rng(0)
    assignments, completions, sequences = [], [], []
    for group, (n_prompt, lengths) in enumerate([(7, (5, 3)), (4, (6,))]):
        prompt = generator.integers(vocabulary, size=n_prompt)
        answers = [generator.integers(vocabulary, size=n).astype(np.int32) for n in lengths]
        made = [Completion.of_one_version(str(group), a, np.zeros(len(a), np.float32), 0, "length") for a in answers]
        rollout = Rollout(Prompt(str(group), tuple(prompt.tolist()), ""), tuple(c.info() for c in made), None)
        assignments.append(Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(len(made)))))
        completions.append(made)
        for answer in answers:
            sequences.append(
                tuple(torch.as_tensor(part, dtype=torch.int64, device=device) for part in (prompt, answer))
            )
    return pack(assignments, completions, device), sequences
