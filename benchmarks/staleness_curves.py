"""Does learning suffer when sampling runs ahead? The demo's task with `loop.staleness` 0, 1 and 4 at equal samples, each with two seeds.

    .venv/bin/python examples/movie_reviews/prepare.py      # once: makes runs/demo/reward_model
    .venv/bin/python benchmarks/staleness_curves.py

Each run is `rlhf train configs/movie_reviews.yaml` in a folder of its own under `--folder`. One that is complete is not run again, and one
that was cut off begins anew; so this can be interrupted, and more seeds or bounds be added. Then `--json` and `--picture` are written from
all complete runs there.

It is the demo with half of its prompts per step: the same 24 versions of the weights, so that a bound of 4 is as large a part of a run as
there, and the same learning rate, on half the samples. Only the bound differs between the runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from online_dpo_vs_trl import machine

from rlhf.cluster.signals import run_child
from rlhf.config import load
from rlhf.tracking import jsonl
from rlhf.tracking.catalogue import axis

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "movie_reviews.yaml"
PANELS = (("reward/mean", "held-out reward"), ("policy/kl", "distance from the start"))


def main() -> None:
    """Run what is missing, then report."""
    args = parse()
    if not args.report:
        for seed in args.seeds:
            for bound in args.staleness:
                run(args, bound, seed)
    runs = list(read_runs(args.folder, size_of(args)))
    if not runs:
        sys.exit(f"{args.folder}: no complete run")
    print(table(runs))
    args.json.write_text(
        json.dumps({"benchmark": Path(__file__).stem, "setting": machine(), "runs": jsonl.finite(runs)}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    draw(runs, args.picture)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4], help="bounds (default: 0 1 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--steps", type=int, default=24, help="default: 24, as the demo")
    parser.add_argument("--prompts-per-step", type=int, default=4, help="default: 4, half of the demo's")
    parser.add_argument("--eval-every", type=int, default=6, help="steps between evaluations (default: 6)")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of all runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "staleness.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "staleness.png")
    parser.add_argument("--report", action="store_true", help="run nothing, only report what is there")
    return parser.parse_args()


def run(args: argparse.Namespace, bound: int, seed: int) -> None:
    """One run, unless it is there. Ends the program if it fails."""
    folder = args.folder / f"staleness-{bound}-seed-{seed}-{size_of(args)}"
    if is_complete(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    options = [
        f"run.dir={folder}",
        f"run.seed={seed}",
        f"loop.staleness={bound}",
        f"loop.steps={args.steps}",
        f"loop.prompts_per_step={args.prompts_per_step}",
        f"loop.eval_every={args.eval_every}",
        "checkpoint.export=false",
        *args.set,
    ]
    print(f"{folder}", flush=True)
    if status := run_child([sys.executable, "-m", "rlhf.cli", "train", str(CONFIG), *options]):
        sys.exit(f"{folder}: `rlhf train` ended with status {status}; its own message stands above")


def size_of(args: argparse.Namespace) -> str:
    """Part of the name of a run's folder: runs of another size are others."""
    return f"{args.steps}x{args.prompts_per_step}"


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a run that came to its end: the last thing it writes is there."""
    return (folder / "heldout_after.jsonl").exists()


def read_runs(folder: Path, size: str) -> Iterator[dict[str, Any]]:
    """One record per complete run of this size: what differs, its evaluations over the responses sampled so far, and its end."""
    for path in sorted(folder.glob(f"*-{size}")):
        if not is_complete(path):
            continue
        settings = load(path / "config.yaml")
        steps, evaluations = jsonl.read(path / "metrics.jsonl"), jsonl.read(path / "evaluations.jsonl")
        samples = np.cumsum([0.0, *(step["rollout/responses"] for step in steps)])
        ages = [step.get("staleness/mean", 0.0) for step in steps]
        yield {
            "staleness": settings.loop.staleness,
            "seed": settings.run.seed,
            "steps": len(steps),
            "samples": int(samples[-1]),
            "staleness_mean": float(np.mean(ages)),
            "seconds": sum(step["time/step"] for step in steps),
            "curve": [
                {
                    "samples": int(samples[line["step"]]),
                    **{name: line[name] for name, _ in PANELS},
                    "length": line["rollout/length"],
                }
                for line in evaluations
            ],
        }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| staleness | seed | samples | mean age (versions) | held-out reward | KL (nats per token) | length | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in sorted(runs, key=lambda one: (one["staleness"], one["seed"])):
        first, last = one["curve"][0], one["curve"][-1]
        lines.append(
            f"| {one['staleness']} | {one['seed']} | {one['samples']} | {one['staleness_mean']:.2f} | {first['reward/mean']:+.2f} to "
            f"{last['reward/mean']:+.2f} | {last['policy/kl']:.3f} | {last['length']:.1f} | {one['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out reward and KL over the responses sampled so far: for each bound the mean over its seeds, and from the least to the most."""
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (name, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for colour, bound in enumerate(sorted({one["staleness"] for one in runs})):
            curves = [one["curve"] for one in runs if one["staleness"] == bound]
            x = [point["samples"] for point in curves[0]]
            y = np.array([[point[name] for point in curve] for curve in curves])
            seeds = "1 seed" if len(curves) == 1 else f"{len(curves)} seeds"
            panel.plot(x, y.mean(0), color=f"C{colour}", marker="o", markersize=3, label=f"staleness {bound} ({seeds})")
            panel.fill_between(x, y.min(0), y.max(0), color=f"C{colour}", alpha=0.2, linewidth=0)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("responses sampled")
        panel.set_ylabel(axis(name))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
