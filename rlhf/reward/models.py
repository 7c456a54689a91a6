"""Reward and preference models on disk and in memory: a transformers sequence classifier, or an encoder with a linear head.

Owns the folder format that `rlhf reward train` writes: the model in Hugging Face format, `reward_head.safetensors` if it is an
encoder (weight and bias of the head, with the normalisation of its features folded in) and `reward_model.json` (how it reads
text, and what its outputs mean). Does not know of servers or of how a model was trained.
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

from rlhf.cluster.precision import look
from rlhf.reward.errors import RewardError
from rlhf.reward.modules import Classifier, EncoderWithHead, Pooling, start_head

Input = Literal["response", "conversation"]
Task = Literal["reward", "objectives", "gpm", "cross_encoder"]

DESCRIPTION = "reward_model.json"
HEAD = "reward_head.safetensors"
SCORING_BATCH = 32
ALL_LAYERS_UP_TO = 8192  # features: the hidden states of all layers are used if they are not more than this together
COMPARISON = "{prompt}\n\nResponse A:\n{a}\n\nResponse B:\n{b}"
"""What a cross-encoder reads."""


class Example(NamedTuple):
    """One response to judge; the prompt is read only by models whose input is the conversation."""

    prompt: str
    response: str


class Comparison(NamedTuple):
    """Two responses, for a model that reads both. The prompt is empty where there is none."""

    prompt: str
    a: str
    b: str


class PromptOnly(NamedTuple):
    """A prompt without a response, for a GPM's gate."""

    prompt: str


Text = Example | Comparison | PromptOnly
"""What a model can read."""


@dataclass(frozen=True)
class Description:
    """What `reward_model.json` says.

    Attributes:
        kind: "encoder_with_head", or "classifier" (transformers sequence classification).
        input: what it was trained to read; None for a classifier from elsewhere.
        max_tokens: longer texts are judged by their beginning.
        layers: hidden states that are pooled and concatenated, 0 being the embeddings; empty for a classifier.
        pooling: mean over the tokens, or the last token.
        temperature: P(a beats b) = sigmoid((r_a - r_b) / temperature); of a GPM sigmoid(s_ab / temperature), of a cross-encoder
            sigmoid(logit / temperature).
        task: what the outputs are: a reward; a reward for each objective; a GPM's embedding (and gate); a cross-encoder's logit
            that response A is better than B.
        objectives: their names.
        weights: the reward is the objectives' sum with these.
        thresholds: of ordinal ratings: P(level > k) = sigmoid(reward - thresholds[k]).
        levels: the ordinal ratings.
        dimensions: of a GPM's embedding; further outputs are the gate's.
    """

    kind: Literal["encoder_with_head", "classifier"]
    input: Input | None
    max_tokens: int
    layers: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    temperature: float = 1.0
    task: Task = "reward"
    objectives: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    dimensions: int = 0

    @property
    def compares(self) -> bool:
        """It says which of two responses is better; otherwise it gives each a reward."""
        return self.task in ("gpm", "cross_encoder")


class RewardModel:
    """A module with the tokenizer and the format of its input."""

    def __init__(self, module: torch.nn.Module, tokenizer, description: Description, device: str = "cpu"):
        from rlhf.training.attention import avoid_plans_per_shape  # transformers, which who has a module has imported

        avoid_plans_per_shape()
        tokenizer.padding_side = "right"
        self.module, self.tokenizer, self.description, self.device = module.to(device), tokenizer, description, device
        self._stored: dict[str, torch.dtype] = {}  # of weights that have been widened

    def compute_in_fp32(self) -> None:
        """Widen weights of half precision, for a CPU that only emulates it. They keep their values, and `fingerprint` its answer."""
        self._stored = {name: tensor.dtype for name, tensor in self.module.state_dict().items()}
        self.module.float()

    def read(self, what: Input) -> None:
        """Choose what a classifier from elsewhere reads."""
        self.description = replace(self.description, input=what)

    def encode(self, examples: Sequence[Text], whole: bool = False) -> list[list[int]]:
        """Token ids of each example; at most `max_tokens` of them, unless `whole`."""
        if not examples:
            return []
        templated = self.description.input == "conversation" and self.tokenizer.chat_template is not None
        texts = [self._text(example, templated) for example in examples]
        options = {} if whole else {"truncation": True, "max_length": self.description.max_tokens}
        # A template has written the special tokens already. Comparisons have none: two responses to judge are no turns.
        options["add_special_tokens"] = not templated or isinstance(examples[0], Comparison)
        return self.tokenizer(texts, **options)["input_ids"]

    def _text(self, example: Text, templated: bool) -> str:
        if isinstance(example, Comparison):
            return COMPARISON.format(prompt=example.prompt, a=example.a, b=example.b)
        if isinstance(example, PromptOnly):
            turns = [{"role": "user", "content": example.prompt}]
            return self.tokenizer.apply_chat_template(turns, tokenize=False) if templated else example.prompt
        if self.description.input != "conversation":
            return example.response
        if not templated:
            return f"{example.prompt}\n\n{example.response}"
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)

    def batch(self, ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids` and `attention_mask`, [n, longest], on the model's device."""
        padding = self.tokenizer.pad_token_id
        rows = [torch.tensor(row or [padding]) for row in ids]  # a text of no tokens would have nothing to pool
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": padded.to(self.device), "attention_mask": mask.to(self.device)}

    def score(self, examples: Sequence[Example]) -> np.ndarray:
        """Rewards, float64 [n]; not finite where the model broke down. Not of a model that compares."""
        return self.rewards(self.run(self.module, examples))

    def score_batch(self, ids: Sequence[list[int]]) -> np.ndarray:
        """The same of token ids, all in one forward."""
        return self.rewards(self.run_tokens(self.module, ids, at_once=len(ids)))

    def rewards(self, outputs: np.ndarray) -> np.ndarray:
        """From the model's outputs [n, width]: the one there is, or the weighted sum of the objectives, [n]."""
        return outputs @ np.array(self.description.weights) if self.description.task == "objectives" else outputs[:, 0]

    def run(self, function, examples: Sequence[Example]) -> np.ndarray:
        """`function(input_ids, attention_mask)` of all examples, in batches of like lengths; float64, in order."""
        return self.run_tokens(function, self.encode(examples))

    @torch.inference_mode()
    def run_tokens(self, function, ids: Sequence[list[int]], at_once: int = SCORING_BATCH) -> np.ndarray:
        """The same of token ids, `at_once` of them in one forward."""
        self.module.eval()
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: list[np.ndarray] = []
        for start in range(0, len(order), at_once):
            chosen = [ids[i] for i in order[start : start + at_once]]
            rows.append(function(**self.batch(chosen)).double().cpu().numpy())
        result = np.concatenate(rows)
        result[order] = result.copy()
        return result

    def fingerprint(self) -> str:
        """A hash of all weights, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            tensor = tensor.detach().to(self._stored.get(name, tensor.dtype))
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
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
    model = load_any_model(path, device)
    if model.description.compares:
        raise RewardError(
            f"{path} holds a model that compares two responses ({model.description.task}) and gives no reward. Set "
            "`reward.kind: pairwise_model`, or name another folder."
        )
    return model


def load_any_model(path: str, device: str = "cpu") -> RewardModel:
    """The reward or preference model in a folder, frozen.

    Raises:
        RewardError: no model there, or a classifier from elsewhere with more than two labels.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = Path(path)
    config, tokenizer = read_base(folder)
    if (folder / DESCRIPTION).exists():
        description = _read_description(folder / DESCRIPTION)
    else:
        description = Description("classifier", None, max_tokens(config, tokenizer))
    if description.kind == "encoder_with_head":
        from safetensors.torch import load_file

        head = load_file(folder / HEAD)
        encoder = AutoModel.from_pretrained(folder, dtype="auto")
        module: torch.nn.Module = EncoderWithHead(encoder, description.layers, description.pooling, len(head["weight"]))
        module.head.load_state_dict(head)
    else:
        if not is_classifier(config):
            raise RewardError(
                f"{folder} holds a {'/'.join(config.architectures or ['model without an architecture'])}, which gives "
                "no reward. Name a sequence classifier, or train a reward model on top of it with `rlhf reward train`."
            )
        log_odds = _log_odds(folder, config, description.task)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", config=config)
        module = Classifier(classifier, log_odds)
    model = RewardModel(module.requires_grad_(False).eval(), tokenizer, description, device)
    if device == "cpu" and not look(gpu=False).native:
        model.compute_in_fp32()
    return model


def _log_odds(folder: Path, config, task: Task) -> bool:
    """Whether a classifier's output is the log-odds of its second label."""
    if task in ("objectives", "gpm"):
        return False
    if config.num_labels > 2:
        raise RewardError(
            f"{folder} is a classifier with {config.num_labels} labels; a reward needs one label, or two."
        )
    return config.num_labels == 2


def _read_description(path: Path) -> Description:
    stored = json.loads(path.read_text())
    return Description(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})


def new_model(
    folder: Path, description: Description, outputs: int, device: str = "cpu", whole: bool = True
) -> RewardModel:
    """A base model in fp32 with a new head, to be trained; `kind`, `layers` and `pooling` are filled in here.

    Where the architecture has a sequence classifier, that is what `whole` trains, so that transformers loads the result. A base
    that is one, with as many labels as `outputs` (or two, for a reward: their log-odds), keeps its head.

    Args:
        outputs: width of the head.
        whole: all weights will be trained; otherwise only a head on the pooled states of all layers.

    Raises:
        RewardError: no model there, or a classifier whose labels do not fit.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config, tokenizer = read_base(folder)
    description = replace(description, max_tokens=max_tokens(config, tokenizer, description.max_tokens))
    if whole and is_classifier(config) and config.num_labels != outputs:
        if not _log_odds(folder, config, description.task):
            raise RewardError(
                f"{folder} is a classifier with {config.num_labels} labels; this objective has {outputs}."
            )
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, config=config)
        module: torch.nn.Module = Classifier(classifier, log_odds=True)
    elif whole and type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        ready_made = is_classifier(config)
        config.num_labels = outputs
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, config=config)
        module = Classifier(classifier)
        if not ready_made:
            start_head(module.head)
    else:
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        last = encoder.config.num_hidden_layers
        every = not whole and (last + 1) * encoder.config.hidden_size <= ALL_LAYERS_UP_TO
        layers = tuple(range(last + 1)) if every else (last,)
        # In a causal model only the last token has read the whole text.
        causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
        pooling: Pooling = "last" if causal else "mean"
        description = replace(description, kind="encoder_with_head", layers=layers, pooling=pooling)
        module = EncoderWithHead(encoder, layers, pooling, outputs)
        start_head(module.head)
    return RewardModel(module, tokenizer, description, device)


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
