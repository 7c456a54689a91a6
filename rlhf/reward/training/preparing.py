"""What is known of a reward model's training before weights are loaded: the rows, how they are divided, and what is trained on them.

The training and its dry run both begin here, so what one refuses, the other does. Reads files; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf.config.arguments import unwritable
from rlhf.config.reward_training import OutputSettings, PreferenceDataSettings, RewardTrainingSettings
from rlhf.config.reward_training_flags import both
from rlhf.data.assets import resolve
from rlhf.data.model_folder import find_model
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import DESCRIPTION, is_classifier, read_base
from rlhf.reward.training import choices
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.journal import require_training, training_folder
from rlhf.reward.training.reader import read_data

BASE = both("model.path")
TEST_FRACTION = 0.2
"""Of the training rows, where there are no others to test on."""


@dataclass(frozen=True)
class Prepared:
    """A training that can begin.

    Attributes:
        base: folder of the model that is trained.
        ready_made: the base is a classifier already, so that its head has a scale of its own.
        fit, validation, test: rows to learn from, to choose regularisation and temperature by, and to measure on.
        rng: draws the pairs; it has divided the rows.
    """

    base: Path
    ready_made: bool
    choice: choices.Choice
    fit: PreferenceData
    validation: PreferenceData
    test: PreferenceData
    rng: np.random.Generator


def prepare(settings: RewardTrainingSettings, resume: bool) -> Prepared:
    """Look at everything that the training needs.

    Raises:
        UserError: the folder, the data or the model cannot be used.
    """
    _check_output(settings.run)
    _check_resume(settings, resume)
    if settings.cluster.device == "cuda" and not torch.cuda.is_available():
        raise RewardError(
            f"{both('cluster.device')}: cuda, and this machine shows no GPU. Leave it out, or set it to cpu."
        )
    run: OutputSettings = settings.run
    source: PreferenceDataSettings = settings.data
    rng = np.random.default_rng(run.seed)
    data = choices.weighted(settings.objective, read_data(resolve(source.train), source.columns))
    base = Path(find_model(settings.model.path, BASE))
    ready_made = settings.training.method == "full" and is_classifier(read_base(base, BASE)[0])
    choices.check(settings, data, ready_made)
    if source.test is not None:
        test = choices.weighted(settings.objective, read_data(resolve(source.test), source.columns))
        _check_test(source.train, source.test, data, test)
    else:
        data, test = data.divide(TEST_FRACTION, rng)
    fit, validation = data.divide(source.validation, rng)
    return Prepared(base, ready_made, choices.choose(settings, fit, ready_made), fit, validation, test, rng)


def _check_output(run: OutputSettings) -> None:
    folder = Path(run.dir)
    if folder.exists() and not (folder / DESCRIPTION).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RewardError(
            f"{both('run.dir')}: {folder} exists and is not a reward model; name another folder, or remove it."
        )
    problem = None if folder.is_dir() else unwritable(run.dir, make_folder=True)
    if problem is not None:
        raise RewardError(f"{both('run.dir')}: {problem}.")


def _check_resume(settings: RewardTrainingSettings, resume: bool) -> None:
    if not resume:
        return
    if settings.training.method != "full":
        raise RewardError(
            f"--resume: a head on a frozen encoder ({settings.training.method}) is fitted in one go. Leave it out, or use --method full."
        )
    if settings.checkpoint.every == 0:
        raise RewardError(
            f"--resume goes on from a checkpoint; give the {both('checkpoint.every')} of the training that ended."
        )
    require_training(training_folder(settings.run.dir))


def _check_test(train: str, held_out: str, data: PreferenceData, test: PreferenceData) -> None:
    if test.input != data.input:
        raise RewardError(f"{held_out} and {train}: give the field `prompt` in both files or in neither.")
    if test.ratings is not None and data.ratings is not None and set(test.names) != set(data.names):
        raise RewardError(
            f"{held_out} rates {', '.join(test.names)}, but {train} {', '.join(data.names)}. Give both the same ratings."
        )
