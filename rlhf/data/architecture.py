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

from rlhf.data.errors import in_a_line
from rlhf.data.model_folder import lacks_weights
from rlhf.data.weight_files import PICKLED, Difference, WeightsError, compare, read_headers, read_index

log = logging.getLogger(__name__)

DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
DTYPES |= {"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""With these, `from_pretrained` says what it found instead of passing over it."""
REMEDY = "Give a folder that holds the whole model as it was saved, or save it again with `save_pretrained`"


def check_folder(folder: Path, model: type, config: Any, where: str, new: Collection[str] = ()) -> None:
    """Compare a folder's weights with an architecture, from the headers of its files; arguments and errors as `build_empty`'s. A hub's
    model whose weights have not been fetched is passed over."""
    if lacks_weights(folder):
        log.warning(
            "%s: the weights of %s are not in this machine's cache yet; they are checked when they are loaded",
            where,
            folder,
        )
    elif not hasattr(config, "quantization_config"):
        build_empty(folder, model, config, where, new)
    else:
        _check_quantizer(config, where, folder)
        if read_headers(folder, where) is None:  # the names and types of quantized weights are the quantizer's
            _pickled(folder, where)


def _check_quantizer(config: Any, where: str, folder: Path) -> None:
    """Raises WeightsError for a quantization that transformers does not know."""
    from transformers.quantizers import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(dict(config.quantization_config))
    except Exception as error:
        raise WeightsError(
            f"{where}: the `quantization_config` in {folder / 'config.json'} is none that transformers knows: {in_a_line(error)}. {REMEDY}"
        ) from error


def build_empty(
    folder: Path, model: Any, config: Any, where: str, new: Collection[str] = (), **options: Any
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
    except Exception as error:  # a configuration from which no model can be built, or tensors that are to be fused and do not go together
        refuse(_in_the_files_names(model, config, stored, where, folder), what)
        raise WeightsError(f"{what}: {in_a_line(error)}. {REMEDY}") from error
    found = difference(info, new)
    if found.wrong_shape:  # perhaps of a tensor that is fused of several in the file
        refuse(replace(_in_the_files_names(model, config, stored, where, folder), unexpected=frozenset()), what)
    refuse(found, what)
    return built


def _in_the_files_names(
    model: type, config: Any, stored: Mapping[str, torch.Tensor], where: str, folder: Path
) -> Difference:
    """How the stored tensors differ from those that `save_pretrained` would write. Raises WeightsError if no model can be made."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            made = model(config)
    except Exception as error:
        raise WeightsError(
            f"{where}: no {model.__name__} can be built from the configuration of `{folder}`: {type(error).__name__}: {in_a_line(error)}. "
            "Correct its config.json, or copy the model again"
        ) from error
    written = revert_weight_conversion(made, made.state_dict())
    made_of, found = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (written, stored))
    return compare(made_of, found, ties=made.all_tied_weights_keys.items())


def architecture_of(auto: Any, config: Any) -> Any:
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
    whole = [f"`{name}` ({tensor.dtype})" for name, tensor in headers.items() if _cannot_compute(name, tensor.dtype)]
    if whole:
        raise WeightsError(
            f"{where}: {whole[0]} in `{folder}` does not hold bf16, fp16 or fp32 numbers, and config.json names no quantization. {REMEDY}"
        )
    return {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta") for name, tensor in headers.items()
    }


def _cannot_compute(name: str, dtype: str) -> bool:
    """Whether a weight is stored in whole numbers, or in eight bits without the scales that belong to them."""
    return name.endswith((".weight", ".bias")) and dtype not in ("F16", "BF16", "F32", "F64")


def _pickled(folder: Path, where: str) -> dict[str, torch.Tensor]:
    """Through transformers, which unpickles nothing but tensors."""
    import pickle

    from transformers.modeling_utils import load_state_dict

    names = [PICKLED[0]]
    if not (folder / PICKLED[0]).is_file():
        names = sorted(set(read_index(folder / PICKLED[1], where).values()))
    found: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            read = load_state_dict(folder / name, map_location="meta")
            if not all(isinstance(tensor, torch.Tensor) for tensor in read.values()):
                raise ValueError("it holds other things than tensors")
            found |= read
        except (
            OSError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise WeightsError(
                f"{where}: {folder / name} cannot be read ({in_a_line(error)}). Copy or download it again, or save the model in "
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
