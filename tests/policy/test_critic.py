"""The value model: where its values come from, how it starts, and which reward models it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from rlhf.config import UserError
from rlhf.policy.critic import load_critic
from rlhf.training.model import ModelError
from rlhf.training.packing import idle, pack
from rlhf.types import Assignment, TrainingItem
from tests.helpers import make_rollout

CPU = torch.device("cpu")
PROMPT, RESPONSES = (1, 5, 9, 4), [[7, 8, 9, 10], [12, 13]]


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with one output on the tiny model's body."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier")
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    return folder


def experience():
    rollout = make_rollout(RESPONSES, PROMPT)
    made = Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(2)))
    return pack([made], [rollout.completions.value], CPU)


def test_a_value_is_what_the_reward_model_says_of_the_text_before_the_token(
    tiny_model: Path, reward_model: Path
) -> None:
    critic = load_critic(str(tiny_model), str(reward_model), "fp32")
    plain = LlamaForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32).eval()
    expected = []
    for response in RESPONSES:
        for token in range(len(response)):
            # The classifier reads its score off the last token of the row.
            text = torch.tensor([[*PROMPT, *response[:token]]])
            expected.append(plain(text).logits[0, 0])
    assert torch.allclose(critic(experience()), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fresh_head_starts_near_zero_and_values_are_fp32(tiny_model: Path, dtype: str) -> None:
    torch.manual_seed(0)
    critic = load_critic(str(tiny_model), None, dtype)
    assert critic.head.bias.item() == 0
    assert critic.head.weight.float().std().item() == pytest.approx(1 / 65, rel=0.25)
    values = critic(experience())
    assert values.dtype == torch.float32
    assert values.shape == (6,)
    assert len(critic(idle(CPU))) == 1


def save(folder: Path, model: type, **config: object) -> str:
    base = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model(LlamaConfig(**(base | config))).save_pretrained(folder)
    return str(folder)


def test_what_cannot_become_a_critic_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def refused(path: str, says: str) -> None:
        with pytest.raises(ModelError, match=f"algorithm.critic_model.*{says}.*or null to start"):
            load_critic(str(tiny_model), path, "fp32")

    with pytest.raises(UserError, match="`algorithm.critic_model`: there is no folder"):
        load_critic(str(tiny_model), str(tmp_path / "nothing"), "fp32")
    refused(str(tiny_model), "no sequence classifier")
    refused(
        save(tmp_path / "vocabulary", LlamaForSequenceClassification, vocab_size=64, num_labels=1), "vocabulary of 64"
    )
    refused(save(tmp_path / "labels", LlamaForSequenceClassification, num_labels=2), "one output")
    refused(save(tmp_path / "tokens", LlamaForTokenClassification, num_labels=1), "no sequence classifier")
