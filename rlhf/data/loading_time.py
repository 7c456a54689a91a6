"""`cluster.startup_deadline_s: auto`: how long an actor may take to start, by the size of what it loads.

    600 s + 10 s for each GB of the largest model's weight files, and 10 s more for each GB that must be fetched first

That is 100 MB/s from a disk or a hub, either far below what is usual, and ten minutes for everything that does not grow with
the model: imports, compilation, the capture of graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rlhf.config.settings import Settings
from rlhf.config.sft import SftSettings
from rlhf.data.model_folder import FolderError, find_model
from rlhf.data.weight_files import INDEX, PICKLED, SINGLE

Tree = TypeVar("Tree", Settings, SftSettings)

BASE_S = 600.0
S_PER_GB = 10.0
ONE_FILE = 5e9
"""Bytes; assumed of a model that is not here yet and whose weights have no index, so that they are one file."""


@dataclass(frozen=True)
class Weights:
    """The weight files of a model: their bytes, and whether some of them are still to be fetched."""

    nbytes: float
    fetched: bool = False


def startup_deadline_s(models: Iterable[Weights]) -> float:
    """The formula above, rounded up to whole seconds."""
    passes = (one.nbytes / 1e9 * (2 if one.fetched else 1) for one in models)
    return float(-(-(BASE_S + S_PER_GB * max(passes, default=0.0)) // 1))


def with_startup_deadline(settings: Tree) -> Tree:
    """The settings with a number for `auto`. Of a hub's model only small files are fetched, which its loading needs too."""
    if settings.cluster.startup_deadline_s != "auto":
        return settings
    deadline = startup_deadline_s(weights(name) for name in _models(settings))
    return settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"startup_deadline_s": deadline})})


def _models(settings: Settings | SftSettings) -> set[str]:
    """All that some actor loads, by folder or name."""
    if isinstance(settings, SftSettings):
        return {settings.policy.model}
    critic = getattr(settings.algorithm, "critic_model", None)
    named = [settings.policy.model, critic, *(source.model for _, source in settings.reward.sources())]
    return {name for name in named if name is not None}


def weights(name: str) -> Weights:
    """Of a folder, an asset or a hub's model. Nothing (0 bytes) of what is none: who loads it says so."""
    try:
        return weights_in(Path(find_model(name, "", weights=False)))
    except FolderError:
        return Weights(0)


def weights_in(folder: Path) -> Weights:
    """Of a model's folder, or of what a hub's cache holds of it."""
    for name in (INDEX, PICKLED[1]):
        if (folder / name).is_file():
            try:
                index = json.loads((folder / name).read_text(encoding="utf-8"))
                files = [folder / str(file) for file in set(index["weight_map"].values())]
                total = float(index.get("metadata", {}).get("total_size", 0))
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # not what it should be
                return Weights(0)
            there = [file.stat().st_size for file in files if file.is_file()]
            return Weights(max(sum(there), total), len(there) < len(files))
    single = [folder / SINGLE, folder / PICKLED[0], *folder.glob("*.gguf")]
    there = [file.stat().st_size for file in single if file.is_file()]
    return Weights(max(there)) if there else Weights(ONE_FILE, fetched=True)
