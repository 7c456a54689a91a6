"""Models from their files and back: what is loaded is what the files hold, and what is written is all of it.

Owns: loading with packed attention and without dropout, in 4 bits where asked; the refusal of weights that are not the architecture's,
or not finite; the export of a whole model with its generation settings and tokenizer.
Does not know: what becomes of the model in memory.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from rlhf.config.extras import remedy
from rlhf.data.architecture import REPORTED, architecture_of, check_folder, check_loaded, quiet_transformers
from rlhf.data.model_folder import GENERATION
from rlhf.data.weight_files import WeightsError, weight_files
from rlhf.training import attention
from rlhf.training.cpu_products import use_fast_linear
from rlhf.training.deepspeed_zero3 import Sharding
from rlhf.training.model import DTYPES, ModelError, disable_dropout
from rlhf.training.sharded import differ, load_sharded


def load_causal_lm(path: str, dtype: str, quantize: str = "none", sharding: Sharding | None = None) -> nn.Module:
    """The transformers model at `path`, in `dtype`, with packed attention and no dropout.

    Args:
        quantize: "4bit" holds the linear layers but the output layer in 4 bits; then they cannot be trained.
        sharding: how ZeRO-3 partitions the parameters over the ranks (`deepspeed.sharding`). Collective.

    Raises:
        ModelError: not a causal language model of a kind this project can train, or 4 bits are not to be had here.
        WeightsError: its weights are not those of its architecture, or not finite.
    """
    options = _quantization(dtype, quantize)
    model = load_model(AutoModelForCausalLM, path, dtype, "policy.model", sharding, **options)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ModelError(
            f"policy.model: {type(model).__name__} has no linear output projection; it cannot be trained here"
        )
    if quantize != "none":
        _keep_packing(model)
    return model


def load_model(
    auto: type, path: str, dtype: str, where: str, sharding: Sharding | None = None, **options: Any
) -> nn.Module:
    """A model of one of transformers' auto classes, in `dtype`, with packed attention and no dropout.

    Args:
        where: the field that names the model, at the head of every message.
        sharding: as of `load_causal_lm`. Pickled weights are loaded whole by every rank, in its host memory.
        options: further arguments of `from_pretrained`.

    Raises:
        ModelError: there is no such model.
        WeightsError: its weights are not those of its architecture, or not finite.
    """
    options |= {"dtype": DTYPES[dtype], "attn_implementation": attention.NAME}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        architecture, folder = architecture_of(auto, config), _safetensors(path, where)
        if architecture is None or folder is None:
            model = _load_whole(auto, config, path, where, options)
        elif sharding is not None:
            model = load_sharded(folder, architecture, config, where, sharding, **options)
        else:
            check_folder(folder, architecture, config, where)
            model = _load_whole(auto, config, path, where, options)
    except (OSError, ValueError) as error:
        failed = f"cannot load a causal language model from {path!r}"
        if auto is not AutoModelForCausalLM:
            failed = f"cannot load a sequence classifier from {path!r}"
        raise ModelError(f"{where}: {failed}: {error}") from error
    disable_dropout(model)
    use_fast_linear(model.base_model)
    return model


def _safetensors(path: str, where: str) -> Path | None:
    """The folder, if it has safetensors files; None if there are pickled ones only, or nothing."""
    folder = Path(path)
    return folder if folder.is_dir() and weight_files(folder, where) is not None else None


def _load_whole(auto: Any, config: Any, path: str, where: str, options: Mapping[str, Any]) -> nn.Module:
    with quiet_transformers():
        model, info = auto.from_pretrained(path, config=config, **REPORTED, **options)
    check_loaded(model, info, path, where)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
        raise WeightsError(
            f"{where}: the weights in `{path}`: {differ(names[id(embedding.weight)], names[id(head.weight)])}"
        )
    return model


def _keep_packing(model: nn.Module) -> None:
    """In evaluation mode on a CPU bitsandbytes would repack weights in place, and round differently with and without gradient."""
    for layer in model.modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            layer.training = True


def _quantization(dtype: str, quantize: str) -> dict[str, Any]:
    """What `from_pretrained` is told about it."""
    if quantize == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"policy.lora.quantize_base: bitsandbytes is not installed. {remedy('qlora')}")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {
        "quantization_config": config,
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }


def save_causal_lm(causal_lm: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: str) -> None:
    """Write the model in Hugging Face format with these weights, as if nothing in it were wrapped or quantized, and its tokenizer.

    Args:
        weights: from `rlhf.training.weights.whole_weights`, in host memory.
        source: folder of the model that it was loaded from: its generation settings and tokenizer are kept.
    """
    config = copy.deepcopy(causal_lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(causal_lm)(config).to(causal_lm.dtype)  # whose type is what config.json will say
    # Some models' own settings do not pass the check that transformers makes before it writes them, so their file is copied.
    plain.generation_config = GenerationConfig.from_model_config(config)
    plain.save_pretrained(folder, state_dict=weights)
    settings = Path(source) / GENERATION
    if settings.is_file():
        shutil.copyfile(settings, Path(folder) / GENERATION)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
