"""Reward models on disk and in memory: a transformers sequence classifier, or an encoder with a linear head.

Owns the folder format that `rlhf reward train` writes: the encoder in Hugging Face format, `reward_head.safetensors`
(weight and bias of the head, with the normalisation of its features folded in) and `reward_model.json` (how it reads
text). Does not know of servers or of how a model was trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from rlhf.reward.errors import RewardError

Input = Literal["response", "conversation"]
Pooling = Literal["mean", "last"]

DESCRIPTION = "reward_model.json"
HEAD = "reward_head.safetensors"
SCORING_BATCH = 32


class Example(NamedTuple):
    """One response to judge; the prompt is read only by models whose input is the conversation."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Description:
    """What `reward_model.json` says.

    Attributes:
        kind: "encoder_with_head", or "classifier" (transformers sequence classification).
        input: what it was trained to read; None for a classifier from elsewhere.
        max_tokens: longer texts are judged by their beginning.
        layers: hidden states that are pooled and concatenated, 0 being the embeddings; empty for a classifier.
        pooling: mean over the tokens, or the last token.
        temperature: P(a beats b) = sigmoid((r_a - r_b) / temperature).
    """

    kind: Literal["encoder_with_head", "classifier"]
    input: Input | None
    max_tokens: int
    layers: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    temperature: float = 1.0


class EncoderWithHead(torch.nn.Module):
    """An encoder whose pooled hidden states a linear head turns into one reward per text."""

    def __init__(self, encoder: torch.nn.Module, layers: Sequence[int], pooling: Pooling):
        super().__init__()
        self.encoder, self.layers, self.pooling = encoder, tuple(layers), pooling
        self.head = torch.nn.Linear(len(self.layers) * encoder.config.hidden_size, 1)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n, n_layers * hidden], fp32, from right-padded ids and mask [n, n_tokens]."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = torch.stack([output.hidden_states[layer] for layer in self.layers], dim=1).float()
        if self.pooling == "last":
            last = attention_mask.sum(1) - 1
            return states[torch.arange(len(last)), :, last].flatten(1)
        mask = attention_mask[:, None, :, None].float()
        return ((states * mask).sum(2) / mask.sum(2)).flatten(1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards [n]."""
        return self.head(self.features(input_ids, attention_mask))[:, 0]


class Classifier(torch.nn.Module):
    """A transformers sequence classifier of one label (its logit is the reward) or two (the second's log-odds)."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        return logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0.0)


class RewardModel:
    """A module with the tokenizer and the format of its input."""

    def __init__(self, module: torch.nn.Module, tokenizer, description: Description, device: str = "cpu"):
        tokenizer.padding_side = "right"
        self.module, self.tokenizer, self.description, self.device = module.to(device), tokenizer, description, device

    def read(self, what: Input) -> None:
        """Choose what a classifier from elsewhere reads."""
        self.description = replace(self.description, input=what)

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each example, at most `max_tokens` of them."""
        options = {"truncation": True, "max_length": self.description.max_tokens}
        if self.description.input != "conversation":
            return self.tokenizer([example.response for example in examples], **options)["input_ids"]
        if self.tokenizer.chat_template is None:
            texts = [f"{example.prompt}\n\n{example.response}" for example in examples]
            return self.tokenizer(texts, **options)["input_ids"]
        turns = [
            [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.response}] for e in examples
        ]
        texts = [self.tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
        # The template has written the special tokens already.
        return self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"]

    def batch(self, ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids` and `attention_mask`, [n, longest], on the model's device."""
        # A text of no tokens would have nothing to pool.
        ids = [row or [self.tokenizer.pad_token_id] for row in ids]
        padded = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return {name: padded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def score(self, examples: Sequence[Example]) -> np.ndarray:
        """Rewards, float64 [n]; not finite where the model broke down."""
        return self.run(self.module, examples)

    def run(self, function, examples: Sequence[Example]) -> np.ndarray:
        """`function(input_ids, attention_mask)` of all examples, in batches of like lengths; float64, in order."""
        return self.run_tokens(function, self.encode(examples))

    @torch.inference_mode()
    def run_tokens(self, function, ids: Sequence[list[int]]) -> np.ndarray:
        """The same of token ids."""
        self.module.eval()
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: list[np.ndarray] = []
        for start in range(0, len(order), SCORING_BATCH):
            chosen = [ids[i] for i in order[start : start + SCORING_BATCH]]
            rows.append(function(**self.batch(chosen)).double().cpu().numpy())
        result = np.concatenate(rows)
        result[order] = result.copy()
        return result

    def fingerprint(self) -> str:
        """A hash of all weights, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the model so that `load_model` reads it."""
        inner = self.module.encoder if isinstance(self.module, EncoderWithHead) else self.module.model
        inner.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.module, EncoderWithHead):
            from safetensors.torch import save_file

            save_file(
                {k: v.detach().cpu().contiguous() for k, v in self.module.head.state_dict().items()}, folder / HEAD
            )
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self.description), indent=2) + "\n")


def load_model(path: str, device: str = "cpu") -> RewardModel:
    """The reward model in a folder, frozen.

    Raises:
        RewardError: no model there, or one that cannot give a scalar reward.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = Path(path)
    config, tokenizer = read_base(folder)
    if (folder / DESCRIPTION).exists():
        fields = json.loads((folder / DESCRIPTION).read_text())
        description = Description(**{**fields, "layers": tuple(fields["layers"])})
    else:
        description = Description("classifier", None, max_tokens(config, tokenizer))
    if description.kind == "encoder_with_head":
        from safetensors.torch import load_file

        encoder = AutoModel.from_pretrained(folder, dtype="auto")
        module: torch.nn.Module = EncoderWithHead(encoder, description.layers, description.pooling)
        module.head.load_state_dict(load_file(folder / HEAD))
    else:
        if not is_classifier(config):
            raise RewardError(
                f"{folder} holds a {'/'.join(config.architectures or ['model without an architecture'])}, which gives "
                "no reward. Name a sequence classifier, or train a reward model on top of it with `rlhf reward train`."
            )
        if config.num_labels > 2:
            raise RewardError(
                f"{folder} is a classifier with {config.num_labels} labels; a reward needs one label, or two."
            )
        module = Classifier(AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", config=config))
    return RewardModel(module.requires_grad_(False).eval(), tokenizer, description, device)


def read_base(folder: Path):
    """Configuration and tokenizer of a model folder, with a padding token in both.

    Raises:
        RewardError: not a folder with a model in Hugging Face format.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise RewardError(
            f"there is no model in the folder {folder} (no config.json). Give the folder of a model in Hugging "
            "Face format, or an `asset:` name."
        )
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RewardError(
                f"the tokenizer in {folder} has neither a padding nor an end-of-sequence token; batches need one."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def is_classifier(config) -> bool:
    """Whether the weights on disk include a classification head. transformers would make up a missing one at random."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def max_tokens(config, tokenizer, wanted: int = 4096) -> int:
    """`wanted`, or less where the model has fewer positions."""
    return min(wanted, getattr(config, "max_position_embeddings", wanted), tokenizer.model_max_length)
