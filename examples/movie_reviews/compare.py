"""All methods on the demo task, side by side at equal samples.

    python examples/movie_reviews/compare.py run [METHOD ...] [--seeds 0 1] [--folder runs/compare] [--set section.key=value ...]
    python examples/movie_reviews/compare.py report [--folder runs/compare] [--docs docs/algorithms]

`run` trains each `configs/movie_reviews/METHOD.yaml` with each seed, all roles as Ray actors, into
`FOLDER/METHOD-SEED`; runs that are complete or under way are left alone, so it can be interrupted, and two of it can share the
work. `report` reads these folders and writes `results.json`, a curve for each method and `comparison.png` into the folder
of `--docs`, and prints the table; what an earlier report found stays, unless the same method, seed and steps were run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import judge
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import prepare

from rlhf.cluster.signals import run_child
from rlhf.config import load
from rlhf.config.algorithm import METHODS
from rlhf.tracking import jsonl, report

CONFIGS = Path(__file__).parents[2] / "configs" / "movie_reviews"
REWARD_MODEL = Path("runs/demo/reward_model")


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runner = actions.add_parser("run")
    runner.add_argument("methods", nargs="*", help="default: all")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0])
    runner.add_argument("--fraction", type=float, default=1.0, help="of each file's steps; the same for all methods")
    runner.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of all runs")
    reporter = actions.add_parser("report")
    reporter.add_argument("--docs", type=Path, default=Path("docs/algorithms"))
    for one in (runner, reporter):
        one.add_argument("--folder", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()
    judge.check_packages()
    if args.action == "run":
        run(
            args.methods or list(METHODS),
            args.seeds,
            args.folder,
            args.fraction,
            args.set,
        )
    else:
        write_report(args.folder, args.docs)


def run(methods: Sequence[str], seeds: Sequence[int], folder: Path, fraction: float, overrides: Sequence[str]) -> None:
    """Train what is not there yet; a run that failed is told and does not stop the others."""
    prepare.prepare(REWARD_MODEL, method="ridge", threads=None)
    for seed in seeds:
        for method in methods:
            target = folder / f"{method}-{seed}"
            if target.exists():
                continue
            target.mkdir(parents=True)
            steps = max(1, round(fraction * load(CONFIGS / f"{method}.yaml").loop.steps))
            shorter = [f"loop.steps={steps}", f"loop.eval_every={-(-steps // 3)}"]
            options = [
                *shorter,
                f"run.dir={target}",
                f"run.seed={seed}",
                "checkpoint.every=0",
                "checkpoint.export=false",
                *overrides,
            ]
            command = [sys.executable, "-m", "rlhf.cli", "train", str(CONFIGS / f"{method}.yaml"), *options]
            status = run_child(command)
            print(f"{target}: {f'FAILED ({status})' if status else 'done'}", flush=True)
            if status:
                target.rename(target.with_name(f"failed-{target.name}"))


def write_report(folder: Path, docs: Path) -> None:
    """Figures and curves of all complete runs in the folder."""
    results = list(read_runs(folder))
    if not results:
        sys.exit(f"{folder}: no complete run; start with `compare.py run`")
    docs.mkdir(parents=True, exist_ok=True)
    record = docs / "results.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    results = list({(one["method"], one["seed"], one["steps"]): one for one in known + results}.values())
    record.write_text(json.dumps(jsonl.finite(results), indent=1) + "\n", encoding="utf-8")
    for method in sorted({result["method"] for result in results}):
        curves([one for one in results if one["method"] == method], docs / f"{method}.png", by="seed")
    curves(results, docs / "comparison.png", by="method")
    print(table(results))


def read_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """One record per complete run: settings that matter, the curve over samples, and the end against the start."""
    for path in sorted(folder.iterdir()):
        if not (path / "heldout_after.jsonl").exists():
            continue
        settings = load(path / "config.yaml")
        before = report.read_held_out(path / "heldout_before.jsonl")
        after = report.read_held_out(path / "heldout_after.jsonl")
        steps, evaluations = jsonl.read(path / "metrics.jsonl"), jsonl.read(path / "evaluations.jsonl")
        compared = report.compare(
            before,
            after,
            [judge.vader(text) for text in before.responses],
            [judge.vader(text) for text in after.responses],
            kl_per_token=evaluations[-1].get("policy/kl"),
        )
        samples = np.cumsum([step.get("rollout/responses", 0.0) for step in steps])
        yield {
            "method": settings.algorithm.name,
            "seed": settings.run.seed,
            "steps": len(steps),
            "samples": int(samples[-1]),
            "curve": [
                {
                    "samples": int(samples[line["step"] - 1]) if line["step"] else 0,
                    "reward": line["reward/mean"],
                    "kl": line["policy/kl_response"],
                }
                for line in evaluations
            ],
            "reward_before": compared.before.reward,
            "reward": compared.after.reward,
            "vader_before": compared.before.judge,
            "vader": compared.after.judge,
            "length": compared.after.length,
            "kl": evaluations[-1]["policy/kl_response"],
            "win_rate": compared.win_rate,
            "win_rate_interval": compared.win_rate_interval,
            "prompts": compared.n_prompts,
            "seconds": sum(step["time/step"] for step in steps),
        }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown, the highest reward first."""
    lines = [
        "| method | seed | samples | reward | KL (nats per response) | win rate (95% interval) | VADER | length | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in sorted(results, key=lambda result: -result["reward"]):
        low, high = one["win_rate_interval"]
        lines.append(
            f"| `{one['method']}` | {one['seed']} | {one['samples']} | {one['reward_before']:+.2f} to {one['reward']:+.2f} | "
            f"{one['kl']:.2f} | {one['win_rate']:.0%} ({low:.0%} to {high:.0%}) | {one['vader_before']:+.2f} to "
            f"{one['vader']:+.2f} | {one['length']:.1f} | {one['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines) + "\n"


def curves(results: Sequence[dict[str, Any]], path: Path, by: str) -> None:
    """Held-out reward and KL against the responses sampled so far, a line per run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), dpi=110, layout="constrained")
    colours = plt.get_cmap("tab20")
    names = list(dict.fromkeys(one[by] for one in results))
    for one in results:
        x = [point["samples"] for point in one["curve"]]
        style = {"color": colours(names.index(one[by]) % 20), "marker": "o", "markersize": 3}
        label = one["method"] if by == "method" else f"seed {one['seed']}"
        label = None if label in axes[0].get_legend_handles_labels()[1] else label
        axes[0].plot(x, [point["reward"] for point in one["curve"]], label=label, **style)
        axes[1].plot(x, [point["kl"] for point in one["curve"]], **style)
    for axis, title in zip(axes, ("held-out reward", "KL to the start (nats per response)"), strict=True):
        axis.set_xlabel("responses sampled")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7, ncols=2 if by == "method" else 1)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
