"""LoRA through peft: small trainable matrices beside frozen ones, W x + scaling B A x, with scaling = alpha / rank.

Owns: which layers get adapters, which of them is in use, and peft's file format. The base is frozen, so the reference needs no model
of its own: it is the base with no adapter, or with one of its own. Does not know: who learns (`deepspeed`), or how the product reaches
the engines (`weights`, transfer/).

An adapter has a name; `POLICY` is the one that learns. There is no dropout: log-probs would be random.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings
from rlhf.training.cpu_products import use_fast_linear
from rlhf.training.deepspeed_zero3 import whole_shape
from rlhf.training.weights import gather_in_chunks, is_adapted

if TYPE_CHECKING:  # peft takes two seconds to import, and most runs adapt nothing
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

POLICY = "default"
"""The adapter that learns; it has the name that peft gives to an only one."""

_FILE_PREFIX = "base_model.model."  # of every tensor in peft's files


class LoraError(UserError):
    """The model cannot be adapted as asked; the message says why."""


def adapter_config(settings: LoraSettings, base: str = "") -> LoraConfig:
    """peft's configuration of an adapter. The first matrix starts random, the second at zero, so the product starts at zero.

    Args:
        base: name or folder of the model that is adapted, for readers of peft's files.
    """
    from peft import LoraConfig

    targets = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base or None,
        task_type="CAUSAL_LM",
    )


def add_adapters(model: nn.Module, settings: LoraSettings, frozen: Sequence[str] = ()) -> None:
    """Freeze the model and put adapters into it; `POLICY` learns and is in use, those named `frozen` start equal to it.

    All ranks must hold the same random state.

    Args:
        model: transformers model; the names of its layers stay, the adapted ones are wrapped by peft.

    Raises:
        LoraError: no such layers, or layers that LoRA is not meant for here.
    """
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    for name in (POLICY, *frozen):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # such layers are refused
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft then finds out by itself
                inject_adapter_in_model(adapter_config(settings), model, name)
        except ValueError as error:  # peft's own way to say that no layer has such a name
            raise LoraError(
                f"policy.lora.target_modules: {settings.target_modules} does not fit {type(model).__name__}: {error}"
            ) from error
    _refuse_other_layers(model, settings)
    use_adapter(model, POLICY)
    for name in frozen:
        for mine, theirs in zip(adapter_parameters(model, name), adapter_parameters(model, POLICY), strict=True):
            mine.data.copy_(theirs.data)
    use_fast_linear(model)


def _refuse_other_layers(model: nn.Module, settings: LoraSettings) -> None:
    for name, layer in adapted_layers(model):
        if hasattr(layer, "parameter_name"):  # peft's wrapper of a bare tensor
            raise LoraError(
                f"policy.lora.target_modules: {settings.target_modules} matches the experts {name}, which are one tensor and cannot be "
                "adapted here. Name layers outside of them, such as [q_proj, k_proj, v_proj, o_proj]"
            )
        if POLICY not in layer.lora_A or layer is model.get_output_embeddings():
            raise LoraError(
                f"policy.lora.target_modules: {settings.target_modules} matches {name}, but only the linear layers between embedding and "
                "output layer can be adapted. Name others, or set all-linear"
            )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers with adapters, by their names in the base model."""
    return ((name, layer) for name, layer in model.named_modules() if is_adapted(layer))


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The matrices of one adapter, A and B of each layer, in the order of the model's parameters."""
    for _, layer in adapted_layers(model):
        yield layer.lora_A[name].weight
        yield layer.lora_B[name].weight


def base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The frozen weights that all adapters share."""
    return (parameter for name, parameter in model.named_parameters() if ".lora_" not in name)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Compute with this adapter from now on; None: with the base alone. Only `POLICY` ever takes gradients."""
    for _, layer in adapted_layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name, inference_mode=name != POLICY)


@contextmanager
def adapter_in_use(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the model computes with this adapter, or as the base alone; afterwards again as the policy."""
    use_adapter(model, name)
    try:
        yield
    finally:
        use_adapter(model, POLICY)


# What leaves training


def adapter_weights(model: nn.Module, name: str = POLICY) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of one adapter, whole, under the names of peft's files. Collective."""
    named = zip(_file_names(model), adapter_parameters(model, name), strict=True)
    for key, parameter in gather_in_chunks(((key, parameter), [parameter]) for key, parameter in named):
        yield key, parameter.detach()


def described_adapter(model: nn.Module) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and whole shape of each tensor that `adapter_weights` gives, in its order."""
    return [
        (key, parameter.dtype, whole_shape(parameter))
        for key, parameter in zip(_file_names(model), adapter_parameters(model, POLICY), strict=True)
    ]


def _file_names(model: nn.Module) -> Iterator[str]:
    for name, _ in adapted_layers(model):
        yield f"{_FILE_PREFIX}{name}.lora_A.weight"
        yield f"{_FILE_PREFIX}{name}.lora_B.weight"


def save_adapter(folder: Path, config: LoraConfig, weights: dict[str, torch.Tensor]) -> None:
    """Write an adapter as peft does: `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        weights: from `adapter_weights`, in host memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
