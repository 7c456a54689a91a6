"""Whether a model folder can be trained here, found out from its configuration, tokenizer and weight headers: no weights are read.

Owns: what the trainer asks of an architecture (a causal language model of transformers' own, whose every layer attends through
transformers' attention interface to what packed attention computes, with logits that are not scaled) and of a vocabulary. The
architecture is built on the meta device and asked for one forward pass, so that what is refused follows from what `attention` refuses.
Does not know: which command asks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from rlhf.config.policy import LoraSettings
from rlhf.data.architecture import architecture_of, check_folder
from rlhf.data.errors import in_a_line
from rlhf.data.model_folder import CONFIG, check_stops, read_config
from rlhf.training import attention
from rlhf.training.model import ModelError
from rlhf.training.segments import Segments

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers (`layer_types`) that packed attention computes."""
SCALED_LOGITS: dict[str, float] = {
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}
"""Fields by which architectures change their logits -> the value that changes nothing. The head knows plain and capped logits."""
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a configuration that nobody can build a model from."""


def check_policy(path: str, where: str = "`policy.model`") -> Any:
    """The configuration of the model in the folder `path`, if it can be trained; the weight files are compared with it.

    Raises:
        FolderError: its configuration or generation settings cannot be used.
        ModelError: it is no causal language model that can be trained here.
        WeightsError: its weight files are damaged, or are not those of its architecture.
    """
    config = read_config(path, where)
    model = causal_lm_of(config, path, where)
    padding, rows = config.get_text_config().pad_token_id, config.get_text_config().vocab_size
    if padding is not None and not -rows <= padding < rows:
        raise ModelError(
            f"{where}: {Path(path) / CONFIG} says `pad_token_id: {padding}`, but there are {rows} tokens (`vocab_size`), numbered from 0. "
            "Correct it: `null` if there is no padding token"
        )
    check_attention(model, config, path, where)
    check_folder(Path(path), model, config, where)
    check_stops(Path(path), config, where)
    return config


def causal_lm_of(config: Any, path: str, where: str) -> type:
    """transformers' class for the configuration.

    Raises:
        ModelError: the model is another one than a causal language model of transformers' own, or quantized.
    """
    model, named = architecture_of(AutoModelForCausalLM, config), list(config.architectures or ())
    if model is None or (named and model.__name__ not in named):
        what = "/".join(named) or config.model_type
        expected = "" if model is None else f", not a {model.__name__}"
        raise ModelError(
            f"{where}: `{path}` holds a {what}{expected}: it is not a causal language model that transformers has itself, so it cannot be "
            "trained here. Give a causal language model (`architectures` in its config.json names the class)"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = (
            quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        )
        raise _untrainable(
            where, path, f"its weights are quantized ({method or 'quantization_config in its config.json'})"
        )
    if config.is_encoder_decoder:
        raise _untrainable(where, path, "its config.json says `is_encoder_decoder: true`")
    return model


def check_attention(model: type, config: Any, path: str, where: str) -> None:
    """Build the architecture without weights, and see what its layers ask of attention.

    Raises:
        ModelError: they ask for what is not computed here, or cannot be built.
    """
    changed = [
        f"`{name}: {getattr(config.get_text_config(), name)}`" for name in SCALED_LOGITS if _scales(config, name)
    ]
    if changed:
        raise _untrainable(
            where, path, f"{model.__name__} changes its logits ({', '.join(changed)} in its config.json)"
        )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if kinds:
        raise _untrainable(where, path, f"{model.__name__} has layers of {', '.join(sorted(kinds))}")
    probe = _Probe()
    config = copy.deepcopy(config)
    config._attn_implementation = probe.NAME
    try:
        with torch.device("meta"):
            built = model(config).bfloat16().eval()
    except MALFORMED as error:
        raise ModelError(
            f"{where}: no {model.__name__} can be built from the configuration of `{path}`: {type(error).__name__}: {in_a_line(error)}. "
            "Correct its config.json, or copy the model again"
        ) from None
    if not isinstance(built.get_output_embeddings(), nn.Linear):
        raise _untrainable(where, path, f"{model.__name__} has no linear output projection")
    probe.ask(built)
    if probe.refusal is not None:
        raise _untrainable(where, path, probe.refusal)


def _scales(config: Any, name: str) -> bool:
    return getattr(config.get_text_config(), name, SCALED_LOGITS[name]) not in (None, SCALED_LOGITS[name])


def _untrainable(where: str, path: str, reason: str) -> ModelError:
    return ModelError(f"{where}: `{path}` cannot be trained here: {reason}, which is not supported. Give another model")


class _Probe:
    """Stands in for packed attention in a forward pass on the meta device, and remembers why it would refuse."""

    NAME = "packed-probe"

    def __init__(self) -> None:
        self.refusal: str | None = None
        self._calls = 0
        AttentionInterface.register(self.NAME, self._attend)

    @torch.no_grad()
    def ask(self, built: nn.Module) -> None:
        """One forward pass, as far as the meta device carries it: where experts are chosen by their scores it ends."""
        positions = torch.arange(4, device="meta")
        error: BaseException | None = None
        try:
            built.base_model(
                input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"),
                position_ids=positions[None],
                segments=Segments.of_texts([4]),
                use_cache=False,
            )
        except (RuntimeError, TypeError, ValueError) as raised:
            error = raised
        if self.refusal is None and (self._calls == 0 or (error is None and self._calls < _layers(built))):
            name, reason = type(built).__name__, "" if error is None else f" ({' '.join(str(error).split())})"
            self.refusal = f"not every layer of {name} attends through transformers' attention interface{reason}"

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sliding_window: int | None = None,
        segments: Segments | None = None,
        **asked: Any,
    ) -> tuple[torch.Tensor, None]:
        self._calls += 1
        try:
            attention.check_supported(module, sliding_window, asked)
            if not getattr(module, "is_causal", True):
                raise ValueError(f"{type(module).__name__} attends to later tokens, as an encoder does")
            if segments is None:
                raise ValueError(f"{type(module).__name__} is not told where the sequences of a packed row begin")
        except ValueError as error:
            self.refusal = str(error).removesuffix(", which packed attention does not support")
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _layers(built: nn.Module) -> int:
    return built.config.get_text_config().num_hidden_layers


def check_adapters(config: Any, settings: LoraSettings) -> None:
    """Raises LoraError if the architecture has no such layers to adapt, or layers that LoRA is not meant for here."""
    from rlhf.training import lora  # loads peft, which takes seconds

    with torch.device("meta"):
        lora.add_adapters(AutoModelForCausalLM.from_config(config), settings)


def check_vocabulary(
    tokenizer: Any, config: Any, path: str, where: str = "`policy.model`", token_ids: Iterable[int] = ()
) -> None:
    """Whether every token that the model will read has an embedding. One that nothing writes may be without (Gemma 3's text models name an
    image token).

    Args:
        token_ids: of the data, besides what the tokenizer and its chat template write by themselves.

    Raises:
        ModelError: a special token, a token in the chat template or one of `token_ids` has none.
    """
    rows = config.get_text_config().vocab_size
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    template = str(tokenizer.chat_template or "")
    written = {number for number, token in beyond.items() if number in special or token in template}
    read = written.union(beyond.keys() & set(token_ids))
    if read:
        number = min(read)
        raise ModelError(
            f"{where}: the tokenizer of `{path}` writes {len(read)} token(s) that the model has no embedding for: `{beyond[number]}` is "
            f"number {number}, and the embedding has {rows} rows (`vocab_size`). Enlarge it with "
            f"`model.resize_token_embeddings({max(beyond) + 1})` and save the model, or take the tokens out of the tokenizer"
        )
