"""Supervised fine-tuning of a causal language model: -log p of the assistant's tokens, whatever the rest of a conversation says.

A `Learner` for the supervised group, and its data as `Examples`. How a file becomes tokens is the data room's responsibility.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rlhf.config.policy import PolicySettings
from rlhf.data.conversations import ReadConversations
from rlhf.data.model_folder import find_model
from rlhf.data.order import Order
from rlhf.training import lora
from rlhf.training.deepspeed import sharding
from rlhf.training.loading import load_causal_lm, save_causal_lm
from rlhf.training.model import (
    FORWARD_TOLERANCE,
    LogProbModel,
    check_forward,
    checkpoint_activations,
)
from rlhf.training.packing import idle, pack_sequences
from rlhf.training.supervised import Batch
from rlhf.training.supervised_rank import Learner
from rlhf.training.weights import in_host_memory, whole_weights


class Sequences(NamedTuple):
    """A micro-batch: token ids and learned tokens of each conversation (see `Conversation`)."""

    token_ids: tuple[np.ndarray, ...]
    learned: tuple[np.ndarray, ...]


class Conversations:
    """Conversations as `Examples`: a unit is one of them, a loss is a sum over learned tokens.

    An epoch has as many units as there are conversations; of a mixture they are drawn by its weights, so that some come more than once
    and others not in each epoch.

    Args:
        seed: of the order in which a mixture's sources are gone through.
    """

    def __init__(self, read: ReadConversations, seed: int):
        self._conversations = read.conversations
        self._order = Order(len(read.conversations), seed, True, read.shares) if read.shares else None

    def units(self, epoch: int) -> Sequence[int]:
        count = len(self._conversations)
        if self._order is None:
            return range(count)
        return [self._order.at(place) for place in range(epoch * count, (epoch + 1) * count)]

    def cost(self, unit: int) -> int:
        return len(self._conversations[unit].token_ids)

    def batch(self, units: Sequence[int]) -> Batch:
        chosen = [self._conversations[unit] for unit in units]
        payload = Sequences(tuple(c.token_ids for c in chosen), tuple(c.learned for c in chosen))
        return Batch(payload, float(sum(c.learned.sum() for c in chosen)))


class NextToken(Learner):
    """The policy's model, whole or with LoRA adapters, and the log-likelihood of given tokens."""

    def __init__(self, settings: PolicySettings):
        self.settings = settings

    def build(self) -> nn.Module:
        settings = self.settings
        shards = sharding(settings, learn=True)
        causal_lm = load_causal_lm(
            find_model(settings.model, "`policy.model`"), settings.dtype, settings.lora.quantize_base, shards
        )
        model = LogProbModel(causal_lm, settings.logprob_chunk_tokens)
        if settings.lora.rank:
            lora.add_adapters(causal_lm, settings.lora)
        if settings.gradient_checkpointing:
            checkpoint_activations(causal_lm)
        return model

    def started(self, module: nn.Module, device: torch.device) -> None:
        """Raises ModelError if the model's packed forward is not its own."""
        check_forward(module, module.causal_lm.config.vocab_size, device, FORWARD_TOLERANCE[self.settings.dtype])

    def inputs(self, batch: Sequences | None, device: torch.device) -> tuple[Any, ...]:
        return (idle(device) if batch is None else pack_sequences(*batch, device),)

    def loss(self, outputs: tuple[torch.Tensor, Any], batch: Sequences | None) -> torch.Tensor:
        total = -outputs[0].sum()
        return total * 0.0 if batch is None else total

    def export(self, module: nn.Module, folder: Path, main: bool) -> None:
        """The model in Hugging Face format with its tokenizer; under LoRA merged, and the adapter besides, in `folder/adapter`."""
        settings, causal_lm = self.settings, module.causal_lm
        adapted = settings.lora.rank > 0
        weights = in_host_memory(whole_weights(causal_lm, lora.POLICY if adapted else None), main)
        adapter = in_host_memory(lora.adapter_weights(causal_lm), main) if adapted else {}
        if not main:
            return
        path = find_model(settings.model, "`policy.model`")
        save_causal_lm(causal_lm, weights, path, str(folder))
        if adapted:
            lora.save_adapter(folder / "adapter", lora.adapter_config(settings.lora, path), adapter)
