"""What came of a run: the curve, the before/after table and `summary.json`. Reads the run folder and nothing else.

Before and after are the same held-out prompts, answered by the policy as it started and as it ended; all comparisons
are paired over prompts. A response that could not be judged has reward NaN; it is left out and counted, never taken as
zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from rlhf.config import MissingPackageError, UserError
from rlhf.config.extras import remedy
from rlhf.tracking import jsonl
from rlhf.tracking.catalogue import BY_NAME, axis, signed

Z = 1.959964  # 97.5% of a normal distribution lie below
SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class HeldOut:
    """One policy's answers to the held-out prompts: four lists of the same length, [n_prompts].

    Attributes:
        rewards: by the reward model that steers training; NaN where it gave none.
        lengths: of the responses, in tokens.
    """

    prompts: list[str]
    responses: list[str]
    rewards: list[float]
    lengths: list[int]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.responses) == len(self.rewards) == len(self.lengths):
            raise ValueError("prompts, responses, rewards and lengths must be lists of one length")


@dataclass(frozen=True)
class Average:
    """Means over the held-out prompts: reward, independent judge, and response length in tokens."""

    reward: float
    judge: float
    length: float


@dataclass(frozen=True)
class Comparison:
    """The start and the end of a run on the same prompts.

    Attributes:
        n_prompts: held-out prompts judged on both sides; the others are in `n_unjudged` and in none of the means.
        kl_per_token: KL of the final policy to the reference, in nats per token, as the last evaluation measured it.
        win_rate: see `win_rate`.
        win_rate_interval: its 95% interval.
    """

    before: Average
    after: Average
    n_prompts: int
    n_unjudged: int
    kl_per_token: float | None
    win_rate: float
    win_rate_interval: tuple[float, float]


def read_held_out(path: Path) -> HeldOut:
    """Read `heldout_before.jsonl` or `heldout_after.jsonl`: rows of prompt, response, reward (null: NaN) and length.

    Raises:
        UserError: the file is missing, empty, or a row lacks a field.
    """
    rows = jsonl.read(path)
    if not rows:
        raise UserError(f"{path}: no held-out answers; the run must have ended, with data.eval_prompts set")
    try:
        return HeldOut(
            prompts=[row["prompt"] for row in rows],
            responses=[row["response"] for row in rows],
            rewards=[math.nan if row["reward"] is None else float(row["reward"]) for row in rows],
            lengths=[row["length"] for row in rows],
        )
    except KeyError as error:
        raise UserError(f"{path}: a row lacks the field {error}; delete the file and evaluate again") from None


def win_rate(before: Sequence[float], after: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How often the second of two paired values is higher, a tie counting one half.

    Args:
        before, after: rewards of the same prompts in the same order, [n_prompts]; pairs with a NaN are left out.

    Returns:
        The rate and its 95% interval over prompts (Wilson 1927), which has a width also when every prompt says the same. Ties
        vary less than wins and losses, so with ties the interval is wider than need be.

    Raises:
        ValueError: the lengths differ, or no pair is left.
    """
    first, second = np.asarray(before, float), np.asarray(after, float)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} values before and {len(second)} after are not pairs")
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        raise ValueError("no prompt has a reward on both sides")
    n, rate = int(both.sum()), float(((second > first)[both] + 0.5 * (second == first)[both]).mean())
    centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return rate, (max(0.0, centre - half), min(1.0, centre + half))


def compare(
    before: HeldOut,
    after: HeldOut,
    judged_before: Sequence[float],
    judged_after: Sequence[float],
    kl_per_token: float | None,
) -> Comparison:
    """Set the end of a run against its start.

    Args:
        judged_before, judged_after: scores of the responses by a judge that training never saw, [n_prompts].

    Raises:
        ValueError: the two sides are not the same prompts in the same order, or no prompt was judged on both.
    """
    if before.prompts != after.prompts:
        raise ValueError("before and after must answer the same prompts in the same order")
    rewards = np.asarray([before.rewards, after.rewards], float)
    judged = np.asarray([judged_before, judged_after], float)
    lengths = np.asarray([before.lengths, after.lengths], float)
    both = ~np.isnan(rewards).any(axis=0)
    rate, interval = win_rate(before.rewards, after.rewards)
    first, second = (
        Average(*(float(values[side][both].mean()) for values in (rewards, judged, lengths))) for side in (0, 1)
    )
    return Comparison(first, second, int(both.sum()), int((~both).sum()), kl_per_token, rate, interval)


def before_after_table(comparison: Comparison, judge_name: str = "independent judge") -> Table:
    """The comparison, to be printed by a rich console."""
    table = Table(title=f"{comparison.n_prompts} held-out prompts", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, field in (("reward", "reward"), (judge_name, "judge")):
        first, second = getattr(comparison.before, field), getattr(comparison.after, field)
        table.add_row(name, signed(first), signed(second), signed(second - first))
    first, second = comparison.before.length, comparison.after.length
    length, kl = BY_NAME["rollout/length"], BY_NAME["policy/kl"]
    table.add_row(
        f"{length.label} ({length.unit})", length.shown(first), length.shown(second), f"{second - first:+.1f}"
    )
    table.add_row(f"{kl.label} to the start ({kl.unit})", "0", kl.shown(comparison.kl_per_token), "")
    low, high = comparison.win_rate_interval
    table.add_row("win rate against the start", "", f"{comparison.win_rate:.1%}", f"95%: {low:.1%} to {high:.1%}")
    if comparison.n_unjudged:
        table.caption = f"{comparison.n_unjudged} more had no reward on one side and are left out"
    return table


def sample_pairs(before: HeldOut, after: HeldOut, n: int = 3) -> Group:
    """The first `n` held-out prompts (the first, not a selection) with both answers."""
    panels = []
    for index in range(min(n, len(before.prompts))):
        answers = Table.grid(padding=(0, 2))
        answers.add_column(style="bold", no_wrap=True)
        answers.add_column(justify="right", no_wrap=True)
        answers.add_column(overflow="fold")
        for name, side in (("before", before), ("after", after)):
            answers.add_row(name, signed(side.rewards[index]), escape(_shortened(side.responses[index])))
        panels.append(Panel(answers, title=escape(_shortened(before.prompts[index])), title_align="left"))
    return Group(*panels)


def write_summary(run_dir: Path, comparison: Comparison, seconds: float, steps: int) -> Path:
    """Write `summary.json`.

    Args:
        seconds: wall time of what is summarised.
        steps: training steps done.
    """
    summary = {
        side: {name: round(value, 6) for name, value in vars(getattr(comparison, side)).items()}
        for side in ("before", "after")
    } | {
        "kl_per_token": comparison.kl_per_token,
        "win_rate": comparison.win_rate,
        "win_rate_interval": list(comparison.win_rate_interval),
        "n_prompts": comparison.n_prompts,
        "n_unjudged": comparison.n_unjudged,
        "seconds": round(seconds, 1),
        "steps": steps,
    }
    path = Path(run_dir) / "summary.json"
    path.write_text(json.dumps(jsonl.finite(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def plot(run_dir: Path | str) -> Path:
    """Draw reward and KL of a run, or the loss of a supervised one, over its steps into `curve.png` in its folder; returns that path.

    Raises:
        MissingPackageError: matplotlib is not installed.
        UserError: the folder holds no step yet.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and the loop needs only `HeldOut`
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"{run_dir}: drawing the curve needs the package matplotlib. {remedy('plots')}"
        ) from None

    folder = Path(run_dir)
    steps, evaluations = jsonl.read(folder / "metrics.jsonl"), jsonl.read(folder / "evaluations.jsonl")
    if not steps:
        raise UserError(f"{folder}: metrics.jsonl has no step yet, so there is no curve to draw")
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        _draw_losses(figure, steps, evaluations)
        if "train/loss" in steps[-1]
        else _draw_online(figure, steps, evaluations)
    )
    panels[0].set_title(f"{folder.resolve().name}: {panels[0].get_ylabel()} over the steps", loc="left")
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "curve.png"
    figure.savefig(path)
    return path


def _draw_online(figure: Any, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[Any]:
    """Reward, and below it the distance from the start. Returns the panels."""
    reward, kl = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw(reward, steps, "reward/mean", color="C0", alpha=0.35, linewidth=1, label="training prompts, each step")
    smooth = [{"step": line["step"], "smooth": value} for line, value in zip(steps, _smoothed(steps), strict=True)]
    _draw(reward, smooth, "smooth", color="C0", linewidth=2, label="smoothed")
    _draw(reward, evaluations, "reward/mean", color="C1", marker="o", linewidth=1.5, label="held-out prompts")
    reward.set_ylabel(axis("reward/mean"))
    _draw(kl, steps, "policy/kl", color="C2", linewidth=1.5, label="training prompts")
    _draw(kl, evaluations, "policy/kl", color="C1", marker="o", linewidth=1.5, label="held-out prompts")
    kl.set_ylabel(axis("policy/kl"))
    return [reward, kl]


def _draw_losses(figure: Any, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[Any]:
    """The loss of a supervised training. Returns the panel."""
    loss = figure.subplots()
    _draw(loss, steps, "train/loss", color="C0", linewidth=1, label="training examples, each step")
    _draw(loss, evaluations, "heldout/loss", color="C1", marker="o", linewidth=1.5, label="held-out examples")
    loss.set_ylabel(axis("train/loss"))
    return [loss]


def _draw(axes: Any, lines: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    """Plot one metric over the steps; a missing or null value is a gap."""
    values = [math.nan if line.get(name) is None else line[name] for line in lines]
    if not np.isnan(values).all():
        axes.plot([line["step"] for line in lines], values, **style)


def _smoothed(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Centred mean of the reward over a tenth of the run (at least 3 steps); steps without a reward do not count."""
    values = np.array([math.nan if line.get("reward/mean") is None else line["reward/mean"] for line in steps])
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.nan if np.isnan(window).all() else float(np.nanmean(window)) for window in windows]


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
