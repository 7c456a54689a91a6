"""Over-optimisation, and what an ensemble does about it: the demo's policy on one weak reward model, and on five.

    python examples/movie_reviews/overoptimisation.py run [RUN ...] [--folder runs/overoptimisation] [--set section.key=value ...]
    python examples/movie_reviews/overoptimisation.py report [--folder runs/overoptimisation] [--docs docs]

`run` fits five weak reward models and trains the policy three times: on the first of them (`single`), on one model fitted on the sentences
of all five (`pooled`), and on the five by the worst case (`ensemble`, `reward.combine: worst`). The runs are alike but for that, and what
exists is left alone. `report` plots, against the KL to the start, what each run optimised and what a judge says that none was trained on.

Held apart: each weak model is a ridge head fitted on 60 rated sentences of its own out of the demo's `reward_test.jsonl` (further ones
of the same file measure it, and 64 more are the common set). The gold judge is the demo's reward model, fitted on `reward_train.jsonl`:
no sentence in common. It takes part as an observer (`weight: 0`), so it judges the same held-out answers at every evaluation and
counts for nothing. Shared: the frozen MiniLM encoder under all heads, and the people who rated. What the encoder cannot see neither can
the gold judge; VADER, a lexicon, also reads the first and last answers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import prepare

from rlhf.data.assets import resolve
from rlhf.tracking import jsonl, report

CONFIG = Path(__file__).parents[2] / "configs" / "movie_reviews" / "iterative_dpo.yaml"
GOLD = Path("runs/demo/reward_model")
MEMBERS, RATINGS, MEASURED, COMMON = 5, 60, 200, 64
WEAK = [f"weak_{i}" for i in range(MEMBERS)]
RUNS = {"single": WEAK[:1], "pooled": ["weak_all"], "ensemble": WEAK}
"""Run -> the reward models that it optimises."""
LABELS = {
    "single": "one weak reward model",
    "pooled": "one model, all sentences",
    "ensemble": f"the worst of {MEMBERS}",
}
# Rounds with the previous iterate as reference: nothing ties the policy to its start, so it goes as far as it can.
OPTIONS = (
    *("policy.dtype=fp32", "checkpoint.every=0", "checkpoint.export=false"),
    *("loop.steps=6", "loop.prompts_per_step=16", "loop.updates_per_step=2", "loop.epochs_per_step=2"),
    *("loop.eval_every=1", "loop.eval_limit=32"),
)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runner = actions.add_parser("run")
    runner.add_argument("runs", nargs="*", metavar="RUN", help=f"{', '.join(RUNS)}; default: all")
    runner.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of all runs")
    reporter = actions.add_parser("report")
    reporter.add_argument("--docs", type=Path, default=Path("docs"))
    for one in (runner, reporter):
        one.add_argument("--folder", type=Path, default=Path("runs/overoptimisation"))
    args = parser.parse_args()
    judge.check_packages()
    if args.action == "run":
        if unknown := set(args.runs) - set(RUNS):
            parser.error(f"there is no run {', '.join(unknown)}; there are {', '.join(RUNS)}")
        run(args.runs or list(RUNS), args.folder, args.set)
    else:
        write_report(args.folder, args.docs)


def run(names: Sequence[str], folder: Path, overrides: Sequence[str]) -> None:
    """Fit the weak models and train the policy, each unless it is there."""
    prepare.prepare(GOLD, method="ridge", threads=None)
    fit_models(folder)
    for name in names:
        target = folder / name
        if (target / "heldout_after.jsonl").exists():
            continue
        members = [{"name": model, "kind": "model", "path": str(folder / model)} for model in RUNS[name]]
        members.append({"name": "gold", "kind": "model", "path": str(GOLD), "weight": 0.0})
        reward = {"kind": "several", "path": None, "combine": "worst", "members": members}
        reward["common_set"] = str(folder / "common.jsonl")
        options = [
            *OPTIONS,
            f"run.dir={target}",
            *(f"reward.{key}={json.dumps(value)}" for key, value in reward.items()),
        ]
        command = [sys.executable, "-m", "rlhf.cli", "train", str(CONFIG), *options, *overrides]
        subprocess.run(command, check=True)


def fit_models(folder: Path) -> None:
    """Five reward models, each fitted on sentences of its own, and one on all of these; and the file of the common set."""
    rows = jsonl.read(Path(resolve("asset:movie-reviews/reward_test.jsonl")))
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    used = MEMBERS * RATINGS
    write(folder / "measured.jsonl", rows[used : used + MEASURED])
    common = rows[used + MEASURED : used + MEASURED + COMMON]
    write(folder / "common.jsonl", [{"response": row["text"]} for row in common])
    learned = {name: rows[i * RATINGS : (i + 1) * RATINGS] for i, name in enumerate(WEAK)} | {"weak_all": rows[:used]}
    for seed, (name, sentences) in enumerate(learned.items()):
        data, model = folder / f"{name}.jsonl", folder / name
        if model.exists():
            continue
        write(data, sentences)
        options = [
            "--train",
            str(data),
            "--test",
            str(folder / "measured.jsonl"),
            "--output",
            str(model),
            "--seed",
            str(seed),
        ]
        command = [sys.executable, "-m", "rlhf.cli", "reward", "train", "--model", "asset:minilm-l6-v2", *options]
        subprocess.run(command, check=True)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_report(folder: Path, docs: Path) -> None:
    """Figures and plot of the complete runs."""
    results = [read_run(folder / name) for name in RUNS if (folder / name / "heldout_after.jsonl").exists()]
    if not results:
        sys.exit(f"{folder}: no complete run; start with `overoptimisation.py run`")
    docs.mkdir(parents=True, exist_ok=True)
    models = {name: folder / name for name in (*WEAK, "weak_all")} | {"gold": GOLD}
    reports = {name: json.loads((path / "reward_report.json").read_text()) for name, path in models.items()}
    accuracy = {name: one["test"]["pair_accuracy"] for name, one in reports.items()}
    figures = {"held_out_pair_accuracy": accuracy, "runs": results}
    (docs / "overoptimisation.json").write_text(json.dumps(jsonl.finite(figures), indent=1) + "\n", encoding="utf-8")
    plot(results, docs / "overoptimisation.png")
    for one in results:
        first, best, last = one["curve"][0], max(one["curve"], key=lambda point: point["gold"]), one["curve"][-1]
        print(
            f"{one['run']:9} proxy {first['proxy']:+.2f} to {last['proxy']:+.2f}; gold {first['gold']:+.2f}, at best {best['gold']:+.2f} "
            f"(KL {best['kl']:.1f}), at the end {last['gold']:+.2f} (KL {last['kl']:.1f}); VADER {one['vader_before']:+.2f} to "
            f"{one['vader_after']:+.2f}; {one['seconds'] / 60:.1f} min"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """The curve of one run: what it optimised, and what the gold judge says, on the same held-out answers."""
    evaluations, steps = jsonl.read(folder / "evaluations.jsonl"), jsonl.read(folder / "metrics.jsonl")
    texts = {when: report.read_held_out(folder / f"heldout_{when}.jsonl").responses for when in ("before", "after")}
    return {
        "run": folder.name,
        "curve": [
            {
                "step": line["step"],
                "kl": line["policy/kl_response"],
                "proxy": line["reward/mean"],
                "gold": line["reward/gold"],
                "disagreement": line.get("reward/disagreement"),
            }
            for line in evaluations
        ],
        "prompts": len(texts["after"]),
        **{f"vader_{when}": float(np.mean([judge.vader(text) for text in told])) for when, told in texts.items()},
        "seconds": sum(step["time/step"] for step in steps),
    }


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Gold and proxy reward against the KL, a line per run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), dpi=110, layout="constrained")
    for one in results:
        kl = [point["kl"] for point in one["curve"]]
        for axis, judged in zip(axes, ("gold", "proxy"), strict=True):
            axis.plot(kl, [point[judged] for point in one["curve"]], marker="o", markersize=3, label=LABELS[one["run"]])
    titles = ("gold judge, never optimised (rating)", "what was optimised (standard deviations on the common set)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xlabel("KL to the start (nats per response)")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
