"""`rlhf reward train`: fit a reward model on rated or paired text, measure it on held-out text, and save both.

Owns the command and the report. The numerics are in `heads`, `finetune` and `losses`, the folder format in `models`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlhf.data.assets import resolve
from rlhf.reward import losses
from rlhf.reward.dataset import PreferenceData, read_data
from rlhf.reward.errors import RewardError
from rlhf.reward.finetune import FullSettings, fine_tune
from rlhf.reward.heads import LinearHead, fit_logistic, fit_ridge
from rlhf.reward.models import (
    DESCRIPTION,
    Classifier,
    Description,
    EncoderWithHead,
    RewardModel,
    is_classifier,
    max_tokens,
    read_base,
)

REPORT = "reward_report.json"
ALL_LAYERS_UP_TO = 8192  # features: the hidden states of all layers are used if they are not more than this together
TRAIN_PAIRS = 100_000
TEST_PAIRS = 200_000
TEST_FRACTION = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf reward train`."""
    parser.add_argument(
        "--model", required=True, help="folder or asset: name of the encoder, language model or sequence classifier"
    )
    parser.add_argument(
        "--train",
        required=True,
        help="JSONL with `text` and `rating`, or `chosen` and `rejected`, and perhaps `prompt`",
    )
    parser.add_argument("--test", help="held-out JSONL; default: a fifth of the training rows is held out")
    parser.add_argument("--output", required=True, help="folder to write; an older reward model there is replaced")
    parser.add_argument(
        "--method",
        choices=("ridge", "logistic", "full"),
        default="ridge",
        help="frozen encoder with a ridge head (ratings) or a logistic head (pairs); full: all weights",
    )
    parser.add_argument(
        "--objective",
        choices=("auto", "squared", "bradley-terry"),
        default="auto",
        help="loss of --method full; auto: squared error for ratings, Bradley-Terry for pairs and classifiers",
    )
    parser.add_argument("--margin", type=float, default=0.5, help="ratings further apart than this make a pair")
    parser.add_argument(
        "--validation",
        type=float,
        default=0.1,
        help="fraction of the training rows that choose strength and temperature",
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="texts are cut here")
    parser.add_argument("--epochs", type=int, default=1, help="of --method full")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-4, help="peak, of --method full; a large model wants 1e-5"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts per step of --method full")
    parser.add_argument("--seed", type=int, default=0, help="of the division into parts, of pairs and of training")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def main(args: argparse.Namespace) -> int:
    """Train, measure, save, print. Returns 0.

    Raises:
        RewardError: the data or the model cannot be used.
    """
    begun = time.monotonic()
    _check_output(Path(args.output))
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(args.seed)
    data = read_data(resolve(args.train))
    _check_method(args, data)
    if args.test:
        test = read_data(resolve(args.test))
        if test.input != data.input:
            raise RewardError(f"{args.test} and {args.train}: give the field `prompt` in both files or in neither.")
    else:
        data, test = data.divide(TEST_FRACTION, rng)
    fit, validation = data.divide(args.validation, rng)
    validation_pairs = _pairs(validation, args, TRAIN_PAIRS, rng, "validation")
    test_pairs = _pairs(test, args, TEST_PAIRS, rng, "test")
    model = _new_model(args, data)
    if args.method == "full":
        details = _train_full(model, fit, args)
    else:
        details = _train_head(model, fit, validation, validation_pairs, args, rng)
    rewards = model.score(validation.examples)
    temperature = losses.fit_temperature(rewards[validation_pairs[:, 0]] - rewards[validation_pairs[:, 1]])
    model.description = replace(model.description, temperature=temperature)
    report = {
        "method": args.method,
        **details,
        "units": "rating" if _in_rating_units(args, data) else "log-odds of winning a pair, arbitrary zero",
        "pair_probability": "sigmoid(reward difference / temperature), temperature fitted on the validation rows",
        "temperature": temperature,
        "rows": {"fit": fit.n_rows, "validation": validation.n_rows, "test": test.n_rows},
        "margin": args.margin,
        "seed": args.seed,
        "test": measure(model.score(test.examples), test, test_pairs, temperature),
        "seconds": round(time.monotonic() - begun, 1),
    }
    _save(model, report, Path(args.output))
    _print(report, args.output)
    return 0


def measure(rewards: np.ndarray, data: PreferenceData, pairs: np.ndarray, temperature: float) -> dict[str, float]:
    """How good rewards are on held-out data: pair accuracy (ties count half), ECE, Brier, and Pearson's r.

    Args:
        rewards: [n_examples].
        pairs: [n_pairs, 2], winner first. Every second one is turned round, so that P is not always of the winner.
    """
    gaps = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    won = np.arange(len(pairs)) % 2 == 0
    probabilities = losses.pair_probabilities(np.where(won, gaps, -gaps), temperature)
    result = {
        "pairs": len(pairs),
        "pair_accuracy": float(np.mean((gaps > 0) + 0.5 * (gaps == 0))),
        "ece": losses.expected_calibration_error(probabilities, won),
        "brier": losses.brier(probabilities, won),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }
    if data.ratings is not None and rewards.std() > 0 and data.ratings.std() > 0:
        result["pearson"] = float(np.corrcoef(rewards, data.ratings)[0, 1])
    return result


def _check_output(folder: Path) -> None:
    if folder.exists() and not (folder / DESCRIPTION).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RewardError(f"--output {folder} exists and is not a reward model; name another folder, or remove it.")


def _check_method(args: argparse.Namespace, data: PreferenceData) -> None:
    if data.ratings is None and args.method == "ridge":
        raise RewardError(
            f"--method ridge fits ratings, but {args.train} has pairs. Use --method logistic or --method full."
        )
    if data.ratings is None and args.objective == "squared":
        raise RewardError(
            f"--objective squared fits ratings, but {args.train} has pairs. Use --objective bradley-terry."
        )
    if not 0 < args.validation < 1:
        raise RewardError(f"--validation must be between 0 and 1, not {args.validation}.")
    if data.n_rows < 20:
        raise RewardError(f"{args.train} has {data.n_rows} rows; at least 20 are needed to train, validate and test.")


def _pairs(
    data: PreferenceData, args: argparse.Namespace, limit: int, rng: np.random.Generator, part: str
) -> np.ndarray:
    pairs = data.pairs(args.margin, limit, rng)
    if not len(pairs):
        raise RewardError(
            f"no two ratings of the {data.n_rows} {part} rows are more than --margin {args.margin} apart."
        )
    return pairs


def _in_rating_units(args: argparse.Namespace, data: PreferenceData) -> bool:
    return args.method == "ridge" or (args.method == "full" and _objective(args, data) == "squared")


def _objective(args: argparse.Namespace, data: PreferenceData) -> str:
    if args.objective != "auto":
        return args.objective
    # The head of a ready classifier has its own scale, far from that of the ratings; pairs do not ask for theirs.
    ready_made = is_classifier(read_base(Path(resolve(args.model)))[0])
    return "bradley-terry" if data.ratings is None or ready_made else "squared"


def _new_model(args: argparse.Namespace, data: PreferenceData) -> RewardModel:
    """The base model in fp32 with an untrained head, or a classifier with its own."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = Path(resolve(args.model))
    config, tokenizer = read_base(folder)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    limit = max_tokens(config, tokenizer, args.max_tokens)
    torch.manual_seed(args.seed)
    if is_classifier(config) and args.method == "full":
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, config=config)
        if classifier.config.num_labels > 2:
            raise RewardError(
                f"{folder} is a classifier with {config.num_labels} labels; a reward needs one label, or two."
            )
        return RewardModel(Classifier(classifier), tokenizer, Description("classifier", data.input, limit), device)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    last = encoder.config.num_hidden_layers
    every = args.method != "full" and (last + 1) * encoder.config.hidden_size <= ALL_LAYERS_UP_TO
    layers = tuple(range(last + 1)) if every else (last,)
    # In a causal model only the last token has read the whole text.
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    pooling = "last" if causal else "mean"
    description = Description("encoder_with_head", data.input, limit, layers, pooling)
    return RewardModel(EncoderWithHead(encoder, layers, pooling), tokenizer, description, device)


def _train_head(
    model: RewardModel,
    fit: PreferenceData,
    validation: PreferenceData,
    validation_pairs: np.ndarray,
    args: argparse.Namespace,
    rng: np.random.Generator,
) -> dict:
    """Fit the head on features computed once; the encoder stays as it is."""
    features = model.run(model.module.features, fit.examples)
    held_out = model.run(model.module.features, validation.examples)
    head: LinearHead
    if args.method == "ridge":
        head = fit_ridge(features, fit.ratings, held_out, validation.ratings)
    else:
        pairs = _pairs(fit, args, TRAIN_PAIRS, rng, "training")
        head = fit_logistic(features, pairs, held_out, validation_pairs)
    with torch.no_grad():
        model.module.head.weight.copy_(torch.from_numpy(head.weight)[None])
        model.module.head.bias.fill_(head.bias)
    return {"regularisation": head.strength, "validation_loss": head.validation_loss}


def _train_full(model: RewardModel, fit: PreferenceData, args: argparse.Namespace) -> dict:
    objective = _objective(args, fit)
    settings = FullSettings(objective, args.margin, args.epochs, args.learning_rate, args.batch_size, args.seed)
    return {"objective": objective, "epochs": args.epochs, "final_loss": fine_tune(model, fit, settings)}


def _save(model: RewardModel, report: dict, output: Path) -> None:
    """Write model and report to a temporary folder beside `output`, then put it in place at once."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".reward-") as temporary:
        model.save(Path(temporary) / "model")
        (Path(temporary) / "model" / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        if output.exists():
            shutil.move(str(output), Path(temporary) / "old")
        os.rename(Path(temporary) / "model", output)


def _print(report: dict, output: str) -> None:
    test = report["test"]
    pearson = f", Pearson {test['pearson']:.3f}" if "pearson" in test else ""
    print(
        f"held-out pair accuracy {test['pair_accuracy']:.3f} ({test['pairs']} pairs), ECE {test['ece']:.3f}, "
        f"Brier {test['brier']:.3f}{pearson}; {report['seconds']:g} s; saved in {output}",
        flush=True,
    )
