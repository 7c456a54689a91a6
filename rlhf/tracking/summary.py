"""The end of a run in a few lines: what came of it, where it is, and what to type next. Reads the run folder and nothing else."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config import Settings, UserError
from rlhf.config.sft import SftSettings
from rlhf.tracking import jsonl, report
from rlhf.tracking.catalogue import BY_NAME, SIGNED, signed
from rlhf.tracking.console import left_out, readable

PROMPT = "Write a short poem."
"""Asked in the next command if the run has no short held-out prompt."""
LONGEST_PROMPT = 80


def summary(settings: Settings | SftSettings, curve: str) -> list[str]:
    """A finished run, a line each: `name  value`.

    Args:
        curve: where the curve is, or why there is none.
    """
    folder = Path(settings.run.dir)
    model = _model(settings, folder)
    lines = [("run folder", str(folder)), *_found(folder), ("curve", curve)]
    if model is not None:
        lines += [("model", model), *(("next", command) for command in _commands(settings, folder, model))]
    return [f"{name:11} {value}" for name, value in lines]


def _model(settings: Settings | SftSettings, folder: Path) -> str | None:
    """What the run leaves to go on with: its export, or the run itself, whose last checkpoint is then taken."""
    if settings.checkpoint.export:
        return str(folder / "export")
    return str(folder) if settings.checkpoint.every else None


def _found(folder: Path) -> Iterator[tuple[str, str]]:
    """Before and after on held-out prompts, and what was counted on the way (`left_out`)."""
    evaluations, steps = jsonl.read(folder / "evaluations.jsonl"), jsonl.read(folder / "metrics.jsonl")
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        for name in ("reward/mean", "heldout/loss", "rollout/length"):
            if first.get(name) is not None and last.get(name) is not None:
                change = _change(name, first[name], last[name])
                yield "held-out", f"{BY_NAME[name].label} {change}, after {last['step']} steps"
        if last.get("policy/kl") is not None:
            kl = BY_NAME["policy/kl"]
            yield "held-out", f"{kl.label} to the start {kl.shown(last[kl.name])} {kl.unit}"
        if rate := _win_rate(folder):
            yield "held-out", rate
    total = sum((Counter(left_out(line)) for line in steps), Counter())
    if total:
        yield "in all", ", ".join(f"{what} {count:,}" for what, count in total.items()) + f", in {len(steps)} steps"
    warned = sum(bool(line.get("warnings")) for line in steps)
    if warned:
        yield "warnings", f"in {warned} of {len(steps)} steps, see `warnings` in {folder / 'metrics.jsonl'}"


def _change(name: str, before: float, after: float) -> str:
    form = signed if BY_NAME[name].form == SIGNED else "{:.4g}".format
    return f"{form(before)} -> {form(after)} ({signed(after - before)})"


def _win_rate(folder: Path) -> str | None:
    """Of the end against the start, over the prompts that were judged both times."""
    try:
        before, after = (report.read_held_out(folder / f"heldout_{moment}.jsonl") for moment in ("before", "after"))
        rate, (low, high) = report.win_rate(before.rewards, after.rewards)
    except (UserError, ValueError):  # no held-out prompts, no reward for a lone answer, or other prompts since a resume
        return None
    judged = sum(
        math.isfinite(one) and math.isfinite(other) for one, other in zip(before.rewards, after.rewards, strict=True)
    )
    return f"win rate against the start {rate:.1%}, 95% interval {low:.1%} to {high:.1%}, over {judged} prompts"


def _commands(settings: Settings | SftSettings, folder: Path, model: str) -> Iterator[str]:
    """To paste into a shell."""
    yield f"rlhf generate {shlex.quote(model)} --prompt {shlex.quote(_prompt(folder))}"
    if isinstance(settings, SftSettings):
        yield f"rlhf train CONFIG policy.model={shlex.quote(model)}"
    elif settings.data.eval_prompts is not None and not settings.reward.compares:
        yield f"rlhf eval {shlex.quote(str(folder / 'config.yaml'))} --policy {shlex.quote(model)}"


def _prompt(folder: Path) -> str:
    rows: list[dict[str, Any]] = jsonl.read(folder / "heldout_before.jsonl") + jsonl.read(folder / "samples.jsonl")
    texts = (str(row.get("prompt", "")) for row in rows)
    return next((text for text in texts if text and text == readable(text, LONGEST_PROMPT)), PROMPT)
