"""The weight files of a model folder, read as far as their headers: which tensors there are, of what shape and type.

Owns: the safetensors format (one file, or shards with an index) and what must hold of it; how two lists of tensors differ, in words.
Does not know: torch, or what an architecture wants to find (`architecture`). Pickled files have no header that can be read without
running them, so they are left to transformers.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.loader import UserError
from rlhf.data.errors import in_a_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of one number of each type that the format knows."""
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own bound."""
NAMED = 5
"""Tensors that a message names."""
AGAIN = "Copy or download the file again"

Shape = tuple[int, ...]


class WeightsError(UserError):
    """The weight files are not what they should be; the message names field, file, tensor and remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor: its shape, its type as the format spells it (`BF16`), and the file it is in."""

    shape: Shape
    dtype: str
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def weight_files(folder: Path, where: str) -> list[Path] | None:
    """The safetensors files that transformers loads from a model folder; None if it has pickled weights only.

    Args:
        where: what the folder was given for, at the head of every message: "`policy.model`".

    Raises:
        WeightsError: there are no weights, or the index names files that are not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = sorted(set(read_index(folder / INDEX, where).values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise WeightsError(
                f"{where}: {folder / INDEX} names {_listed(missing)}, but {'it is' if len(missing) == 1 else 'they are'} not in the "
                "folder. Copy or download the model again"
            )
        return [folder / name for name in files]
    if any((folder / name).is_file() for name in PICKLED):
        return None
    raise WeightsError(
        f"{where}: there are no weights in `{folder}` (no {SINGLE} or {INDEX}). Give the folder of a whole model in Hugging Face format"
    )


def read_headers(folder: Path, where: str) -> dict[str, StoredTensor] | None:
    """Every tensor of a model folder by its name; None if it has pickled weights only. Reads no weights.

    Raises:
        WeightsError: there are no weights; or a file is truncated or corrupt, or does not hold what the index says.
    """
    files = weight_files(folder, where)
    if files is None:
        return None
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= read_header(file, where)
    if not (folder / SINGLE).is_file():
        index = read_index(folder / INDEX, where)
        wrong = [name for name, file in index.items() if name not in found or found[name].file.name != file]
        if wrong:
            raise WeightsError(
                f"{where}: {folder / INDEX} says that {_listed(wrong)} {'is' if len(wrong) == 1 else 'are'} in {index[wrong[0]]}, and the "
                "file does not hold it. Copy or download the model again"
            )
        found = {name: found[name] for name in index}  # what the index does not name is not loaded
    return found


def read_header(file: Path, where: str) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file.

    Raises:
        WeightsError: the file is no such file, or truncated, or corrupt.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if first.startswith(b"version "):
            raise WeightsError(
                f"{where}: {file} is a pointer of Git LFS, not the weights themselves. Fetch them with `git lfs pull`"
            )
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length <= min(LONGEST_HEADER, size - 8):
            raise WeightsError(f"{where}: {file} is truncated, or no safetensors file: it has no whole header. {AGAIN}")
        written = stream.read(length)
    try:
        header = json.loads(written)
        notes = header.pop("__metadata__", {})
        if not all(type(word) is str for word in notes.values()):
            raise ValueError("its `__metadata__` are no texts")
        entries = {name: _entry(entry, file) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{where}: the header of {file} is corrupt ({in_a_line(error)}). {AGAIN}") from None
    expected = 0
    for name, (tensor, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][1:]):
        if start != expected or stop - start != tensor.nbytes:
            raise WeightsError(
                f"{where}: {file} is corrupt: `{name}` of shape {_shown(tensor.shape)} and type {tensor.dtype} does not lie where its "
                f"header says. {AGAIN}"
            )
        expected = stop
    if size != 8 + length + expected:
        state = "truncated" if size < 8 + length + expected else "longer than its tensors"
        raise WeightsError(f"{where}: {file} is {state}: {size:,} bytes instead of {8 + length + expected:,}. {AGAIN}")
    return {name: tensor for name, (tensor, _, _) in entries.items()}


def _entry(entry: Mapping[str, Any], file: Path) -> tuple[StoredTensor, int, int]:
    """A tensor and where its bytes start and stop. Raises ValueError and the like for what is none."""
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"shape {_shown(shape)} at {start} to {stop}")
    if entry["dtype"] not in BITS:
        raise ValueError(f"unknown type {entry['dtype']!r}")
    return StoredTensor(shape, entry["dtype"], file), start, stop


def read_index(file: Path, where: str) -> dict[str, str]:
    """Tensor -> name of its file, which stands in the same folder.

    Raises:
        WeightsError: this is no index.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not found or not all(map(_is_name, found.values())):
            raise ValueError("its `weight_map` does not map tensors to files of this folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{where}: {file} is no index of weight files ({in_a_line(error)}). {AGAIN}") from None
    return found


def _is_name(file: Any) -> bool:
    return type(file) is str and Path(file).name == file and len(os.fsencode(file)) <= 255 and "\0" not in file


@dataclass(frozen=True)
class Difference:
    """How the tensors that were found differ from those that were expected.

    Attributes:
        wrong_shape: tensor -> (the shape found, the shape expected).
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    wrong_shape: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def words(self) -> str:
        """What differs, by name; empty if nothing does."""
        parts = []
        if self.missing:
            parts.append(f"{_listed(self.missing)} {_is(self.missing)} missing")
        if self.wrong_shape:
            name, (found, expected) = min(self.wrong_shape.items())
            more = f" (and {len(self.wrong_shape) - 1} more)" if len(self.wrong_shape) > 1 else ""
            parts.append(f"`{name}` has the shape {_shown(found)} instead of {list(expected)}{more}")
        if self.unexpected:
            parts.append(f"{_listed(self.unexpected)} {_is(self.unexpected)} not part of the model")
        return "; ".join(parts)


def compare(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], ties: Iterable[Collection[str]] = ()
) -> Difference:
    """How `found` differs from `expected` (name -> shape).

    Args:
        ties: sets of names that share one tensor, of which a file needs to hold only one.
    """
    missing = expected.keys() - found.keys()
    for names in ties:
        if found.keys() & set(names):
            missing -= set(names)
    shapes = {name: (tuple(found[name]), tuple(expected[name])) for name in expected.keys() & found.keys()}
    return Difference(
        frozenset(missing),
        frozenset(found.keys() - expected.keys()),
        {name: both for name, both in shapes.items() if both[0] != both[1]},
    )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:NAMED]) + more


def _shown(shape: Shape) -> str:
    return f"{list(shape[:8])}" if len(shape) <= 8 else f"of {len(shape)} sizes"


def _is(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"
