"""The folder that a reward model's training leaves: model, report, reliability diagram, and how it was trained; put in place at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlhf.config import MissingPackageError
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.data.assets import resolve
from rlhf.reward.models import RewardModel
from rlhf.reward.training.calibration import Bin, draw_reliability
from rlhf.reward.training.journal import keep_with, training_folder
from rlhf.tracking.provenance import write_provenance

REPORT = "reward_report.json"
DIAGRAM = "reliability.png"


def save(model: RewardModel, report: dict[str, Any], bins: list[Bin], settings: RewardTrainingSettings) -> None:
    """Write a temporary folder beside `run.dir`, then put it in place. What a training wrote down is kept, its checkpoints are deleted."""
    output = Path(settings.run.dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".reward-") as temporary:
        folder = Path(temporary) / "model"
        model.save(folder)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        try:
            draw_reliability(bins, folder / DIAGRAM)
        except MissingPackageError as error:
            print(f"not drawn: {error}", file=sys.stderr)
        if settings.training.method == "full":
            keep_with(folder, training_folder(output))
        else:
            write_provenance(folder, settings, False, resolve)
        if output.exists():
            shutil.move(str(output), Path(temporary) / "old")
        os.rename(folder, output)
    if settings.training.method == "full":
        shutil.rmtree(training_folder(output), ignore_errors=True)
