"""Weight files, as far as their headers: what holds is read as safetensors reads it, what does not is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.data.weight_files import INDEX, SINGLE, Difference, WeightsError, compare, read_headers

TENSORS = {
    "a.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    "a.bias": torch.ones(3),
    "count": torch.tensor(7),
    "none": torch.ones(0, 4),
}


def written(file: Path) -> tuple[dict, bytes]:
    """The header of a file, and all that follows it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, header: object, rest: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, {"format": "pt"})
    return tmp_path


def shards(folder: Path) -> None:
    """The same tensors in two files with an index."""
    (folder / SINGLE).unlink(missing_ok=True)
    save_file({name: TENSORS[name] for name in ("a.weight", "none")}, folder / "one.safetensors")
    save_file({name: TENSORS[name] for name in ("a.bias", "count")}, folder / "two.safetensors")
    files = {"a.weight": "one", "none": "one", "a.bias": "two", "count": "two"}
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in files.items()}}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_header_says_what_safetensors_finds(folder: Path, sharded: bool) -> None:
    if sharded:
        shards(folder)
    found = read_headers(folder, "here")
    assert found is not None and found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        with safe_open(tensor.file, "pt") as file:
            inside = file.get_slice(name)
            assert (list(tensor.shape), tensor.dtype) == (inside.get_shape(), inside.get_dtype())
        assert tensor.nbytes == TENSORS[name].nbytes


def test_pickled_weights_are_left_to_others(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert read_headers(folder, "here") is None


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def header_with(file: Path, name: str, **fields: object) -> None:
    header, rest = written(file)
    header[name] |= fields
    write(file, header, rest)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda file: cut(file, 0), "no whole header"),
    "cut in the length": (lambda file: cut(file, 5), "no whole header"),
    "cut in the header": (lambda file: cut(file, 60), "no whole header"),
    "cut in the data": (lambda file: cut(file, file.stat().st_size - 1), "truncated: "),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "longer than its tensors"),
    "an enormous header": (lambda file: file.write_bytes(b"\xff" * 100), "no whole header"),
    "zeros": (lambda file: file.write_bytes(bytes(1000)), "no whole header"),
    "a web page": (lambda file: file.write_text("<!DOCTYPE html>" * 100), "no whole header"),
    "a pointer": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "no object": (lambda file: write(file, [1], b""), "is corrupt"),
    "no entry": (lambda file: write(file, {"a": 3}, b""), "is corrupt"),
    "deep": (lambda file: file.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000), "is corrupt"),
    "unknown type": (lambda file: header_with(file, "a.bias", dtype="F33"), "unknown type 'F33'"),
    "negative size": (lambda file: header_with(file, "a.bias", shape=[-3]), "is corrupt"),
    "size in words": (lambda file: header_with(file, "a.bias", shape=["3"]), "is corrupt"),
    "other size": (lambda file: header_with(file, "a.bias", shape=[4]), r"`a.bias` of shape \[4\]"),
    "other place": (
        lambda file: header_with(file, "a.bias", data_offsets=[10**9, 10**9 + 12]),
        "does not lie where its header says",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(folder: Path, damage: str) -> None:
    harm, words = DAMAGES[damage]
    harm(folder / SINGLE)
    with pytest.raises(WeightsError, match=words) as refused:
        read_headers(folder, "`policy.model`")
    assert str(refused.value).startswith("`policy.model`: ") and str(folder / SINGLE) in str(refused.value)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(WeightsError):
        read_headers(folder, "here")


def test_an_index_and_its_files_must_agree(folder: Path) -> None:
    shards(folder)
    (folder / "two.safetensors").rename(folder / "gone")
    with pytest.raises(WeightsError, match="names `two.safetensors`, but it is not in the folder"):
        read_headers(folder, "here")
    save_file({"a.bias": TENSORS["a.bias"]}, folder / "two.safetensors")
    with pytest.raises(WeightsError, match="says that `count` is in two.safetensors"):
        read_headers(folder, "here")
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(WeightsError, match="no index of weight files"):
            read_headers(folder, "here")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there are no weights in"):
        read_headers(tmp_path, "here")


def test_differences_by_name() -> None:
    expected = {"embed": (8, 2), "head": (8, 2), "norm": (2,)}
    assert not compare(expected, expected)
    assert not compare(expected, {"embed": (8, 2), "norm": (2,)}, ties=[("embed", "head")])
    assert compare(expected, {"norm": (2,)}, ties=[("embed", "head")]).missing == {"embed", "head"}
    found = compare(expected, {"embed": (9, 2), "norm": (2,), "extra": (1,)})
    assert found == Difference(frozenset({"head"}), frozenset({"extra"}), {"embed": ((9, 2), (8, 2))})
    assert found.words() == (
        "`head` is missing; `embed` has the shape [9, 2] instead of [8, 2]; `extra` is not part of the model"
    )
    many = compare({str(number): () for number in range(7)}, {})
    assert many.words() == "`0`, `1`, `2`, `3`, `4` and 2 more are missing"
