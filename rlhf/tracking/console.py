"""The run on the terminal: progress, reward, KL, tokens/s and where the time goes. Knows only what the record wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlhf.config import Settings
from rlhf.tracking.catalogue import phrase, shown, signed

PHASES = {
    "time/generate": ("generate", "cyan"),
    "time/reward": ("reward", "yellow"),
    "time/train": ("train", "magenta"),
    "time/sync": ("sync", "green"),
}
"""The phases of a step: name and colour of their part of the bar."""
ONLINE = ("reward/mean", "policy/kl", "policy/loss", "throughput/tokens_per_s")
EVALUATED = ("reward/mean", "policy/kl", "rollout/length")
SUPERVISED = ("train/loss", "train/grad_norm", "train/learning_rate", "throughput/tokens_per_s")
"""The metrics that a line shows: of a step of the online loop, of its evaluation, of a step of supervised training."""
BAR_WIDTH = 48
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 80, 200
"""How much is shown of a sample."""
SAMPLES = 10
"""How many are shown of a run, besides the first and the last."""

Line = Mapping[str, Any]


def make_console(settings: Settings) -> PlainConsole | LiveConsole | None:
    """What `tracking.console` asks for; `rich` becomes `plain` where the output is not a terminal."""
    if settings.tracking.console == "off":
        return None
    if settings.tracking.console == "rich" and sys.stdout.isatty():
        return LiveConsole(settings.loop.steps, settings.run.dir)
    return PlainConsole(settings.loop.steps)


def time_split(line: Line) -> dict[str, float]:
    """Share of each phase in the step's time, plus `other`; empty if the line has no times. Sums to 1."""
    seconds = {phase: line.get(metric) or 0.0 for metric, (phase, _) in PHASES.items()}
    total = max(line.get("time/step") or 0.0, sum(seconds.values()))
    if total <= 0:
        return {}
    return {phase: value / total for phase, value in seconds.items()} | {"other": 1 - sum(seconds.values()) / total}


def step_text(line: Line, steps: int) -> str:
    """One step in one line of plain text; a metric that is missing or not finite is shown as `-`."""
    split = " ".join(f"{phase} {share:.0%}" for phase, share in time_split(line).items() if share >= 0.005)
    parts = [f"step {line['step']}/{steps}", *(phrase(line, name) for name in ONLINE)]
    parts.append(phrase(line, "time/step") + (f" ({split})" if split else ""))
    parts += [f"{what} {count}" for what, count in left_out(line).items()]
    return "  ".join(parts + [f"! {warning}" for warning in line.get("warnings", ())])


def left_out(line: Line) -> dict[str, int]:
    """What a step could not learn from, or was cut: how many responses are invalid, failed, timed out or truncated, and how many
    prompts were dropped. Only what there is."""
    counts = {name: line.get(f"reward/{name}") or 0 for name in ("invalid", "failed", "timed_out")}
    counts["dropped"] = sum(value or 0 for name, value in line.items() if name.startswith("dropped/"))
    counts["truncated"] = (line.get("rollout/truncated") or 0) * (line.get("rollout/responses") or 0)
    return {name.replace("_", " "): round(count) for name, count in counts.items() if round(count)}


def supervised_text(line: Line, steps: int) -> str:
    """One step of a supervised training in one line of plain text."""
    parts = [f"step {line['step']}/{steps}", *(phrase(line, name) for name in SUPERVISED)]
    return "  ".join(parts + [f"! {warning}" for warning in line.get("warnings", ())])


def evaluation_text(line: Line) -> str:
    """A held-out evaluation of the online loop in one line of plain text."""
    return _held_out(line, EVALUATED)


def _held_out(line: Line, names: Sequence[str]) -> str:
    return "  ".join([f"held-out, after step {line['step']}:", *(phrase(line, name) for name in names)])


def sample_text(row: Line) -> str:
    """One response in one line of plain text, shortened, and without what would steer the terminal."""
    reward = row.get("reward")
    verdict = row.get("outcome", "-") if reward is None else f"reward {signed(reward)}"
    return f"   sample  {readable(row['prompt'], PROMPT_CHARACTERS)} -> {readable(row['response'], RESPONSE_CHARACTERS)}  [{verdict}]"


def readable(text: str, most: int) -> str:
    """On one line of at most `most` characters; what is not printable is escaped."""
    line = " ".join(text[: 4 * most].split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= most else line[: most - 3] + "..."


def shows_sample(step: int, steps: int) -> bool:
    """The first step, the last, and about ten in between."""
    return step in (1, steps) or step % max(1, -(-steps // SAMPLES)) == 0


class _Lines:
    """One line per event, for logs and pipes."""

    def __init__(self, steps: int):
        self._steps, self._began = steps, time.monotonic()

    def phase(self, text: str) -> None:
        """With the seconds since the beginning."""
        print(phase_text(time.monotonic() - self._began, text), flush=True)

    def samples(self, step: int, rows: Sequence[Line]) -> None:
        if rows and shows_sample(step, self._steps):
            print(sample_text(rows[0]), flush=True)

    def close(self) -> None:
        """Nothing is open."""


def phase_text(seconds: float, text: str) -> str:
    """What the run does from now on, in one line."""
    return f"{seconds:6.0f} s  {text}"


class PlainConsole(_Lines):
    """One line per step of the online loop."""

    def step(self, line: Line) -> None:
        print(step_text(line, self._steps), flush=True)

    def evaluation(self, line: Line) -> None:
        print(evaluation_text(line), flush=True)


class SupervisedConsole(_Lines):
    """One line per step of a supervised training, on a terminal too: there is one number to watch."""

    def step(self, line: Line) -> None:
        print(supervised_text(line, self._steps), flush=True)

    def evaluation(self, line: Line) -> None:
        print(_held_out(line, ["heldout/loss"]), flush=True)


class LiveConsole:
    """A panel that is redrawn with each step and keeps its clock running in between."""

    def __init__(self, steps: int, title: str, console: Console | None = None):
        """
        Args:
            console: where to draw; the terminal if None.
        """
        self._title = escape(title)
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=steps)
        self._last: Line | None = None
        self._first_reward: float | None = None
        self._evaluation: Line | None = None
        self._steps = steps
        self._phase = "starting"
        self._began = self._since = time.monotonic()
        self._live = Live(
            get_renderable=self._draw, console=console or Console(), refresh_per_second=2, transient=False
        )
        self._live.start()

    def phase(self, text: str) -> None:
        self._phase, self._since = text, time.monotonic()
        self._live.console.print(
            phase_text(self._since - self._began, text), style="dim", markup=False, highlight=False
        )

    def samples(self, step: int, rows: Sequence[Line]) -> None:
        if rows and shows_sample(step, self._steps):
            self._live.console.print(sample_text(rows[0]), markup=False, highlight=False)

    def step(self, line: Line) -> None:
        self._last, self._since, self._phase = line, time.monotonic(), f"step {line['step'] + 1}"
        if self._first_reward is None:
            self._first_reward = line.get("reward/mean")
        self._progress.update(self._task, completed=line["step"])
        for warning in line.get("warnings", ()):
            self._live.console.print(f"step {line['step']}: {warning}", style="yellow", markup=False)

    def evaluation(self, line: Line) -> None:
        self._evaluation = line
        self._live.console.print(evaluation_text(line), markup=False)

    def close(self) -> None:
        """Leave the last picture on the terminal."""
        self._live.stop()

    def _now(self) -> str:
        return f"{self._phase}, for {time.monotonic() - self._since:.0f} s"

    def _draw(self) -> Panel:
        if self._last is None:
            body: Any = Text(self._now(), style="dim")
            return Panel(Group(self._progress, body), title=self._title)
        line = self._last
        table = Table.grid(padding=(0, 3))
        start = "" if self._first_reward is None else f"  (first step {signed(self._first_reward)})"
        table.add_row("reward", shown(line, "reward/mean") + start, "KL", shown(line, "policy/kl"))
        table.add_row("tokens/s", shown(line, "throughput/tokens_per_s"), "step", phrase(line, "time/step"))
        if left := left_out(line):
            table.add_row("of these", ", ".join(f"{what} {count}" for what, count in left.items()))
        table.add_row("now", Text(self._now()))
        if self._evaluation is not None:
            held_out = shown(self._evaluation, "reward/mean")
            table.add_row("held-out reward", f"{held_out} after step {self._evaluation['step']}")
        return Panel(Group(self._progress, table, split_bar(line)), title=self._title)


def split_bar(line: Line) -> Text:
    """The time split as a coloured bar with its legend."""
    bar, legend, colours = Text(), Text(), dict(PHASES.values())
    for phase, share in time_split(line).items():
        colour = colours.get(phase, "grey50")
        bar.append("█" * round(share * BAR_WIDTH), style=colour)
        legend.append(f"■ {phase} {share:.0%}  ", style=colour)
    return Text("\n").join([bar, legend])
