"""What an architecture of transformers makes of a model folder's weights, found out before or after they are loaded.

Owns: the comparison of names and shapes, by transformers' own rules for renamed, fused and tied tensors, on the meta device, so that
no weights are read; and the refusal of what a loader would have to invent, ignore or could not compute with.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf.data.weight_files import PICKLED, Difference, WeightsError, compare, read_headers

DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
DTYPES |= {"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""With these, `from_pretrained` says what it found instead of passing over it."""
REMEDY = "Give a folder that holds the whole model as it was saved, or save it again with `save_pretrained`"


def check_folder(folder: Path, model: type, config: Any, where: str, new: Collection[str] = ()) -> None:
    """Compare a folder's weights with an architecture, from the headers of its files; arguments and errors as `build_empty`'s."""
    if not hasattr(config, "quantization_config"):
        build_empty(folder, model, config, where, new)
    elif read_headers(folder, where) is None:  # the names and types of quantized weights are the quantizer's
        _pickled(folder, where)


def build_empty(
    folder: Path, model: type, config: Any, where: str, new: Collection[str] = (), **options: Any
) -> torch.nn.Module:
    """The model that a folder's weights make, on the meta device: every tensor has the shape and type it will have, and no memory.

    Args:
        model: transformers' class of the architecture, as `architecture_of` gives it.
        config: its configuration.
        where: what the folder was given for, at the head of every message: "`policy.model`".
        new: tensors, by the last parts of their names (`score.weight`), that may be missing because the caller starts them anew.
        options: further arguments of `from_pretrained`.

    Raises:
        WeightsError: files are missing, truncated or corrupt; tensors are missing, of another shape or not part of the model.
    """
    stored, what = (
        meta_tensors(folder, where),
        f"{where}: the weights in `{folder}` are not those of a {model.__name__}",
    )
    try:
        with quiet_transformers():
            built, info = model.from_pretrained(
                None, state_dict=stored, device_map={"": "meta"}, config=config, **REPORTED, **options
            )
    except RuntimeError as error:  # tensors that it wants to fuse do not go together
        refuse(_in_the_files_names(model, config, stored), what)
        raise WeightsError(f"{what}: {error}. {REMEDY}") from None
    found = difference(info, new)
    if found.wrong_shape:  # perhaps of a tensor that is fused of several in the file
        refuse(replace(_in_the_files_names(model, config, stored), unexpected=frozenset()), what)
    refuse(found, what)
    return built


def _in_the_files_names(model: type, config: Any, stored: Mapping[str, torch.Tensor]) -> Difference:
    """How the stored tensors differ from those that `save_pretrained` would write."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        made = model(config)
    written = revert_weight_conversion(made, made.state_dict())
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (written, stored)]
    return compare(*shapes, ties=made.all_tied_weights_keys.items())


def architecture_of(auto: type, config: Any) -> type | None:
    """The class that `AutoModelForCausalLM`, or another of transformers' auto classes, takes for a configuration; None if it has none."""
    mapping = auto._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if not isinstance(found, tuple):
        return found
    named = {each.__name__: each for each in found}
    return next((named[name] for name in config.architectures or () if name in named), found[0])


def meta_tensors(folder: Path, where: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weight files, on the meta device. Raises WeightsError as `read_headers`."""
    headers = read_headers(folder, where)
    if headers is None:
        return _pickled(folder, where)
    unknown = [f"`{name}` ({tensor.dtype})" for name, tensor in headers.items() if tensor.dtype not in DTYPES]
    if unknown:
        raise WeightsError(
            f"{where}: {unknown[0]} in `{folder}` is of a type that cannot be used here. Give a model in bf16 or fp32"
        )
    return {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta") for name, tensor in headers.items()
    }


def _pickled(folder: Path, where: str) -> dict[str, torch.Tensor]:
    """Through transformers, which unpickles nothing but tensors."""
    import json
    import pickle

    from transformers.modeling_utils import load_state_dict

    names = [PICKLED[0]]
    if not (folder / PICKLED[0]).is_file():
        names = sorted(set(json.loads((folder / PICKLED[1]).read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            found |= load_state_dict(folder / name, map_location="meta")
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise WeightsError(
                f"{where}: {folder / name} cannot be read ({str(error).splitlines()[0]}). Copy or download it again, or save the model in "
                "the safetensors format"
            ) from None
    return found


def difference(info: Mapping[str, Any], new: Collection[str] = ()) -> Difference:
    """What transformers found when it loaded weights (`from_pretrained(..., **REPORTED)`).

    Tied weights are not missing, and buffers that are computed when a model is made are neither missing nor unexpected; transformers
    knows them.

    Args:
        new: tensors, by the last parts of their names, that may be missing because the caller starts them anew.
    """
    missing = {name for name in info["missing_keys"] if not any(_ends(name, last) for last in new)}
    wrong = {name: (tuple(found), tuple(expected)) for name, found, expected in info["mismatched_keys"]}
    return Difference(frozenset(missing), frozenset(info["unexpected_keys"]), wrong)


def refuse(found: Difference, what: str) -> None:
    """Raises WeightsError if anything differs.

    Args:
        what: the message's beginning: field, folder, and what its weights should be.
    """
    if found:
        raise WeightsError(f"{what}: {found.words()}. {REMEDY}")


@torch.no_grad()
def check_finite(named: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raises WeightsError that names the first tensor with a number that is not finite.

    Args:
        named: names and tensors, anywhere but on the meta device; quantized ones are passed over.
        what: the message's beginning: field and folder.
    """
    for name, tensor in named:
        # One pass without copies: not-a-number carries over into both ends.
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise WeightsError(f"{what}: `{name}` holds numbers that are not finite. {REMEDY}")


def check_loaded(
    model: torch.nn.Module, info: Mapping[str, Any], folder: str | Path, where: str, new: Collection[str] = ()
) -> None:
    """The same comparison after `from_pretrained(..., **REPORTED)`, and a look at the numbers.

    Raises:
        WeightsError: tensors are missing, of another shape, not part of the model, or not finite.
    """
    refuse(difference(info, new), f"{where}: the weights in `{folder}` are not those of a {type(model).__name__}")
    check_finite((*model.named_parameters(), *model.named_buffers()), f"{where}: the weights in `{folder}`")


def _ends(name: str, last: str) -> bool:
    return name == last or name.endswith("." + last)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers prints no report of what it loads: our own words say it."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
