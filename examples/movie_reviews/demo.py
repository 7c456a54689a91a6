"""The demo, from nothing to a table: `make demo`, or `python examples/movie_reviews/demo.py [section.key=value ...]`.

1. Fetch model and data, train the reward model on human ratings (`prepare.py`).
2. `rlhf train configs/movie_reviews.yaml`: online DPO, all roles as Ray actors, with held-out answers before and after.
3. Let a judge that training never saw, the VADER lexicon, read these answers too (`judge.py`), and show what changed.

Everything lies in `runs/demo` afterwards; docs/run_folder.md says what each file is. An earlier demo is kept in
`runs/demo-previous`, except its reward model, which is used again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import judge
import prepare
from rich.console import Console

from rlhf.cluster.signals import run_child
from rlhf.config import UserError, load
from rlhf.tracking import jsonl, report

CONFIG = Path(__file__).parents[2] / "configs" / "movie_reviews.yaml"
KEPT = "reward_model"


def main(overrides: Sequence[str]) -> None:
    """Run the demo.

    Raises:
        UserError: a package that is not installed, a mistake in the overrides, or a run that left no answers.
        SystemExit: the run failed, or a signal ended it.
    """
    judge.check_packages()
    console = Console()
    start = time.monotonic()
    settings = load(CONFIG, overrides)
    folder = Path(settings.run.dir)
    set_aside(folder)
    console.rule("1. Model, data and reward model")
    prepare.prepare(Path(settings.reward.path), method="ridge", threads=None)
    console.rule("2. Online DPO")
    if status := run_child([sys.executable, "-m", "rlhf.cli", "train", str(CONFIG), *overrides]):
        sys.exit(f"demo: `rlhf train` ended with status {status}; its own message stands above")
    console.rule("3. What changed")
    show_result(folder, time.monotonic() - start, console)


def set_aside(folder: Path) -> None:
    """Move the last demo, if there is one, out of the way; only the one before it is lost."""
    if not (folder / "manifest.json").exists():
        return
    previous = folder.with_name(f"{folder.name}-previous")
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for entry in folder.iterdir():
        if entry.name != KEPT:
            entry.rename(previous / entry.name)


def show_result(folder: Path, seconds: float, console: Console) -> report.Comparison:
    """Compare the answers in the run folder, print table and samples, draw the curve, write `summary.json`."""
    before = report.read_held_out(folder / "heldout_before.jsonl")
    after = report.read_held_out(folder / "heldout_after.jsonl")
    evaluations = jsonl.read(folder / "evaluations.jsonl")
    comparison = report.compare(
        before,
        after,
        [judge.vader(text) for text in before.responses],
        [judge.vader(text) for text in after.responses],
        kl_per_token=evaluations[-1].get("policy/kl") if evaluations else None,
    )
    steps = jsonl.read(folder / "metrics.jsonl")
    curve = report.plot(folder)
    summary = report.write_summary(folder, comparison, seconds, steps=steps[-1]["step"])
    console.print(report.before_after_table(comparison, "VADER lexicon (never trained on)"))
    console.print(report.sample_pairs(before, after))
    manifest = json.loads((folder / "manifest.json").read_text())
    host, dtype = manifest["host"], manifest["dtype"]
    console.print(
        f"{steps[-1]['step']} steps; {seconds / 60:.1f} minutes in all, reward model and start-up included; {dtype}; "
        f"{host['cpus']} cores of {host['processor']}"
    )
    console.print(f"curve:   {curve}\nfigures: {summary}", highlight=False, soft_wrap=True)
    return comparison


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"demo: {error}")
