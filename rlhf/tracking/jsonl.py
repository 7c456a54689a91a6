"""JSON-lines files that survive crashes: written line by line, read with a torn last line, cut back on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """`value` for strict JSON: NaN and infinities inside lists and mappings become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of the file, in order; lines torn by a crash or a full disk are left out. No file: no lines."""
    return list(each(path))


def each(path: Path) -> Iterator[dict[str, Any]]:
    """The same one by one, for files that may be large."""
    if not path.exists():
        return
    # Only "\n" ends a line: a response may hold what str.splitlines takes for another end, such as U+2028.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


class JsonLines:
    """One growing file. Opens, writes and closes each time, so that no line is lost when the process is killed."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line. Raises as `extend`."""
        self.extend([line])

    def extend(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines, all at once.

        Raises:
            OSError: they could not be written whole (disk full, folder gone).
        """
        texts = [json.dumps(finite(line), ensure_ascii=False, allow_nan=False, default=str) + "\n" for line in lines]
        with self.path.open("ab") as file:
            file.write(self._border() + "".join(texts).encode())

    def keep(self, last_step: int) -> None:
        """Cut off the lines of steps after `last_step`, and torn ones. Atomic: a crash leaves the old or new file."""
        if not self.path.exists():
            return
        kept = (line for line in each(self.path) if line.get("step", 0) <= last_step)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _border(self) -> bytes:
        """A newline if the file ends in a torn line, so that the next one is whole."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return b""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"
