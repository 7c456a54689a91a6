"""The plan of a reward model's training in words, for `rlhf reward train ... --dry-run`. Reads settings and rows; loads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rlhf.cluster import uses_gpu
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.data.model_folder import read_config
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.journal import training_folder
from rlhf.reward.training.preparing import BASE, Prepared, prepare


def describe_reward_training(settings: RewardTrainingSettings, resume: bool = False) -> str:
    """The plan, after everything that can be validated without weights has been.

    Args:
        resume: the training that was ended goes on.

    Raises:
        UserError: the training cannot work as configured.
    """
    prepared = prepare(settings, resume)
    parts = {
        "Folder": _folder(settings, resume),
        "Rows": _rows(settings, prepared),
        "Training": _training(settings, prepared),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts.items())


def _folder(settings: RewardTrainingSettings, resume: bool) -> Iterator[str]:
    folder = os.path.abspath(settings.run.dir)
    replaced = "; the reward model there is replaced" if os.path.isdir(folder) and os.listdir(folder) else ""
    yield f"{folder}; seed {settings.run.seed}{replaced}"
    if settings.training.method == "full":
        every = settings.checkpoint.every
        yield f"checkpoints: {f'every {every} optimizer steps' if every else 'never'}, in {training_folder(folder)}"
    if resume:
        yield "the training goes on from the last checkpoint"


def _rows(settings: RewardTrainingSettings, prepared: Prepared) -> Iterator[str]:
    data = settings.data
    yield f"{data.train}: {_kind(prepared.fit)}"
    held_out = f"of {data.test}" if data.test is not None else "held out"
    yield (
        f"{prepared.fit.n_rows:,} rows to learn from, {prepared.validation.n_rows:,} for validation, {prepared.test.n_rows:,} {held_out} "
        "to test on, less those that the model cannot read"
    )


def _kind(data: PreferenceData) -> str:
    prompts = "whole conversations" if data.input == "conversation" else "responses without prompts"
    if data.ratings is None:
        return f"pairs of {prompts}"
    return f"{prompts}, rated as {', '.join(data.names)}"


def _training(settings: RewardTrainingSettings, prepared: Prepared) -> Iterator[str]:
    fit, choice = settings.training, prepared.choice
    config = read_config(prepared.base, BASE)
    what = "a classifier already" if prepared.ready_made else "with a new head"
    yield f"{settings.model.path}, {config.model_type}, {what}"
    if fit.method != "full":
        yield f"a {fit.method} head on the frozen encoder"
        return
    does = "compares two responses" if choice.description.compares else "scores"
    yield f"all weights, with the objective {choice.name}; the model {does}"
    yield (
        f"{fit.epochs} epoch(s), {fit.batch_size} texts per optimizer step, learning rate {fit.learning_rate:g}, on {fit.ranks} rank(s) on "
        f"{'GPU' if uses_gpu(settings.cluster) else 'CPU'} in {settings.model.dtype}, ZeRO stage {fit.zero_stage}"
    )
