"""`rlhf reward train`: fit a reward or preference model to human preferences, measure it on held-out texts, and save both.

Owns the order of things. What is trained on what is known from `preparing`; the training is in `heads` (frozen encoder) and `finetune` (all
weights), the figures in `report`, the folder's files in `saving`.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from rlhf.config.reward_training import FitSettings, OutputSettings, PreferenceDataSettings, RewardTrainingSettings
from rlhf.reward.models import RewardModel, new_model
from rlhf.reward.modules import CumulativeLogits
from rlhf.reward.training import choices
from rlhf.reward.training.calibration import fit_temperature
from rlhf.reward.training.dataset import Pairs, PreferenceData
from rlhf.reward.training.heads import LinearHead, fit_logistic, fit_ridge
from rlhf.reward.training.journal import training_folder
from rlhf.reward.training.objectives import MultiObjective
from rlhf.reward.training.preparing import Prepared, prepare
from rlhf.reward.training.readable import readable_pairs, readable_rows
from rlhf.reward.training.report import measure, pair_logits
from rlhf.reward.training.saving import save

TRAIN_PAIRS = 100_000
TEST_PAIRS = 200_000
TEST_COMPARISONS = 2_000
"""A cross-encoder reads each pair twice; others read each text once."""
LOOKED_AT = 1000
"""Pairs of which one at least must be readable."""


def train(settings: RewardTrainingSettings, resume: bool = False) -> None:
    """Train, measure, save, print.

    Args:
        resume: go on from the last checkpoint of the same training.

    Raises:
        UserError: the data or the model cannot be used, or a loss is not finite.
    """
    begun = time.monotonic()
    torch.set_num_threads(settings.cluster.threads or len(os.sched_getaffinity(0)))
    prepared = prepare(settings, resume)
    choice, rng = prepared.choice, prepared.rng
    fit, validation, test = prepared.fit, prepared.validation, prepared.test
    data: PreferenceDataSettings = settings.data
    limit = TEST_COMPARISONS if choice.name == "cross-encoder" else TEST_PAIRS
    model = _new_model(settings, prepared)
    lost: dict[str, int] = {}
    if choice.name != "cross-encoder":  # that one reads two responses at once: its pairs are looked at
        fit, lost = readable_rows(model, fit, "training")
        validation, test = (readable_rows(model, *part)[0] for part in ((validation, "validation"), (test, "test")))
    validation_pairs = readable_pairs(model, validation, data.margin, min(limit, TRAIN_PAIRS), rng, "validation")
    test_pairs = readable_pairs(model, test, data.margin, limit, rng, "test")
    if settings.training.method == "full":
        details = _train_full(model, replace(prepared, fit=fit, validation=validation), settings, resume)
    else:
        details = _train_head(model, fit, validation, validation_pairs, settings, rng)
    temperature = _temperature(model, validation, validation_pairs)
    model.description = replace(model.description, temperature=temperature)
    figures, bins = measure(model, test, test_pairs)
    report = {
        "method": settings.training.method,
        **lost,
        **details,
        "max_tokens": model.description.max_tokens,
        "units": "rating" if choice.in_rating_units else "log-odds of winning a pair, arbitrary zero",
        "pair_probability": "sigmoid(preference / temperature), the mean of both orders; temperature fitted on the validation rows",
        "temperature": temperature,
        "rows": {"fit": fit.n_rows, "validation": validation.n_rows, "test": test.n_rows},
        "margin": data.margin,
        "seed": settings.run.seed,
        "test": figures,
        "reliability": [asdict(b) for b in bins],
        "seconds": round(time.monotonic() - begun, 1),
    }
    save(model, report, bins, settings)
    _print(report, settings.run.dir)


def _new_model(settings: RewardTrainingSettings, prepared: Prepared) -> RewardModel:
    device = settings.cluster.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings.run.seed)
    choice, whole = prepared.choice, settings.training.method == "full"
    return new_model(prepared.base, choice.description, choice.head_outputs, device, whole=whole)


def _train_head(
    model: RewardModel,
    fit: PreferenceData,
    validation: PreferenceData,
    validation_pairs: Pairs,
    settings: RewardTrainingSettings,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Fit the head on features computed once; the encoder stays as it is."""
    features = model.run(model.module.features, fit.examples)
    held_out = model.run(model.module.features, validation.examples)
    head: LinearHead
    if settings.training.method == "ridge":
        head = fit_ridge(features, fit.overall, held_out, validation.overall)
    else:
        pairs = readable_pairs(model, fit, settings.data.margin, TRAIN_PAIRS, rng, "training")
        head = fit_logistic(features, pairs.index, held_out, validation_pairs.index)
    with torch.no_grad():
        model.module.head.weight.copy_(torch.from_numpy(head.weight)[None])
        model.module.head.bias.fill_(head.bias)
    return {"regularisation": head.strength, "validation_loss": head.validation_loss}


def _train_full(
    model: RewardModel, prepared: Prepared, settings: RewardTrainingSettings, resume: bool
) -> dict[str, Any]:
    from rlhf.reward.training.finetune import fine_tune  # loads DeepSpeed, which the frozen methods do not need

    choice, head, scorer = prepared.choice, model.module.head, model.module
    new_head, run = not prepared.ready_made, settings.run
    if choice.start is not None and new_head and head.bias is not None:
        with torch.no_grad():
            head.bias.copy_(torch.tensor(choice.start))
    if choice.thresholds is not None:
        model.module = CumulativeLogits(scorer, torch.tensor(choice.thresholds)).to(model.device)
    data, lost = _as_needed(model, choice, prepared.fit, settings, prepared.rng, "training")
    held_out = None
    training: FitSettings = settings.training
    if training.eval_every:
        rng = np.random.default_rng(run.seed)
        held_out, _ = _as_needed(model, choice, prepared.validation, settings, rng, "validation")
    folder = training_folder(run.dir)
    loss = fine_tune(
        model, data, choice.objective, settings, folder, new_head=new_head, resume=resume, held_out=held_out
    )
    details: dict[str, Any] = {
        "objective": choice.name,
        "epochs": training.epochs,
        "final_loss": loss,
        **lost,
    }
    if isinstance(model.module, CumulativeLogits):
        thresholds = tuple(model.module.thresholds().tolist())
        model.module, model.description = scorer, replace(model.description, thresholds=thresholds)
    if isinstance(choice.objective, MultiObjective):
        shares = (choice.objective.weights / choice.objective.outputs).tolist()
        details["gradient_weights"] = dict(zip(prepared.fit.names, shares, strict=True))
    return details


def _as_needed(
    model: RewardModel,
    choice: choices.Choice,
    data: PreferenceData,
    settings: RewardTrainingSettings,
    rng: np.random.Generator,
    part: str,
) -> tuple[PreferenceData, dict[str, int]]:
    """The rows as the objective needs them; for a model that reads two responses in one text, those that it can read, and what is lost."""
    run: OutputSettings = settings.run
    if choice.name not in choices.NEEDS_RATINGS:
        readable_pairs(model, data, settings.data.margin, LOOKED_AT, np.random.default_rng(run.seed), part)
    made = choice.prepare(data, rng)
    return readable_rows(model, made, part) if choice.name == "cross-encoder" else (made, {})


def _temperature(model: RewardModel, data: PreferenceData, pairs: Pairs) -> float:
    logits = pair_logits(model, data, pairs.index)
    return fit_temperature(logits.ravel(), np.repeat(pairs.probabilities, logits.shape[1]))


def _print(report: dict[str, Any], output: str) -> None:
    test = report["test"]
    pearson = f", Pearson {test['pearson']:.3f}" if test.get("pearson") is not None else ""
    print(
        f"held-out pair accuracy {test['pair_accuracy']:.3f} ({test['pairs']} pairs), ECE {test['ece']:.3f}, "
        f"Brier {test['brier']:.3f}{pearson}; {report['seconds']:g} s; saved in {output}",
        flush=True,
    )
