"""`rlhf reward train`: fit a reward or preference model on what people said of texts, measure it on held-out texts, and save both.

Owns the command: the order of things. What the options mean together is in `choices` and `group`, the training in `heads` (frozen
encoder) and `finetune` (all weights), the figures in `report`, the folder format in `models`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.config import MissingPackageError
from rlhf.config.arguments import count, named, output_folder, real, whole
from rlhf.data.assets import resolve
from rlhf.data.model_folder import find_model
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import DESCRIPTION, is_classifier, read_base
from rlhf.reward.models import BASE, RewardModel, new_model
from rlhf.reward.modules import CumulativeLogits
from rlhf.reward.reading import Tokens
from rlhf.reward.training import choices
from rlhf.reward.training.dataset import Pairs, PreferenceData, read_data
from rlhf.reward.training.group import Group, read_group, training_folder
from rlhf.reward.training.group import add_arguments as add_group_arguments
from rlhf.reward.training.heads import LinearHead, fit_logistic, fit_ridge
from rlhf.reward.training.objectives import MultiObjective
from rlhf.reward.training.reliability import Bin, draw_reliability, fit_temperature
from rlhf.reward.training.report import measure, pair_logits, readable, unreadable
from rlhf.types import Failed

REPORT = "reward_report.json"
DIAGRAM = "reliability.png"
TRAIN_PAIRS = 100_000
TEST_PAIRS = 200_000
TEST_COMPARISONS = 2_000
"""A cross-encoder reads each pair twice; others read each text once."""
TEST_FRACTION = 0.2
LOOKED_AT = 1000
"""Pairs of which one at least must be readable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf reward train`."""
    parser.add_argument(
        "--model",
        required=True,
        type=named,
        help="folder or asset: name of the encoder, language model or sequence classifier",
    )
    parser.add_argument(
        "--train",
        required=True,
        type=named,
        help="JSONL, Parquet or hf:NAME[@CONFIG][:SPLIT] with `text` and `rating` (or `ratings`), or `chosen` and `rejected`, or "
        "`responses`, best first; and perhaps `prompt`",
    )
    parser.add_argument(
        "--columns",
        type=_column,
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="names for the data's columns, such as chosen=better rating=scores.overall; NAME= leaves a column out",
    )
    parser.add_argument("--test", type=named, help="held-out data; default: a fifth of the training rows is held out")
    parser.add_argument(
        "--output",
        required=True,
        type=output_folder,
        help="folder to write; an older reward model there is replaced",
    )
    parser.add_argument(
        "--method",
        choices=("ridge", "logistic", "full"),
        default="ridge",
        help="frozen encoder with a ridge head (ratings) or a logistic head (pairs); full: all weights",
    )
    choices.add_arguments(parser)
    parser.add_argument("--margin", type=real(0), default=0.5, help="ratings further apart than this make a pair")
    parser.add_argument(
        "--validation",
        type=real(0, 1, above=True, below=True),
        default=0.1,
        help="fraction of the training rows that choose strength and temperature",
    )
    parser.add_argument(
        "--max-tokens",
        type=count,
        help="of a longer text the prompt loses its beginning; a longer response is left out (default: what the model reads)",
    )
    parser.add_argument("--epochs", type=count, default=1, help="of --method full")
    parser.add_argument(
        "--learning-rate",
        type=real(0, 100, above=True),
        default=2e-4,
        help="peak, of --method full; a large model wants 1e-5",
    )
    parser.add_argument("--batch-size", type=count, default=32, help="texts per step of --method full")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the division into parts, of pairs and of training")
    parser.add_argument("--threads", type=whole(1, 4096), help="CPU threads; default: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_group_arguments(parser)


def _column(text: str) -> tuple[str, str | None]:
    """An entry of `--columns`."""
    name, equals, column = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=COLUMN, such as chosen=better")
    return name, column or None


def main(args: argparse.Namespace) -> int:
    """Train, measure, save, print. Returns 0.

    Raises:
        RewardError: the data or the model cannot be used.
    """
    begun = time.monotonic()
    _check_output(Path(args.output))
    _check_device(args.device)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(args.seed)
    columns = dict(args.columns)
    data = choices.weighted(args, read_data(resolve(args.train), columns))
    choices.check(args, data, _ready_made(args))
    group = read_group(args)
    if args.test:
        test = choices.weighted(args, read_data(resolve(args.test), columns))
        _check_test(args, data, test)
    else:
        data, test = data.divide(TEST_FRACTION, rng)
    fit, validation = data.divide(args.validation, rng)
    choice = choices.choose(args, fit, _ready_made(args))
    limit = TEST_COMPARISONS if choice.name == "cross-encoder" else TEST_PAIRS
    model = _new_model(args, choice)
    lost: dict[str, int] = {}
    if choice.name != "cross-encoder":  # that one reads two responses at once: its pairs are looked at
        fit, lost = _readable_rows(model, fit, "training")
        validation, test = (_readable_rows(model, *part)[0] for part in ((validation, "validation"), (test, "test")))
    validation_pairs = _pairs(model, validation, args, min(limit, TRAIN_PAIRS), rng, "validation")
    test_pairs = _pairs(model, test, args, limit, rng, "test")
    if args.method == "full":
        details = _train_full(model, choice, fit, validation, args, group, rng)
    else:
        details = _train_head(model, fit, validation, validation_pairs, args, rng)
    temperature = _temperature(model, validation, validation_pairs)
    model.description = replace(model.description, temperature=temperature)
    figures, bins = measure(model, test, test_pairs)
    report = {
        "method": args.method,
        **lost,
        **details,
        "max_tokens": model.description.max_tokens,
        "units": "rating" if choice.in_rating_units else "log-odds of winning a pair, arbitrary zero",
        "pair_probability": "sigmoid(preference / temperature), the mean of both orders; temperature fitted on the validation rows",
        "temperature": temperature,
        "rows": {"fit": fit.n_rows, "validation": validation.n_rows, "test": test.n_rows},
        "margin": args.margin,
        "seed": args.seed,
        "test": figures,
        "reliability": [asdict(b) for b in bins],
        "seconds": round(time.monotonic() - begun, 1),
    }
    _save(model, report, bins, Path(args.output), training_folder(args.output) if args.method == "full" else None)
    _print(report, args.output)
    return 0


def _check_output(folder: Path) -> None:
    if folder.exists() and not (folder / DESCRIPTION).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RewardError(f"--output {folder} exists and is not a reward model; name another folder, or remove it.")


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise RewardError("--device cuda: this machine shows no GPU. Leave it out, or use --device cpu.")


def _check_test(args: argparse.Namespace, data: PreferenceData, test: PreferenceData) -> None:
    if test.input != data.input:
        raise RewardError(f"{args.test} and {args.train}: give the field `prompt` in both files or in neither.")
    if test.ratings is not None and data.ratings is not None and set(test.names) != set(data.names):
        raise RewardError(
            f"{args.test} rates {', '.join(test.names)}, but {args.train} {', '.join(data.names)}. Give both the same ratings."
        )


def _pairs(
    model: RewardModel, data: PreferenceData, args: argparse.Namespace, limit: int, rng: np.random.Generator, part: str
) -> Pairs:
    """Pairs of a part of the rows that the model can be asked about."""
    pairs = data.drawn_pairs(args.margin, limit, rng)
    if not len(pairs.index):
        raise RewardError(
            f"no two ratings of the {data.n_rows} {part} rows are more than --margin {args.margin} apart."
        )
    fitting = readable(model, data, pairs)
    if not len(fitting.index):
        raise RewardError(
            f"none of the {len(pairs.index)} {part} pairs fits into the {model.description.max_tokens} tokens that the model reads "
            "(--max-tokens, or its own): a cross-encoder reads both responses, and must not lose one. Raise it, or choose another "
            "--objective."
        )
    return fitting


def _readable_rows(model: RewardModel, data: PreferenceData, part: str) -> tuple[PreferenceData, dict[str, int]]:
    """The rows that the model can read as a judge would; how many texts it cannot, and how many prompts lose their beginning."""
    read = model.encode(data.examples)
    out, cut = unreadable(read), sum(isinstance(one, Tokens) and one.cut > 0 for one in read)
    limit = model.description.max_tokens
    if out.any():
        print(f"{out.sum()} of {len(read)} {part} texts do not fit into {limit} tokens: left out", flush=True)
    if cut:
        print(
            f"{cut} of {len(read)} {part} texts: the prompt loses its beginning to fit into {limit} tokens", flush=True
        )
    kept = data.rows(np.setdiff1d(data.row, data.row[out]))
    if not kept.n_rows:
        why = next(one.reason for one in read if isinstance(one, Failed))
        raise RewardError(f"none of the {data.n_rows} {part} rows can be read: {why}. Raise --max-tokens.")
    return kept, {"texts_too_long": int(out.sum()), "prompts_cut": int(cut)}


def _ready_made(args: argparse.Namespace) -> bool:
    """Whether the base is a classifier already, so that its head has a scale of its own."""
    return args.method == "full" and is_classifier(read_base(Path(find_model(args.model, BASE)), BASE)[0])


def _new_model(args: argparse.Namespace, choice: choices.Choice) -> RewardModel:
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    folder = Path(find_model(args.model, BASE))
    return new_model(folder, choice.description, choice.head_outputs, device, whole=args.method == "full")


def _train_head(
    model: RewardModel,
    fit: PreferenceData,
    validation: PreferenceData,
    validation_pairs: Pairs,
    args: argparse.Namespace,
    rng: np.random.Generator,
) -> dict:
    """Fit the head on features computed once; the encoder stays as it is."""
    features = model.run(model.module.features, fit.examples)
    held_out = model.run(model.module.features, validation.examples)
    head: LinearHead
    if args.method == "ridge":
        head = fit_ridge(features, fit.overall, held_out, validation.overall)
    else:
        pairs = _pairs(model, fit, args, TRAIN_PAIRS, rng, "training")
        head = fit_logistic(features, pairs.index, held_out, validation_pairs.index)
    with torch.no_grad():
        model.module.head.weight.copy_(torch.from_numpy(head.weight)[None])
        model.module.head.bias.fill_(head.bias)
    return {"regularisation": head.strength, "validation_loss": head.validation_loss}


def _train_full(
    model: RewardModel,
    choice: choices.Choice,
    fit: PreferenceData,
    validation: PreferenceData,
    args: argparse.Namespace,
    group: Group,
    rng: np.random.Generator,
) -> dict[str, Any]:
    from rlhf.reward.training.finetune import (  # loads DeepSpeed, which the frozen methods do not need
        FullSettings,
        fine_tune,
    )

    head, scorer = model.module.head, model.module
    new_head = not _ready_made(args)
    if choice.start is not None and new_head and head.bias is not None:
        with torch.no_grad():
            head.bias.copy_(torch.tensor(choice.start))
    if choice.thresholds is not None:
        model.module = CumulativeLogits(scorer, torch.tensor(choice.thresholds)).to(model.device)
    settings = FullSettings(new_head, args.epochs, args.learning_rate, args.batch_size, args.seed, group)
    data, lost = _prepared(model, choice, fit, args, rng, "training")
    held_out = None
    if group.eval_every:
        held_out, _ = _prepared(model, choice, validation, args, np.random.default_rng(args.seed), "validation")
    loss = fine_tune(model, data, choice.objective, settings, training_folder(args.output), held_out)
    details: dict[str, Any] = {
        "objective": choice.name,
        "epochs": args.epochs,
        "final_loss": loss,
        **lost,
    }
    if isinstance(model.module, CumulativeLogits):
        thresholds = tuple(model.module.thresholds().tolist())
        model.module, model.description = scorer, replace(model.description, thresholds=thresholds)
    if isinstance(choice.objective, MultiObjective):
        shares = (choice.objective.weights / choice.objective.outputs).tolist()
        details["gradient_weights"] = dict(zip(fit.names, shares, strict=True))
    return details


def _prepared(
    model: RewardModel,
    choice: choices.Choice,
    data: PreferenceData,
    args: argparse.Namespace,
    rng: np.random.Generator,
    part: str,
) -> tuple[PreferenceData, dict[str, int]]:
    """The rows as the objective needs them; for a model that reads two responses in one text, those that it can read, and what is lost."""
    if choice.name not in choices.NEEDS_RATINGS:
        _pairs(model, data, args, LOOKED_AT, np.random.default_rng(args.seed), part)
    made = choice.prepare(data, rng)
    return _readable_rows(model, made, part) if choice.name == "cross-encoder" else (made, {})


def _temperature(model: RewardModel, data: PreferenceData, pairs: Pairs) -> float:
    logits = pair_logits(model, data, pairs.index)
    return fit_temperature(logits.ravel(), np.repeat(pairs.probabilities, logits.shape[1]))


def _save(model: RewardModel, report: dict, bins: list[Bin], output: Path, training: Path | None) -> None:
    """Write model and report to a temporary folder beside `output`, then put it in place at once.

    Args:
        training: files of the training (`training_folder`); its metrics are kept with the model, its checkpoints are deleted.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".reward-") as temporary:
        folder = Path(temporary) / "model"
        model.save(folder)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        try:
            draw_reliability(bins, folder / DIAGRAM)
        except MissingPackageError as error:
            print(f"not drawn: {error}", file=sys.stderr)
        if training is not None:
            for metrics in training.glob("*.jsonl"):
                shutil.copyfile(metrics, folder / metrics.name)
        if output.exists():
            shutil.move(str(output), Path(temporary) / "old")
        os.rename(folder, output)
    if training is not None:
        shutil.rmtree(training, ignore_errors=True)


def _print(report: dict, output: str) -> None:
    test = report["test"]
    pearson = f", Pearson {test['pearson']:.3f}" if test.get("pearson") is not None else ""
    print(
        f"held-out pair accuracy {test['pair_accuracy']:.3f} ({test['pairs']} pairs), ECE {test['ece']:.3f}, "
        f"Brier {test['brier']:.3f}{pearson}; {report['seconds']:g} s; saved in {output}",
        flush=True,
    )
