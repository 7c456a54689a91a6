"""The files of a training under way: `DIR.training` beside the folder of the model, until that is complete.

Owns what lies there besides the checkpoints: `config.yaml` and `manifest.json` as in the folder of any run, `metrics.jsonl`,
`evaluations.jsonl`, and what the ranks hand over at the start and at the end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.data.assets import resolve
from rlhf.reward.errors import RewardError
from rlhf.tracking.folder import MANIFEST
from rlhf.tracking.jsonl import JsonLines, read
from rlhf.tracking.provenance import CONFIG, write_provenance

METRICS = ("metrics.jsonl", "evaluations.jsonl")
START, WEIGHTS, OBJECTIVE = "start.safetensors", "weights.safetensors", "objective.pt"
"""What the ranks start from, and what they hand back."""
KEPT = ("*.jsonl", "*.yaml", MANIFEST)
"""Files of a training that are kept with the model."""


def training_folder(output: str | Path) -> Path:
    """Where a training under way keeps its metrics and checkpoints: `OUTPUT.training`."""
    output = Path(output)
    return output.with_name(f"{output.name}.training")


def require_training(folder: Path) -> None:
    """Raises RewardError if no training to resume is there."""
    if not folder.is_dir():
        raise RewardError(f"--resume: there is no training to go on with in {folder}. Leave it out to start one.")


def keep_with(model: Path, training: Path) -> None:
    """Copy into a model's folder what its training wrote down."""
    for pattern in KEPT:
        for path in training.glob(pattern):
            shutil.copyfile(path, model / path.name)


class Journal:
    """What happens, on disk first, and a line on the terminal now and then.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path, settings: RewardTrainingSettings, updates: int, resume: bool):
        """Open the files of a training.

        Args:
            updates: optimizer steps of the whole training.
            resume: go on with the training that is there; otherwise what an earlier one left is deleted.

        Raises:
            RewardError: there is none to go on with, or the folder holds files of somebody else's.
        """
        if resume:
            require_training(folder)
        else:
            _empty(folder)
        write_provenance(folder, settings, resume and (folder / MANIFEST).is_file(), resolve)
        self.folder = folder
        self._metrics, self._evaluations = (JsonLines(folder / name) for name in METRICS)
        self._updates, self._shown = updates, max(1, updates // 5)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.append({"step": step, "time": round(time.time(), 3)} | dict(metrics))
        if step % self._shown == 0:
            print(f"step {step} of {self._updates}, loss {np.mean(self._losses()[-20:]):.3f}", flush=True)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evaluations.append({"step": step, "time": round(time.time(), 3)} | dict(metrics))

    def rewind(self, step: int) -> None:
        for file in (self._metrics, self._evaluations):
            file.keep(step)

    def final_loss(self) -> float:
        """The mean of the last tenth of the steps that had anything to learn from."""
        losses = self._losses()
        return float(np.mean(losses[-max(1, len(losses) // 10) :]))

    def _losses(self) -> list[float]:
        return [line["train/loss"] for line in read(self._metrics.path) if "train/loss" in line]


def _empty(folder: Path) -> None:
    """Make way for a new training: what an earlier one left goes, anything else is not ours to delete."""
    if folder.exists():
        own = {*METRICS, WEIGHTS, OBJECTIVE, START, MANIFEST, CONFIG, "checkpoints"}
        others = {
            path.name
            for path in folder.iterdir()
            if path.suffix != ".tmp" and not path.match("config.before-resume-*.yaml")
        } - own
        if others:
            raise RewardError(
                f"{folder} is needed for the training's own files, but it holds {min(others)}. Move it away."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
