"""Reward models for the demo's film sentences, side by side, with what the raters' own disagreement allows.

    python examples/movie_reviews/reward_models.py train [MODEL ...] [--folder runs/reward_models] [--set "--epochs 1" ...]
    python examples/movie_reviews/reward_models.py report [--folder runs/reward_models] [--docs docs]

`train` fits each model of `MODELS` with `rlhf reward train` (what is there already is left alone) and measures it. `report` adds the
raters, writes `reward_models.json` into the folder of `--docs` and the table into its `reward_models.md`. What an earlier report found
stays, unless that model was measured again.

The texts: 4,333 sentences to train on, 1,025 held out, each rated by 15 people or more. Two kinds of training data: the mean ratings,
and `PAIRS` random pairs with P(a beats b), the share of (rater of a, rater of b) who would say so, a tie counting half. All models are
asked about the same held-out pairs. Where a pair counts as right or wrong, its mean ratings are more than 0.5 apart.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.data.assets import resolve
from rlhf.reward.models import load_any_model
from rlhf.reward.training.calibration import brier, expected_calibration_error
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.reader import read_data
from rlhf.reward.training.report import pair_logits, probabilities_of

APART = 0.5
PAIRS, TEST_PAIRS = 3_000, 500
FULL = ("--method", "full", "--threads", "2")
RATED = "asset:movie-reviews/reward_train.jsonl"
SUBSET = 600
"""Rated sentences that SmolLM2 learns from."""


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        data: "rated", "pairs", or "subset" of the rated ones.
        tested: held-out pairs that it is asked about; a cross-encoder reads each of them twice.
    """

    name: str
    base: str
    data: str
    options: tuple[str, ...]
    tested: int = 20_000


MODELS = {
    "ridge": Model("ridge head, frozen MiniLM", "minilm-l6-v2", "rated", ("--method", "ridge", "--threads", "2")),
    "encoder": Model("fine-tuned MiniLM, squared error", "minilm-l6-v2", "rated", (*FULL, "--learning-rate", "5e-5")),
    "bradley_terry": Model(
        "fine-tuned MiniLM, Bradley-Terry",
        "minilm-l6-v2",
        "pairs",
        (*FULL, "--objective", "bradley-terry", "--learning-rate", "1e-4"),
    ),
    "smollm2": Model(
        f"SmolLM2-135M, Bradley-Terry, {SUBSET:,} sentences",
        "smollm2-135m-instruct",
        "subset",
        (*FULL, "--objective", "bradley-terry", "--learning-rate", "3e-5", "--dtype", "bf16"),
    ),
    "gpm": Model("MiniLM, GPM", "minilm-l6-v2", "pairs", (*FULL, "--objective", "gpm", "--learning-rate", "1e-4")),
    "cross_encoder": Model(
        "MiniLM, cross-encoder, 1,500 of the pairs",
        "minilm-l6-v2",
        "pairs",
        (*FULL, "--objective", "cross-encoder", "--learning-rate", "1e-4", "--comparisons", "1500"),
        tested=1_000,
    ),
}


def main() -> None:
    """Train or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    trainer = actions.add_parser("train")
    trainer.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    trainer.add_argument(
        "--set", default="", metavar="OPTIONS", help="further options of `rlhf reward train`, in quotes"
    )
    reporter = actions.add_parser("report")
    reporter.add_argument("--docs", type=Path, default=Path("docs"))
    for one in (trainer, reporter):
        one.add_argument("--folder", type=Path, default=Path("runs/reward_models"))
    args = parser.parse_args()
    unknown = set(getattr(args, "models", ())) - set(MODELS)
    if unknown:
        parser.error(f"there is no model {', '.join(sorted(unknown))}; choose of {', '.join(MODELS)}")
    if args.action == "train":
        train(args.models or list(MODELS), args.folder, shlex.split(args.set))
    else:
        write_report(args.folder, args.docs)


def train(names: Sequence[str], folder: Path, options: Sequence[str]) -> None:
    """Fit what is not there yet, and measure it."""
    folder.mkdir(parents=True, exist_ok=True)
    files, tests = write_data(folder)
    for name in names:
        model, output = MODELS[name], folder / name
        if not output.exists():
            command = ["--model", f"asset:{model.base}", "--output", str(output)]
            command += ["--train", files[model.data], "--test", tests[model.data]]
            subprocess.run(
                [sys.executable, "-m", "rlhf.cli", "reward", "train", *command, *model.options, *options], check=True
            )
        found = measure(output, model.tested)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        print(name, json.dumps(found), flush=True)


class Raters:
    """The scores that people gave to some texts, -4 to 4, as shares of the raters of each text."""

    def __init__(self, path: str):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.texts = [row["text"] for row in rows]
        self.scores = [np.array(row["scores"]) for row in rows]
        self.mean = np.array([scores.mean() for scores in self.scores])
        self._shares = np.array([np.bincount(scores + 4, minlength=9) / len(scores) for scores in self.scores])

    def preference(self, pairs: np.ndarray) -> np.ndarray:
        """P(a random rater of the first scores it above a random rater of the second), ties half, [n_pairs]."""
        first, second = self._shares[pairs[:, 0]], self._shares[pairs[:, 1]]
        below = np.cumsum(second, axis=1) - second / 2
        return (first * below).sum(1)

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Each text's raters divided at random into two halves: the mean scores of both."""
        shuffled = [rng.permutation(scores) for scores in self.scores]
        return (
            np.array([scores[: len(scores) // 2].mean() for scores in shuffled]),
            np.array([scores[len(scores) // 2 :].mean() for scores in shuffled]),
        )


def write_data(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The training and the test files by kind of data. Pairs are drawn with a fixed seed."""
    rated, tested = resolve(RATED), resolve("asset:movie-reviews/reward_test.jsonl")
    files = {"rated": rated, "pairs": str(folder / "pairs.jsonl"), "subset": str(folder / "subset.jsonl")}
    tests = {"rated": tested, "pairs": str(folder / "test_pairs.jsonl"), "subset": tested}
    write_pairs(Raters(resolve("asset:movie-reviews/reward_train_scores.jsonl")), PAIRS, files["pairs"])
    write_pairs(Raters(resolve("asset:movie-reviews/reward_test_scores.jsonl")), TEST_PAIRS, tests["pairs"])
    lines = Path(rated).read_text().splitlines()
    Path(files["subset"]).write_text("\n".join(random.Random(0).sample(lines, SUBSET)) + "\n")
    return files, tests


def write_pairs(raters: Raters, count: int, path: str) -> None:
    """Random pairs, the likelier one first, with its probability."""
    rng = np.random.default_rng(0)
    pairs = np.array([rng.choice(len(raters.texts), 2, replace=False) for _ in range(count)])
    p = raters.preference(pairs)
    pairs[p < 0.5] = pairs[p < 0.5][:, ::-1]
    with open(path, "w", encoding="utf-8") as file:
        for (a, b), share in zip(pairs, np.maximum(p, 1 - p), strict=True):
            row = {"chosen": raters.texts[a], "rejected": raters.texts[b], "probability": round(share, 6)}
            file.write(json.dumps(row) + "\n")


def test_set(limit: int) -> tuple[PreferenceData, Raters, np.ndarray]:
    """The held-out texts, their raters, and `limit` random pairs of them, in no order."""
    data, raters = (
        read_data(resolve("asset:movie-reviews/reward_test.jsonl")),
        Raters(resolve("asset:movie-reviews/reward_test_scores.jsonl")),
    )
    rng = np.random.default_rng(1)
    first = rng.integers(0, len(raters.texts), limit)
    second = (first + rng.integers(1, len(raters.texts), limit)) % len(raters.texts)
    return data, raters, np.stack([first, second], axis=1)


def measure(folder: Path, limit: int) -> dict[str, float]:
    """A model's probabilities on held-out pairs, against the mean ratings and against the raters."""
    data, raters, pairs = test_set(limit)
    model = load_any_model(str(folder))
    p = probabilities_of(pair_logits(model, data, pairs), model.description.temperature)
    report = json.loads((folder / "reward_report.json").read_text())
    return compare(p, raters, pairs) | {"seconds": report["seconds"], "rows": report["rows"]["fit"]}


def compare(p: np.ndarray, raters: Raters, pairs: np.ndarray) -> dict[str, float]:
    """`p`, P(first beats second), against who has the higher mean (pairs more than `APART` apart), and against the raters (all pairs)."""
    gap = raters.mean[pairs[:, 0]] - raters.mean[pairs[:, 1]]
    clear, won = np.abs(gap) > APART, gap > 0
    true = raters.preference(pairs)
    right = np.where(p == 0.5, 0.5, (p > 0.5) == won)
    return {
        "pairs": int(clear.sum()),
        "accuracy": float(right[clear].mean()),
        "ece": expected_calibration_error(p[clear], won[clear]),
        "brier": brier(p[clear], won[clear]),
        "rater_rms": float(np.sqrt(np.mean((p - true) ** 2))),
        "rater_ece": rater_calibration(p, true),
        "rater_agreement": float(np.mean(np.where(p > 0.5, true, np.where(p < 0.5, 1 - true, 0.5)))),
    }


def rater_calibration(p: np.ndarray, true: np.ndarray, bins: int = 10) -> float:
    """ECE against preference probabilities: sum over bins of max(p, 1 - p) of |B| / N |mean true - mean p|, of the side that p favours."""
    confidence, favoured = np.maximum(p, 1 - p), np.where(p >= 0.5, true, 1 - true)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(index, favoured - confidence, bins)
    return float(np.abs(gaps).sum() / len(p))


def people(limit: int = 20_000, repeats: int = 20) -> dict[str, dict[str, float]]:
    """What raters reach as judges of the same pairs.

    one_rater: one score drawn for each text of a pair, a tie counting half, against the mean of all raters of that text.
    half: the mean of a random half of each text's raters, against the mean of the other half (pairs more than `APART` apart by the latter).
    all: the raters' own preference probabilities as if they were a model's.
    """
    _, raters, pairs = test_set(limit)
    true, gap = raters.preference(pairs), raters.mean[pairs[:, 0]] - raters.mean[pairs[:, 1]]
    clear = np.abs(gap) > APART
    rng = np.random.default_rng(2)
    halves = []
    for _ in range(repeats):
        judges, judged = (half[pairs[:, 0]] - half[pairs[:, 1]] for half in raters.halves(rng))
        far = np.abs(judged) > APART
        halves.append(np.mean(np.where(judges == 0, 0.5, (judges > 0) == (judged > 0))[far]))
    return {
        "one_rater": {
            "accuracy": float(np.where(gap > 0, true, 1 - true)[clear].mean()),
            "rater_agreement": float((true**2 + (1 - true) ** 2).mean()),
        },
        "half": {"accuracy": float(np.mean(halves))},
        "all": {key: value for key, value in compare(true, raters, pairs).items() if key != "pairs"},
    }


BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"
NAMES = {
    "one_rater": "one rater per text",
    "half": "half of the raters, on the other half",
    "all": "all raters' shares",
}
COLUMNS = {
    "accuracy": "pair accuracy",
    "ece": "ECE",
    "brier": "Brier",
    "rater_agreement": "agrees with a rater",
    "rater_rms": "RMS error of P",
    "rater_ece": "ECE of P",
    "seconds": "seconds",
}


def write_report(folder: Path, docs: Path) -> None:
    """Merge what was measured into `reward_models.json`, and write the table between the marks of `reward_models.md`."""
    path = docs / "reward_models.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    models = found.get("models", {})
    models |= {
        name: json.loads((folder / f"{name}.json").read_text()) for name in MODELS if (folder / f"{name}.json").exists()
    }
    found = {"apart": APART, "people": people(), "models": {name: models[name] for name in MODELS if name in models}}
    path.write_text(json.dumps(found, indent=2) + "\n")
    rows = [(NAMES[name], figures) for name, figures in found["people"].items()]
    rows += [(MODELS[name].name, figures) for name, figures in found["models"].items()]
    lines = ["| Judge | " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---" * len(COLUMNS) + "|"]
    for name, figures in rows:
        cells = [_cell(key, figures.get(key)) for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    page = docs / "reward_models.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])
    print("\n".join(lines))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if key == "seconds" else f"{value:.3f}"


if __name__ == "__main__":
    main()
