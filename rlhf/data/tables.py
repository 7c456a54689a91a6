"""Rows of tables: Parquet files, and data sets of the package `datasets`. Both packages are an extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config.data import HUB, hub_parts
from rlhf.config.extras import remedy
from rlhf.data.errors import DataError

EXTRA = f"{remedy('datasets')} Or convert the data to JSON lines, which needs no package."
SAVED = ("dataset_dict.json", "state.json")
"""Either lies in a folder that `save_to_disk` wrote."""


def parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, each with all columns.

    Raises:
        DataError: it is none, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow. {EXTRA}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}: the column `{twice}` is there twice. Remove one.")
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        words = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"{path}: not a Parquet file that can be read ({words}). Write it again, or give JSON lines."
        ) from None


def hub_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of `hf:NAME[@CONFIG][:SPLIT]`. NAME is a folder that `save_to_disk` wrote, or what `datasets.load_dataset` takes.

    Raises:
        DataError: there is no such data set, configuration or split, it cannot be read, or the package is missing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: this needs the package datasets. {EXTRA}") from None
    name, config, split = hub_parts(path)
    try:
        data = _opened(datasets, name, config, split)
        if isinstance(data, datasets.DatasetDict):
            if split not in data and (split or "train" not in data):
                raise DataError(f"{path}: there is no split `{split or 'train'}`. It has {', '.join(data)}.")
            data = data[split or "train"]
        elif split and "[" not in split:
            raise DataError(f"{path}: has no splits. Write `{HUB}{name}`.")
        yield from data
    except DataError:
        raise
    except Exception as error:  # the hub's client raises what it likes; all of it means that it cannot be read
        cause = error.__cause__ or error  # where the package only says that there was one
        said = f"{type(cause).__name__}: {' '.join(str(cause).split()):.500}"
        raise DataError(
            f"{path}: cannot be read ({said}). One of several configurations is named as "
            f"`{HUB}NAME@CONFIG[:SPLIT]`. Without a network, save the data set with `save_to_disk` where there is one, and name that "
            f"folder: `{HUB}FOLDER[:SPLIT]`."
        ) from error


def _opened(datasets: Any, name: str, config: str, split: str) -> Any:
    """A data set, or its splits by name; of a split with a part, such as `train[:100]`, that part."""
    if not config and any((Path(name) / file).is_file() for file in SAVED):
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, config or None, split=split if "[" in split else None)
