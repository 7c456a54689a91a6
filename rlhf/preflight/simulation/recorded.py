"""What the simulator learns a run from: its folder, as numbers. Reads config.yaml, metrics.jsonl and spans.jsonl, nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import Settings, UserError, load
from rlhf.tracking import jsonl
from rlhf.tracking.spans import busy_s, idle_share

Lines = Sequence[Mapping[str, Any]]
MOST_STEPS = 200
"""The last ones that are looked at."""
STEADY = 3
"""Steps at least that a measurement needs, besides those of beginning and end."""


def whole_periods(steps: Sequence[int], bound: int) -> Sequence[int]:
    """The last of these steps, a multiple of `loop.staleness + 1`: prompts that were started together come back together, so that one long
    step is followed by as many short ones as the loop may be ahead."""
    return steps[len(steps) % (bound + 1) :]


def least_steps(bound: int) -> int:
    """How many steps a run must have recorded."""
    return 2 * bound + 1 + (bound + 1) * math.ceil(STEADY / (bound + 1))


@dataclass(frozen=True)
class Answer:
    """One prompt's sampling and judging.

    Attributes:
        start, stop: of the sampling, in seconds since 1970.
        tokens: of each response.
        judged_s: seconds until the verdicts were there.
    """

    engine: str
    start: float
    stop: float
    prompt_tokens: int
    tokens: tuple[int, ...]
    judged_s: float

    @property
    def n_tokens(self) -> int:
        return self.prompt_tokens + sum(self.tokens)


@dataclass(frozen=True)
class Learning:
    """One call of the ranks.

    Attributes:
        part: the step as a whole, one piece of it, or the end of a step that came in pieces.
        tokens: that are forwarded; of the end, those of all pieces.
    """

    step: int
    part: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A run, or a simulation of one, in its steady steps: means over them.

    Attributes:
        idle_engines, idle_policy: see the metrics of these names.
        tokens_per_s: response tokens over the whole time.
    """

    step_s: float
    idle_engines: float
    idle_policy: float
    tokens_per_s: float


@dataclass(frozen=True)
class RecordedRun:
    """What a run folder says.

    Attributes:
        windows: loop step -> when it began and ended, in seconds since 1970.
        steady: the steps that count: not the first ones, in which nothing was ahead yet, nor the last ones, in which nothing more is.
        learned_share: tokens that were learned from over tokens that were sampled (and their prompts).
        taught_share: prompts that taught something over prompts that were taken.
        other_s: seconds of a steady step in which the loop neither waited nor learned nor published.
    """

    folder: str
    settings: Settings
    windows: Mapping[int, tuple[float, float]]
    steady: Sequence[int]
    answers: Sequence[Answer]
    learning: Sequence[Learning]
    publishes: Sequence[tuple[float, float]]
    learned_share: float
    taught_share: float
    other_s: float
    measured: Measured


def read_run(folder: str) -> RecordedRun:
    """The run in this folder.

    Raises:
        UserError: it is none of `rlhf train`, recorded no timings, or too few steps; or its files are damaged.
    """
    path = Path(folder)
    if not os.path.isfile(path / "config.yaml"):
        raise UserError(
            f"--simulate {folder}: there is no config.yaml, so this is no run folder. Give the run.dir of a run of `rlhf train`"
        )
    settings = load(path / "config.yaml", [])
    try:
        metrics = [line for line in jsonl.each(path / "metrics.jsonl") if "time/step" in line]
        first = max((line["step"] for line in metrics), default=0) - MOST_STEPS
        metrics = [line for line in metrics if line["step"] > first]
        spans = [line for line in jsonl.each(path / "spans.jsonl") if line["step"] > first]
        return _recorded(folder, settings, spans, metrics)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--simulate {folder}: spans.jsonl or metrics.jsonl has a line that no run writes ({error!r}). Restore the files, or give "
            "another run"
        ) from error


def _recorded(folder: str, settings: Settings, spans: Lines, metrics: Lines) -> RecordedRun:
    answers, learning = _answers(spans), _learning(spans)
    if not answers:
        raise UserError(
            f"--simulate {folder}: spans.jsonl has no line of an engine, so nothing is known of sampling. Give a run that samples and "
            "that this version of rlhf recorded"
        )
    steady = _steady(folder, [line["step"] for line in metrics], settings.loop.staleness)
    windows = {line["step"]: (line["time"] - line["time/step"], line["time"]) for line in metrics}
    trained = sum(line.get("loop/prompts_trained") or 0 for line in metrics)
    dropped = sum(value or 0 for line in metrics for name, value in line.items() if name.startswith("dropped/"))
    sampled = sum(answer.n_tokens for answer in answers)
    learned = sum(one.tokens for one in learning if one.part != "piece")
    return RecordedRun(
        folder=folder,
        settings=settings,
        windows=windows,
        steady=steady,
        answers=answers,
        learning=learning,
        publishes=[_times(line) for line in spans if line["what"] == "publish"],
        learned_share=learned / sampled,
        taught_share=trained / max(1, trained + dropped),
        other_s=_other_s(spans, windows, steady),
        measured=_measured(spans, windows, steady, settings.rollout.engines),
    )


def _steady(folder: str, steps: Sequence[int], bound: int) -> Sequence[int]:
    last = max(steps, default=0)
    steady = whole_periods([step for step in steps if bound + 1 < step <= last - bound], bound)
    if len(steady) < STEADY:
        raise UserError(
            f"--simulate {folder}: {len(steps)} steps are recorded, but with loop.staleness {bound} at least {least_steps(bound)} are "
            f"needed: the first {bound + 1} and the last {bound} are unlike the others. Let the run take more steps (loop.steps, --resume)"
        )
    return steady


def _times(line: Mapping[str, Any]) -> tuple[float, float]:
    return line["start"], line["stop"]


def _answers(spans: Lines) -> list[Answer]:
    """In the order of their start."""
    judged = {line["place"]: line["stop"] - line["start"] for line in spans if line["what"] == "judge"}
    found = [
        Answer(*_of(line), judged_s=judged.get(line["place"], 0.0))
        for line in spans
        if line["what"] == "sample" and line["tokens"]
    ]
    return sorted(found, key=lambda answer: answer.start)


def _of(line: Mapping[str, Any]) -> tuple[str, float, float, int, tuple[int, ...]]:
    return line["who"], line["start"], line["stop"], line["prompt_tokens"], tuple(line["tokens"])


def _learning(spans: Lines) -> list[Learning]:
    found = []
    for line in spans:
        if line["what"] == "learn":
            part = "piece" if "piece" in line else "end" if "pieces" in line else "whole"
            found.append(Learning(line["step"], part, line["tokens"], line["stop"] - line["start"]))
    return found


def _other_s(spans: Lines, windows: Mapping[int, tuple[float, float]], steady: Sequence[int]) -> float:
    known = [_times(line) for line in spans if line["what"] in ("wait", "learn", "publish")]
    seconds = [stop - start - busy_s(known, start, stop) for start, stop in (windows[step] for step in steady)]
    return max(0.0, sum(seconds) / len(seconds))


def _measured(
    spans: Lines, windows: Mapping[int, tuple[float, float]], steady: Sequence[int], engines: int
) -> Measured:
    """Weighed by time: what a run of many steps would have."""
    busy: dict[str, list[tuple[float, float]]] = {}
    for line in spans:
        busy.setdefault(line["who"], []).append(_times(line))
    policy = {"policy": busy.pop("policy", [])}
    writing = {who: intervals for who, intervals in busy.items() if who.startswith("engine-")}
    seconds = idle_engines = idle_policy = 0.0
    for start, stop in (windows[step] for step in steady):
        seconds += stop - start
        idle_engines += (stop - start) * idle_share(writing, engines, start, stop)
        idle_policy += (stop - start) * idle_share(policy, 1, start, stop)
    tokens = sum(sum(line["tokens"]) for line in spans if line["what"] == "sample" and line["step"] in set(steady))
    return Measured(seconds / len(steady), idle_engines / seconds, idle_policy / seconds, tokens / seconds)
