"""Reward and preference models in memory: a transformers sequence classifier, or an encoder with a linear head.

Owns loading (`folders` opens and checks them first), reading with the model, and saving. Does not know of servers or of how a model was
trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.cluster.precision import look
from rlhf.data.architecture import (
    REPORTED,
    architecture_of,
    check_finite,
    check_loaded,
    difference,
    quiet_transformers,
    refuse,
)
from rlhf.data.weight_files import Difference, read_headers
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import (
    DESCRIPTION,
    HEAD,
    NO_LIMIT,
    Description,
    Folder,
    check_scores,
    is_classifier,
    open_folder,
    own_length,
    read_base,
)
from rlhf.reward.modules import Classifier, EncoderWithHead, Pooling, start_head
from rlhf.reward.reading import Input, Reader, Text, Tokens
from rlhf.types import Failed

SCORING_BATCH = 32
SCORING_TOKENS = 16384
"""Most texts, and most tokens with padding, of a forward for measuring."""
BASE = "--model"
ALL_LAYERS_UP_TO = 8192  # features: the hidden states of all layers are used if they are not more than this together


class RewardModel:
    """A module with the tokenizer and the format of its input."""

    def __init__(self, module: torch.nn.Module, tokenizer: Any, description: Description, device: str = "cpu"):
        from rlhf.training.attention import avoid_plans_per_shape  # transformers, which who has a module has imported

        avoid_plans_per_shape()
        self.module, self.tokenizer, self.device = module.to(device), tokenizer, device
        body = self.transformer
        self.rows = body.get_input_embeddings().num_embeddings
        self.description = replace(description, max_tokens=min(description.max_tokens, _positions(body)))
        wishes = (body.config.get_text_config().pad_token_id, tokenizer.pad_token_id)
        # Which token pads is all one to attention and pooling, which have the mask; some models count positions by it.
        self.padding = next((wish for wish in wishes if wish is not None and 0 <= wish < self.rows), 0)
        self._stored: dict[str, torch.dtype] = {}  # of weights that have been widened

    def compute_in_fp32(self) -> None:
        """Widen weights of half precision, for a CPU that only emulates it. They keep their values, and `fingerprint` its answer."""
        self._stored = {name: tensor.dtype for name, tensor in self.module.state_dict().items()}
        self.module.float()

    @property
    def transformer(self) -> Any:
        """The transformers model inside."""
        return self.module.encoder if isinstance(self.module, EncoderWithHead) else self.module.model

    def read(self, what: Input) -> None:
        """Choose what a classifier from elsewhere reads."""
        self.description = replace(self.description, input=what)

    def encode(self, texts: Sequence[Text]) -> list[Tokens | Failed]:
        """Each text as the model reads it, at most `max_tokens` long (see `reading`)."""
        description = self.description
        return Reader(self.tokenizer, description.input, description.max_tokens, self.rows).read(texts)

    def ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of texts that can all be read. Raises RewardError for one that cannot."""
        found = self.encode(texts)
        for one in found:
            if isinstance(one, Failed):
                raise RewardError(one.reason)
        return [one.ids for one in found if isinstance(one, Tokens)]

    def batch(self, ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids` and `attention_mask`, [n, longest], on the model's device."""
        rows = [torch.tensor(row or [self.padding]) for row in ids]  # a text of no tokens would have nothing to pool
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": padded.to(self.device), "attention_mask": mask.to(self.device)}

    def score(self, examples: Sequence[Text]) -> np.ndarray:
        """Rewards, float64 [n]; not finite where the model broke down. Not of a model that compares."""
        return self.rewards(self.run(self.module, examples))

    def score_batch(self, ids: Sequence[list[int]]) -> np.ndarray:
        """The same of token ids, all in one forward."""
        return self.rewards(self.outputs(ids))

    def outputs(self, ids: Sequence[list[int]]) -> np.ndarray:
        """The model's outputs for token ids, all in one forward, float64 [n, width]."""
        return self.run_tokens(self.module, ids, len(ids), None)

    def rewards(self, outputs: np.ndarray) -> np.ndarray:
        """From the model's outputs [n, width]: the one there is, or the weighted sum of the objectives, [n]."""
        return outputs @ np.array(self.description.weights) if self.description.task == "objectives" else outputs[:, 0]

    def run(self, function: Callable[..., torch.Tensor], texts: Sequence[Text]) -> np.ndarray:
        """`function(input_ids, attention_mask)` of all texts, in batches of like lengths; float64, in order."""
        return self.run_tokens(function, self.ids(texts))

    @torch.inference_mode()
    def run_tokens(
        self,
        function: Callable[..., torch.Tensor],
        ids: Sequence[list[int]],
        at_once: int = SCORING_BATCH,
        tokens: int | None = SCORING_TOKENS,
    ) -> np.ndarray:
        """The same of token ids.

        Args:
            at_once: most texts in one forward.
            tokens: most tokens in one forward, padding included, but for a text that is longer; None: any number.
        """
        self.module.eval()
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: list[np.ndarray] = []
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and stop - start < at_once:
                if tokens is not None and len(ids[order[stop]]) * (stop + 1 - start) > tokens:
                    break
                stop += 1
            rows.append(function(**self.batch([ids[i] for i in order[start:stop]])).double().cpu().numpy())
            start = stop
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
        """Write the model so that `load_model` reads it, and transformers, given one text at a time, computes the same."""
        body, module = self.transformer, self.module
        config = body.config.get_text_config()
        present = config.pad_token_id
        if isinstance(module, Classifier):
            config.pad_token_id = module.passed_over
        body.save_pretrained(folder)
        config.pad_token_id = present
        self.tokenizer.save_pretrained(folder)
        if isinstance(module, EncoderWithHead):
            from safetensors.torch import save_file

            save_file({k: v.detach().cpu().contiguous() for k, v in module.head.state_dict().items()}, folder / HEAD)
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self.description), indent=2) + "\n")


def load_model(path: str, device: str = "cpu", what: Input | None = None) -> RewardModel:
    """The reward model in a folder, frozen.

    Args:
        what: it will read; one that was trained to read something else is refused. None: what it was trained on.

    Raises:
        UserError: no model there, or one that cannot give a scalar reward, or weights that are not all there or not finite.
    """
    folder = open_folder(path)
    check_scores(folder, what)
    model = load(folder, device)
    if what is not None:
        model.read(what)
    return model


def load_any_model(path: str, device: str = "cpu") -> RewardModel:
    """The reward or preference model in a folder, frozen.

    Raises:
        UserError: no model there, or one with more than two labels, or weights that are not all there or not finite.
    """
    return load(open_folder(path), device)


def load(folder: Folder, device: str = "cpu") -> RewardModel:
    """The model, frozen, its weights as they are in the files.

    Raises:
        WeightsError: tensors are missing, of another shape, not part of the model, or not finite.
    """
    description, config = folder.description, folder.config
    passed_over = config.get_text_config().pad_token_id
    with quiet_transformers():
        model, info = folder.model.from_pretrained(folder.path, dtype="auto", config=config, **_how(config), **REPORTED)
    check_loaded(model, info, folder.path, folder.where)
    if description.kind == "encoder_with_head":
        from safetensors.torch import load_file

        head = load_file(folder.path / HEAD)
        check_finite(head.items(), f"{folder.where}: the head in `{folder.path}`")
        module: torch.nn.Module = EncoderWithHead(model, description.layers, description.pooling, len(head["weight"]))
        module.head.load_state_dict(head)
    else:
        module = _classifier(model, folder.log_odds, passed_over)
    loaded = RewardModel(module.requires_grad_(False).eval(), folder.tokenizer, description, device)
    if device == "cpu" and not look(gpu=False).native:
        loaded.compute_in_fp32()
    return loaded


def _classifier(model: torch.nn.Module, log_odds: bool, passed_over: int | None) -> Classifier:
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = 0  # else transformers refuses batches; where it looks for padding, it is not asked
    return Classifier(model, log_odds, passed_over)


def _how(config: Any) -> dict[str, Any]:
    """How to load: sdpa leaves out soft-capping without a word (transformers 5.19), so such a model computes its attention itself."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def _positions(model: torch.nn.Module) -> int:
    """Tokens that absolute positions are there for; those of RoBERTa's kind begin after the padding's."""
    found = [
        part.num_embeddings - part.padding_idx - 1
        for name, part in model.named_modules()
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
    ]
    return min(found, default=NO_LIMIT)


def new_model(
    path: Path, description: Description, outputs: int, device: str = "cpu", whole: bool = True
) -> RewardModel:
    """A base model in fp32 with a new head, to be trained; `kind`, `layers` and `pooling` are filled in here.

    Where the architecture has a sequence classifier, that is what `whole` trains, so that transformers loads the result. A base
    that is one, with as many labels as `outputs` (or two, for a reward: their log-odds), keeps its head. Only a new head starts at
    random.

    Args:
        outputs: width of the head.
        whole: all weights will be trained; otherwise only a head on the pooled states of all layers.

    Raises:
        UserError: no model there, or a classifier whose labels do not fit, or weights of the base that are missing or not finite.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config, tokenizer = read_base(path, BASE)
    description = replace(description, max_tokens=own_length(config, tokenizer, description.max_tokens))
    kept = whole and is_classifier(config)
    known = architecture_of(AutoModelForSequenceClassification, config)
    if whole and known is not None:
        log_odds = False
        if kept and config.num_labels != outputs:
            log_odds = config.num_labels == 2 and description.task not in ("objectives", "gpm")
            if not log_odds:
                raise RewardError(
                    f"{path} is a classifier with {config.num_labels} labels; this objective has {outputs}."
                )
        if not kept:
            config.num_labels = outputs
            _choose_padding(config, tokenizer)
        passed_over = config.get_text_config().pad_token_id
        module: torch.nn.Module = _classifier(_base(known, path, config, kept), log_odds, passed_over)
        if not kept:
            start_head(module.head)
        return RewardModel(module, tokenizer, description, device)
    encoder = _base(AutoModel, path, config, False)
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


def _choose_padding(config: Any, tokenizer: Any) -> None:
    """For a new head: the padding token, which transformers will look for in batches; none if it also ends texts."""
    text = config.get_text_config()
    padding = tokenizer.pad_token_id if text.pad_token_id is None else text.pad_token_id
    text.pad_token_id = None if padding == tokenizer.eos_token_id else padding


def _base(model_class: Any, path: Path, config: Any, kept: bool) -> Any:
    """A base in fp32, all of its weights from the files but for its head's, and a pooler's, which not every encoder comes with.

    Args:
        kept: the head is from the files too.
    """
    read_headers(path, BASE)  # what is cut off or missing is named
    with quiet_transformers():
        model, info = model_class.from_pretrained(path, dtype=torch.float32, config=config, **_how(config), **REPORTED)
    what = f"{BASE}: the weights in `{path}`"
    if kept:
        check_loaded(model, info, path, BASE)
        return model
    found, body = difference(info), model.base_model
    parts = {name for name, _ in body.named_children()} - {"pooler"}

    def of_body(name: str) -> bool:
        return name.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in parts

    whole = {name: both for name, both in found.wrong_shape.items() if of_body(name)}
    missing, unexpected = (frozenset(filter(of_body, names)) for names in (found.missing, found.unexpected))
    refuse(Difference(missing, unexpected, whole), f"{what} are not those of a {type(body).__name__}")
    check_finite(model.named_parameters(), what)
    return model
