"""Whence a run came, in its folder: `config.yaml`, the resolved settings, and `manifest.json`, the facts of each start."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from rlhf.config import show
from rlhf.tracking import manifest
from rlhf.tracking.folder import MANIFEST

CONFIG = "config.yaml"


def write_provenance(folder: Path, settings: manifest.Described, resume: bool, resolve: Callable[[str], str]) -> str:
    """Write config.yaml, then manifest.json: last, because it marks the folder as holding a run.

    Args:
        resume: the folder holds the run that goes on; another configuration of an earlier start is kept beside it.
        resolve: turns a data path of the settings into a file (for the data hashes).

    Returns:
        The run's id: 8 hexadecimal digits made when the folder was created; a resumed run keeps them.

    Raises:
        OSError: a file could not be written.
    """
    facts = manifest.describe(settings, resolve)
    config, manifest_file = folder / CONFIG, folder / MANIFEST
    text = show(settings)
    if resume:
        described = json.loads(manifest_file.read_text())
        described["resumed"].append(facts)
        if config.exists() and config.read_text() != text:
            shutil.copyfile(config, folder / f"config.before-resume-{len(described['resumed'])}.yaml")
    else:
        described = {"run_id": uuid.uuid4().hex[:8]} | facts | {"resumed": []}
    write_whole(config, text)
    write_whole(manifest_file, json.dumps(described, indent=2) + "\n")
    return described["run_id"]


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, sees the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
