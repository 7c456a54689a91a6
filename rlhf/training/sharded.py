"""Loading under ZeRO-3: every rank receives its shards, and no rank ever holds the whole model, on its device or in host memory.

transformers' own way (5.19, `HfDeepSpeedConfig` before `from_pretrained`) merges all files into one dictionary on every rank, builds
fused experts there as a whole, and does not look for foreign tensors or other shapes. So here the architecture is made on the meta device
and compared first; then rank 0 reads a few tensors at a time, by transformers' rules for renamed and fused ones, and they are broadcast
and partitioned before it reads the next.

Memory: on a device, its shards and `READ_ELEMENTS` or the largest tensor, whichever is more; in host memory, on rank 0, three times
that (as read, being fused, and fused), and nothing on the others. What the operating system keeps of the files it can drop.
Owns: that order of things. Does not know: DeepSpeed's configuration (`deepspeed`), or what the model is for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from rlhf.data.architecture import build_empty, check_finite, quiet_transformers, refuse
from rlhf.data.weight_files import Difference, StoredTensor, WeightsError, read_headers
from rlhf.training.deepspeed_zero3 import Sharding, partition, rank_device

READ_ELEMENTS = 64 * 2**20
"""Parameters read and distributed at a time, in elements."""


def differ(one: str, other: str) -> str:
    """What is wrong with a file that holds two tensors where the configuration says one, and what to do."""
    return (
        f"`{one}` and `{other}` are one tensor by its config.json (`tie_word_embeddings`), but differ in the file. Say "
        "`tie_word_embeddings: false` in config.json, or save the model again"
    )


class _Place(NamedTuple):
    """Where a tensor of the model hangs: an attribute of a module."""

    module: nn.Module
    attribute: str


def load_sharded(
    folder: Path, architecture: type, config: Any, where: str, sharding: Sharding, **options: Any
) -> nn.Module:
    """A folder's model with its parameters partitioned over the ranks. Collective.

    Args:
        architecture: transformers' class, and its configuration `config`.
        where: what the folder was given for, at the head of every message.
        sharding: how they are partitioned.
        options: further arguments of `from_pretrained`, such as `dtype`.

    Raises:
        WeightsError: on every rank: its weights are not those of its architecture, not finite, or cannot be read.
    """
    headers = read_headers(folder, where)
    model = build_empty(folder, architecture, config, where, **options)
    assert headers is not None, "build_empty refuses weights that are pickled"
    model.tie_weights()
    conversions, places, what = model._weight_conversions, _places(model), f"{where}: the weights in `{folder}`"
    parts = _Reader(model, headers, places, what).parts() if _first() else None
    _distribute(places, parts, model.config.dtype, sharding)
    left = [name for name, found in places.items() if getattr(found[0].module, found[0].attribute).is_meta]
    refuse(Difference(missing=frozenset(left)), what)
    _compute_buffers(model, rank_device())
    model._weight_conversions = conversions
    model.config.name_or_path = str(folder)
    return model


def set_aside(module: nn.Module, file: Path) -> None:
    """Write a module's parameters to a safetensors file, and leave it without memory for them, until `fill_sharded`."""
    save_file({name: parameter.detach().contiguous() for name, parameter in module.named_parameters()}, file)
    for places in _places(module, buffers=False).values():
        parameter = getattr(places[0].module, places[0].attribute)
        if not parameter.is_meta:  # which it is by now if another name shares it
            _put(places, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))


def fill_sharded(module: nn.Module, file: Path, dtype: torch.dtype, sharding: Sharding) -> None:
    """Give a module the parameters that `set_aside` wrote, in `dtype`, partitioned over the ranks. Collective.

    Raises:
        WeightsError: on every rank: the file cannot be read.
    """
    places = _places(module, buffers=False)
    _distribute(places, _stored_parts(places, file) if _first() else None, dtype, sharding)


def _stored_parts(places: Mapping[str, list[_Place]], file: Path) -> Iterator[list[str]]:
    """Names of parameters that are in the module now, on the CPU, a portion at a time."""
    try:
        with safe_open(file, framework="pt") as stored:
            names: list[str] = []
            size = 0
            for name in stored.keys():
                tensor = stored.get_tensor(name)
                empty = getattr(places[name][0].module, places[name][0].attribute)
                _put(places[name], nn.Parameter(tensor, requires_grad=empty.requires_grad))
                names.append(name)
                size += tensor.numel()
                if size >= READ_ELEMENTS:
                    yield names
                    names, size = [], 0
            if names:
                yield names
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error


def _distribute(
    places: Mapping[str, list[_Place]],
    parts: Iterator[list[str]] | None,
    dtype: torch.dtype,
    sharding: Sharding,
) -> None:
    """Broadcast what rank 0 reads, and partition its parameters, a portion at a time.

    Args:
        parts: on rank 0: names of tensors that are in the model, on the CPU.
        dtype: of parameters; DeepSpeed shards all in one type, whatever the architecture would keep in fp32.
    """
    while names := _agreed(parts):
        arrived = [_arrived(places[name], dtype) for name in names]
        parameters = nn.ParameterList(tensor for tensor in arrived if isinstance(tensor, nn.Parameter))
        for tensor in arrived:
            if not isinstance(tensor, nn.Parameter):
                torch.distributed.broadcast(tensor, 0)
        partition(parameters, sharding)


def _first() -> bool:
    return torch.distributed.get_rank() == 0


def _agreed(parts: Iterator[list[str]] | None) -> list[str]:
    """The names of the tensors that rank 0 has read next; empty at the end. Raises its WeightsError on every rank."""
    said: list[str] | str = []
    if parts is not None:
        try:
            said = next(parts, [])
        except WeightsError as error:
            said = str(error)
    said = _broadcast(said)
    if isinstance(said, str):
        raise WeightsError(said)
    return said


def _broadcast(said: list[str] | str) -> list[str] | str:
    """What rank 0 says, on every rank. As JSON: torch's way would unpickle what comes over the wire."""
    text = torch.tensor(bytearray(json.dumps(said).encode()), dtype=torch.uint8, device=rank_device())
    size = torch.tensor([len(text)], device=rank_device())
    torch.distributed.broadcast(size, 0)
    if not _first():
        text = torch.empty(int(size), dtype=torch.uint8, device=rank_device())
    torch.distributed.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))


def _places(model: nn.Module, *, buffers: bool = True) -> dict[str, list[_Place]]:
    """Name of every tensor of the files -> all places in the model that share it."""
    shared: dict[int, list[_Place]] = {}
    names: dict[str, int] = {}
    for owner, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *(module.named_buffers(recurse=False) if buffers else ())]
        for attribute, tensor in tensors:
            if attribute not in module._non_persistent_buffers_set:
                shared.setdefault(id(tensor), []).append(_Place(module, attribute))
                names[f"{owner}.{attribute}" if owner else attribute] = id(tensor)
    return {name: shared[identity] for name, identity in names.items()}


def _put(places: list[_Place], tensor: torch.Tensor) -> None:
    for place in places:
        setattr(place.module, place.attribute, tensor)


def _arrived(places: list[_Place], dtype: torch.dtype) -> torch.Tensor:
    """The tensor at these places, whole on the device: rank 0 has read it, the others have memory for it. It is there from now on."""
    device = rank_device()
    tensors = [getattr(place.module, place.attribute) for place in places]
    found = next((tensor for tensor in tensors if not tensor.is_meta), tensors[0])
    wanted = dtype if isinstance(found, nn.Parameter) and found.is_floating_point() else found.dtype
    if found.is_meta:
        moved = torch.empty_like(found, device=device, dtype=wanted)
    else:
        moved = found.detach().to(device, wanted)
    if isinstance(found, nn.Parameter):
        moved = nn.Parameter(moved, requires_grad=found.requires_grad)
    moved._is_hf_initialized = True
    _put(places, moved)
    return moved


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds, as rotary frequencies: transformers computes them where it initializes weights."""
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in computed:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        module._is_hf_initialized = not computed
    model.initialize_weights()


class _Reader:
    """Rank 0's part: reads the files into the model, a few tensors at a time."""

    def __init__(
        self, model: nn.Module, headers: Mapping[str, StoredTensor], places: Mapping[str, list[_Place]], what: str
    ):
        self._model, self._headers, self._places, self._what = model, headers, places, what
        self._shapes = dict(model.state_dict())
        self._read: set[int] = set()  # places that are filled
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        dtype = model.config.dtype
        self._config = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping, device_map={"": "cpu"}
        )

    def parts(self) -> Iterator[list[str]]:
        """Names of the tensors that are in the model now, on the CPU; they must be gone from it before the next part.

        Raises:
            WeightsError: a tensor cannot be read, or is not finite.
        """
        with ExitStack() as stack:
            try:
                files = {
                    file: stack.enter_context(safe_open(file, framework="pt"))
                    for file in sorted({tensor.file for tensor in self._headers.values()})
                }
                for keys in self._groups(files):
                    yield self._read_into_model({key: files[self._headers[key].file].get_slice(key) for key in keys})
            except (OSError, SafetensorError, RuntimeError) as error:
                raise WeightsError(f"{self._what} cannot be read: {error}") from error

    def _read_into_model(self, stored: dict[str, Any]) -> list[str]:
        with quiet_transformers():
            convert_and_load_state_dict_in_model(self._model, stored, self._config)
        new = []
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if not tensor.is_meta and id(self._places[name]) not in self._read:
                self._read.add(id(self._places[name]))
                new.append((name, tensor))
        check_finite(new, self._what)
        return [name for name, _ in new]

    def _groups(self, files: Mapping[Path, Any]) -> Iterator[list[str]]:
        """The files' tensors in portions of about `READ_ELEMENTS`, those together that become one.

        Raises:
            WeightsError: the file holds two different tensors for one that is tied.
        """
        targets: dict[str, list[str]] = {}
        for key in sorted(self._headers, key=dot_natural_key):
            name = self._target(key)
            if name in self._places:  # what else there is, transformers passes over
                targets.setdefault(name, []).append(key)
        filled: dict[int, str] = {}
        group: list[str] = []
        size = 0
        for name, keys in targets.items():
            twin = filled.setdefault(id(self._places[name]), keys[0])
            if twin != keys[0]:
                one, other = (files[self._headers[key].file].get_tensor(key) for key in (twin, keys[0]))
                if not torch.equal(one, other):
                    raise WeightsError(f"{self._what}: {differ(twin, keys[0])}")
                continue
            group += keys
            size += sum(math.prod(self._headers[key].shape) for key in keys)
            if size >= READ_ELEMENTS:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _target(self, key: str) -> str:
        """The model's name of what a tensor becomes, or is a part of."""
        prefix = self._model.base_model_prefix
        name, _ = rename_source_key(key, self._renamings, self._converters, prefix, self._shapes)
        if name not in self._shapes and key in self._shapes:
            name, _ = rename_source_key(key, [], [], prefix, self._shapes)
        return name
