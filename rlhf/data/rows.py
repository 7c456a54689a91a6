"""JSON lines: one object a line, with the place of each for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.data.errors import DataError


def read_rows(path: str, missing: str, wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`FILE:LINE` and the object of each line that is not blank.

    Args:
        missing: what to do if there is no such file.
        wanted: what each object has, in words.

    Raises:
        DataError: no such file, or a line that is no JSON object.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file. {missing}")
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error}. Each line must be one JSON object.") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a {type(row).__name__}, not an object with {wanted}")
            yield where, row
