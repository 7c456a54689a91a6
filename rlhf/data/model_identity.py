"""Which model a folder holds: a digest that tells it from any other, cheap enough to be taken at every start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

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
    of 64 KiB are read.

    Args:
        path: a model folder, or a hub name; None is returned for a name of which this machine has no copy.
    """
    folder = _folder(path)
    if folder is None:
        return None
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


def _folder(path: str) -> Path | None:
    if os.path.isdir(path):
        return Path(path) if os.path.isfile(os.path.join(path, "config.json")) else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
