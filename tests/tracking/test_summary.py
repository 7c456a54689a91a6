"""The end of a run in a few lines: the figures of the record, and commands that can be pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.commands.grammar import parse
from rlhf.commands.report import report
from rlhf.config import Settings
from rlhf.config.sft import SftSettings
from rlhf.tracking.summary import summary


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The files of a run of two steps, in a folder with a space in its name."""
    folder = tmp_path / "my run"
    folder.mkdir()
    steps = [{"step": 1, "reward/mean": 0.0, "dropped/tie": 2}, {"step": 2, "reward/invalid": 3, "warnings": ["odd"]}]
    write(folder / "metrics.jsonl", steps)
    evaluations = [{"reward/mean": 0.01, "rollout/length": 20.0}, {"reward/mean": 0.052, "rollout/length": 18.0}]
    more = [{"step": 0}, {"step": 2, "policy/kl": 0.0123}]
    write(folder / "evaluations.jsonl", [one | other for one, other in zip(evaluations, more, strict=True)])
    for moment, reward in {"before": 0.0, "after": 1.0}.items():
        rows = [{"prompt": text, "response": "r", "reward": reward, "length": 3} for text in ("x" * 99, "What's up?")]
        write(folder / f"heldout_{moment}.jsonl", rows)
    return folder


def test_it_says_what_came_of_the_run_and_what_to_type_next(done: Path, settings: Callable[..., Settings]) -> None:
    (done.parent / "prompts.jsonl").touch()
    lines = summary(settings(done, data={"eval_prompts": "held.jsonl"}), "curve.png")
    text = "\n".join(lines)
    for part in (
        "reward +0.01 -> +0.052 (+0.042), after 2 steps",
        "KL to the start 0.0123",
        "win rate against the start 100.0%, 95% interval 34.2% to 100.0%, over 2 prompts",
        "invalid 3, dropped 2",
        "in 1 of 2 steps",
        "curve       curve.png",
        f"model       {done / 'export'}",
    ):
        assert part in text or part.replace("invalid 3, dropped 2", "dropped 2, invalid 3") in text
    generate, evaluate = (shlex.split(line.removeprefix("next").strip()) for line in lines if line.startswith("next"))
    args = parse(generate[1:])
    assert (args.command, args.model, args.prompt) == ("generate", str(done / "export"), ["What's up?"])
    args = parse(evaluate[1:])
    assert (args.command, args.config, args.policy) == ("eval", str(done / "config.yaml"), str(done / "export"))


@pytest.mark.parametrize(
    ("sections", "nexts", "model"),
    [
        ({}, ["generate"], "export"),
        ({"checkpoint": {"export": False, "every": 2}}, ["generate"], "my run"),
        ({"checkpoint": {"export": False, "every": 0}}, [], None),
        (
            {"data": {"eval_prompts": "h"}, "reward": {"kind": "pairwise_function", "path": "m:f"}},
            ["generate"],
            "export",
        ),
    ],
)
def test_only_commands_that_can_work_are_shown(
    done: Path, settings: Callable[..., Settings], sections: dict, nexts: list[str], model: str | None
) -> None:
    lines = summary(settings(done, **sections), "-")
    assert [line.split()[2] for line in lines if line.startswith("next")] == nexts
    assert [Path(line[12:]).name for line in lines if line.startswith("model")] == ([model] if model else [])


def test_a_supervised_run_has_losses_and_a_curve_of_them(
    done: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for file in done.glob("*.jsonl"):
        file.unlink()
    write(done / "metrics.jsonl", [{"step": step, "train/loss": 3.0 - step} for step in (1, 2)])
    write(done / "evaluations.jsonl", [{"step": step, "heldout/loss": 3.0 - step} for step in (0, 2)])
    report(SftSettings(run={"dir": str(done)}, data={"examples": "e.jsonl"}, policy={"model": str(tiny_model)}))
    shown = capsys.readouterr().out
    assert "loss 3 -> 1 (-2.000), after 2 steps" in shown and "rlhf train CONFIG policy.model=" in shown
    assert (done / "curve.png").stat().st_size > 10_000


def test_without_matplotlib_one_line_says_how_to_get_the_curve(
    done: Path, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report(settings(done, tracking={"console": "plain"}))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curve")]
    assert "not drawn" in line and "[plots]" in line


def test_a_torn_record_does_not_spoil_a_run_that_has_ended(
    done: Path, settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    for file in done.glob("*.jsonl"):
        file.write_text('{"step": ')
    report(settings(done, tracking={"console": "plain"}))
    assert "curve       not drawn" in capsys.readouterr().out
