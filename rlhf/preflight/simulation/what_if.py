"""The answer of `rlhf plan --simulate`: the run as it was measured, its own simulation with the error of that, and other layouts and
bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.cluster.devices import shared_engines
from rlhf.config import Settings, UserError, load
from rlhf.preflight.simulation.events import simulate
from rlhf.preflight.simulation.fit import Fitted, fit
from rlhf.preflight.simulation.recorded import Measured, RecordedRun, read_run
from rlhf.preflight.simulation.scenario import Scenario, require_varied, scenario

BOUNDS = (0, 1, 2, 4)
"""Values of `loop.staleness` that are compared."""
SPLITS = 8
"""Divisions of the devices between engines and ranks that are compared, at most."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    scenario: Scenario
    result: Measured


@dataclass(frozen=True)
class WhatIf:
    """All that is said.

    Attributes:
        measured, itself: the run, and its own simulation.
        asked: with the overrides; None without any.
        others: the same devices with other bounds, and then divided otherwise.
        refused: bounds that the settings refuse -> why.
        best: of all that were simulated for these devices, the one with the shortest step.
    """

    run: RecordedRun
    fitted: Fitted
    measured: Row
    itself: Row
    asked: Row | None
    others: Sequence[Row]
    refused: Mapping[int, str]
    best: Row


def what_if(folder: str, overrides: Sequence[str]) -> WhatIf:
    """Args:
        overrides: `section.key=value`, of fields whose effect is simulated.

    Raises:
        UserError: the folder holds no run with enough steps, or an override is wrong.
    """
    require_varied(overrides)
    run = read_run(folder)
    fitted = fit(run)
    own = scenario(run.settings, run.settings)
    itself = Row("simulated", own, simulate(own, fitted))
    settings = _with(run, overrides)
    asked = Row("asked for", scenario(settings, run.settings), itself.result)
    if overrides:
        asked = Row(asked.what, asked.scenario, simulate(asked.scenario, fitted))
    others, refused = [], {}
    for bound in BOUNDS:
        if bound == asked.scenario.staleness:
            continue
        try:
            other = scenario(_with(run, [*overrides, f"loop.staleness={bound}"]), run.settings)
        except UserError as error:
            refused[bound] = str(error).splitlines()[-1].strip(" -")
        else:
            others.append(Row("other bound", other, simulate(other, fitted)))
    best = _best([asked, *others])
    for engines, ranks in _splits(settings):
        split = [
            *overrides,
            f"loop.staleness={best.scenario.staleness}",
            f"rollout.engines={engines}",
            f"policy.ranks={ranks}",
        ]
        other = scenario(_with(run, split), run.settings)
        others.append(Row("other split", other, simulate(other, fitted)))
    return WhatIf(
        run=run,
        fitted=fitted,
        measured=Row("measured", own, run.measured),
        itself=itself,
        asked=asked if overrides else None,
        others=others,
        refused=refused,
        best=_best([asked, *others]),
    )


def _with(run: RecordedRun, overrides: Sequence[str]) -> Settings:
    return load(Path(run.folder) / "config.yaml", overrides)


def _best(rows: Sequence[Row]) -> Row:
    """The first of those with the shortest step."""
    return min(rows, key=lambda row: row.result.step_s)


def _splits(settings: Settings) -> Iterator[tuple[int, int]]:
    """Other divisions of as many devices between engines and ranks, evenly spread; none where they share devices."""
    size, ranks = settings.rollout.tensor_parallel_size, settings.policy.ranks
    devices = settings.rollout.engines * size + ranks
    if shared_engines(settings, debug=False):
        return
    possible = [(engines, devices - engines * size) for engines in range(1, (devices - 1) // size + 1)]
    apart = max(1, -(-len(possible) // SPLITS))
    for engines, ranks in possible[(len(possible) - 1) % apart // 2 :: apart]:
        if engines != settings.rollout.engines:
            yield engines, ranks


def text(answer: WhatIf) -> str:
    """In words, with the table."""
    return "\n".join([*_fitted(answer), "", *_table(answer), "", *_conclusions(answer)])


def _fitted(answer: WhatIf) -> Iterator[str]:
    run, fitted = answer.run, answer.fitted
    decoding, whole, piece, end = fitted.decoding, fitted.whole, fitted.piece, fitted.end
    yield f"{run.folder}: {len(run.steady)} steady steps of {len(run.windows)}, {len(run.answers):,} prompts"
    yield "Fitted to it:"
    yield f"  an engine's decoding step: {_ms(decoding.step)}, and {_ms(decoding.sequence)} for each sequence in it"
    learning = f"{_ms(whole.fixed)} and {_ms(1000 * whole.per_token)} per 1,000 tokens of a rank"
    if answer.itself.scenario.stream:
        learning = (
            f"a piece {_ms(piece.fixed)} and {_ms(1000 * piece.per_token)} per 1,000 tokens of a rank, the end of a step "
            f"{_ms(end.fixed)} and {_ms(1000 * end.per_token)}"
        )
    yield f"  learning: {learning}; publishing {_ms(sum(fitted.publish) / len(fitted.publish))}; else {_ms(fitted.other_s)} a step"
    judged = [one.judged_s for one in fitted.answers]
    yield f"  judging: {_ms(sum(judged) / len(judged))} a prompt; {run.learned_share:.0%} of what is sampled is learned from"


def _table(answer: WhatIf) -> Iterator[str]:
    yield "             engines  ranks   k  prompts  tokens  seconds a step  idle engines  idle policy  response tokens/s"
    rows = [answer.measured, answer.itself, *([answer.asked] if answer.asked else []), *answer.others]
    for row in rows:
        one, result = row.scenario, row.result
        best = "  <- best" if row == answer.best else ""
        yield (
            f"{row.what:<12} {one.engines:7,} {one.ranks:6,} {one.staleness:3} {one.prompts:8,} {one.max_tokens:7,} {result.step_s:15.3g} "
            f"{result.idle_engines:13.1%} {result.idle_policy:12.1%} {result.tokens_per_s:18,.0f}{best}"
        )


def _conclusions(answer: WhatIf) -> Iterator[str]:
    measured, itself, best = answer.measured.result, answer.itself.result, answer.best
    yield (
        f"The simulation of the run itself is off by {itself.step_s / measured.step_s - 1:+.1%} of a step's time, "
        f"{100 * (itself.idle_engines - measured.idle_engines):+.1f} points of the engines' idle share and "
        f"{100 * (itself.idle_policy - measured.idle_policy):+.1f} points of the policy's; what it says of others is no better than that."
    )
    if not answer.fitted.batches_differ:
        yield (
            "All prompts were written in batches of about the same size, so the time of a sequence cannot be told from that of a decoding "
            "step: what other numbers of engines or sequences do is a guess."
        )
    if answer.refused:
        yield f"Not simulated: loop.staleness {', '.join(map(str, answer.refused))}. {next(iter(answer.refused.values()))}"
    one = best.scenario
    yield (
        f"Best of these: rollout.engines={one.engines} policy.ranks={one.ranks} loop.staleness={one.staleness}, "
        f"{best.result.step_s:.3g} s a step"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def as_numbers(answer: WhatIf) -> dict[str, object]:
    """The rows for a program."""
    rows = [answer.measured, answer.itself, *([answer.asked] if answer.asked else []), *answer.others]
    return {
        "run": answer.run.folder,
        "fitted": {name: asdict(getattr(answer.fitted, name)) for name in ("decoding", "whole", "piece", "end")},
        "rows": [{"what": row.what} | asdict(row.scenario) | asdict(row.result) for row in rows],
        "best": asdict(answer.best.scenario) | asdict(answer.best.result),
    }
