"""Which model a folder holds: a digest that tells it from any other, cheap enough to be taken at every start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rlhf.data.model_folder import commit_of

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
BLOCK = 1 << 16
"""Bytes of one sample."""
BLOCKS = 64
"""Samples of each file, from its beginning (where a safetensors file has its header) to its end."""
WRITERS = ("_name_or_path", "transformers_version")
"""Keys of config.json that say who wrote it, and not what is in it."""


def model_digest(path: str) -> str | None:
    """A hash of the configuration, and of the sizes and samples of the weights; 16 hexadecimal digits.

    Models of one architecture with other weights differ. Weights that differ in a small part only may not: of a large file 64 pieces
    of 64 KiB are read. Of a model in a hub's cache, whose weights may not have been fetched yet, the commit says which it is.

    Args:
        path: a model folder; None is returned for one without a configuration.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return None
    commit = commit_of(folder)
    if commit is not None:
        return hashlib.sha256(commit.encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps({key: config[key] for key in sorted(config) if key not in WRITERS}).encode())
    for file in sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        last = max(0, size - BLOCK)
        with file.open("rb") as stream:
            for place in sorted({last * number // (BLOCKS - 1) for number in range(BLOCKS)}):
                stream.seek(place)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]
