"""The critic of PPO: a value for every response token, from a transformer body and a scalar head.

Owns: the value model and how it starts. Does not know: advantages or losses (algorithms/), or its optimizer (a `Trainer` of its
own, beside the policy's in the same rank).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.config.policy import LoraSettings
from rlhf.data.model_folder import find_model
from rlhf.training import lora
from rlhf.training.deepspeed_zero3 import Sharding, gathered
from rlhf.training.loading import load_causal_lm, load_model
from rlhf.training.model import DTYPES, ModelError
from rlhf.training.packing import Experience


class ValueHead(nn.Module):
    """Hidden states [N, H] -> fp32 values [N]. A module of its own, so that ZeRO-3 gathers its weights."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(weight.new_zeros(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]


class ValueModel(nn.Module):
    """A transformer body with a scalar head, whose forward returns the value before each response token.

    Args:
        body: transformers model without its output layer, with packed attention.
        weight: what the head starts with, [1, H].
    """

    def __init__(self, body: nn.Module, weight: torch.Tensor):
        super().__init__()
        self.body, self.head = body, ValueHead(weight)

    def forward(self, experience: Experience) -> torch.Tensor:
        """fp32 [N]: V_t, from the hidden state that predicts token t, so that it has not seen the token."""
        output = self.body(
            input_ids=experience.input_ids,
            position_ids=experience.position_ids,
            segments=experience.segments,
            use_cache=False,
        )
        return self.head(output.last_hidden_state[0, experience.source])


def load_critic(
    policy: str,
    reward_model: str | None,
    dtype: str,
    adapters: LoraSettings | None = None,
    sharding: Sharding | None = None,
) -> ValueModel:
    """The value model as training starts.

    With a reward model (a transformers sequence classifier with one output), its body and its head. Without, the policy's body
    and a head drawn from a normal distribution with standard deviation 1 / (H + 1), so that values start near 0 (OpenRLHF's
    reading of N(0, 1/(H+1)); Huang et al. 2024 take that as the variance). All ranks must hold the same random state.

    Args:
        policy: folder of the policy's model.
        reward_model: folder or asset of the reward model, or None.
        adapters: freeze the body and give it adapters; they and the head learn. It shares nothing with the policy. A reward model's
            body stays in `dtype`.
        sharding: how ZeRO-3 partitions parameters (`deepspeed.sharding`); then the call is collective.

    Raises:
        WeightsError: a folder's weights are not those of its architecture, or not finite.
        ModelError: the reward model cannot be used as a critic of this policy.
        LoraError: its body cannot be adapted as the policy's is.
    """
    if reward_model is not None:
        critic = _from_reward_model(policy, find_model(reward_model, "`algorithm.critic_model`"), dtype, sharding)
    else:
        causal_lm = load_causal_lm(policy, dtype, "none" if adapters is None else adapters.quantize_base, sharding)
        hidden = causal_lm.get_output_embeddings().in_features
        critic = ValueModel(causal_lm.base_model, torch.randn(1, hidden, dtype=DTYPES[dtype]) / (hidden + 1))
    if adapters is not None:
        lora.add_adapters(critic.body, adapters)
    return critic


def _from_reward_model(policy: str, path: str, dtype: str, sharding: Sharding | None) -> ValueModel:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, f"it cannot be loaded ({error})") from error
    wanted = AutoConfig.from_pretrained(policy)
    if config.model_type != wanted.model_type or config.vocab_size != wanted.vocab_size:
        raise _unusable(
            path,
            f"it is a {config.model_type} with a vocabulary of {config.vocab_size}, and the policy is a {wanted.model_type} with "
            f"one of {wanted.vocab_size}",
        )
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise _unusable(path, "it is no sequence classifier")
    model = load_model(AutoModelForSequenceClassification, path, dtype, "algorithm.critic_model", sharding)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise _unusable(path, "it has no linear head `score` with one output")
    with gathered(list(head.parameters())):
        critic = ValueModel(model.base_model, head.weight)
        if head.bias is not None:
            critic.head.bias.data.copy_(head.bias.data)
    return critic


def _unusable(path: str, reason: str) -> ModelError:
    return ModelError(
        f"algorithm.critic_model: {path!r} cannot become the critic: {reason}. Give a transformers sequence classifier of the policy's "
        "architecture with one output, or null to start from the policy's own body."
    )
