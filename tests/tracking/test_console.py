"""What a person sees of a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.config import Settings
from rlhf.tracking import Record
from rlhf.tracking.console import (
    LiveConsole,
    PlainConsole,
    SupervisedConsole,
    make_console,
    sample_text,
    shows_sample,
    split_bar,
    step_text,
    time_split,
)

LINE = {
    "step": 3,
    "reward/mean": 1.25,
    "policy/kl": 0.0125,
    "policy/loss": 0.69,
    "throughput/tokens_per_s": 321.4,
    "time/generate": 4.0,
    "time/reward": 1.0,
    "time/train": 3.0,
    "time/sync": 1.0,
    "time/step": 10.0,
}


def test_the_time_split_sums_to_one() -> None:
    assert time_split(LINE) == pytest.approx({"generate": 0.4, "reward": 0.1, "train": 0.3, "sync": 0.1, "other": 0.1})
    assert time_split({"step": 1}) == {}
    overlapping = time_split({"time/generate": 3.0, "time/train": 3.0, "time/step": 4.0})
    assert overlapping == pytest.approx({"generate": 0.5, "reward": 0.0, "train": 0.5, "sync": 0.0, "other": 0.0})


def test_a_step_in_one_line() -> None:
    assert step_text(LINE, 10) == (
        "step 3/10  reward +1.250  kl 0.0125  loss 0.6900  321 tokens/s  "
        "10.0 s (generate 40% reward 10% train 30% sync 10% other 10%)"
    )
    assert "kl -" in step_text({"step": 1, "policy/kl": None, "warnings": ["policy/kl is nan"]}, 10)
    assert "! policy/kl is nan" in step_text({"step": 1, "warnings": ["policy/kl is nan"]}, 10)


def test_what_was_not_learned_from_is_shown_where_there_is_any() -> None:
    some = {
        "reward/invalid": 3.0,
        "reward/failed": 0.0,
        "reward/timed_out": 1.0,
        "dropped/tie": 4.0,
        "dropped/identical": 1.0,
        "rollout/truncated": 0.25,
        "rollout/responses": 32.0,
    }
    assert step_text(LINE | some, 10).endswith("  invalid 3  timed out 1  dropped 5  truncated 8")
    assert step_text(LINE | dict.fromkeys(some, 0.0), 10) == step_text(LINE, 10)


@pytest.mark.parametrize(
    ("reward", "shown"),
    [
        (0.0, "+0.000"),
        (-12.34567, "-12.346"),
        (0.1, "+0.100"),
        (0.01234, "+0.0123"),
        (-0.00042, "-0.00042"),
        (3e-7, "+3e-07"),
    ],
)
def test_a_small_reward_keeps_its_digits(reward: float, shown: str) -> None:
    assert f"reward {shown}  " in step_text(LINE | {"reward/mean": reward}, 10)


def test_the_bar_is_as_long_as_the_shares() -> None:
    bar = split_bar(LINE)
    assert bar.plain.splitlines()[0].count("█") == pytest.approx(48, abs=2)
    assert "generate 40%" in bar.plain
    assert split_bar({"step": 1}).plain.strip() == ""


def test_the_choice_of_console(
    folder: Path, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_console(settings(folder, tracking={"console": "off"})) is None
    assert isinstance(make_console(settings(folder, tracking={"console": "plain"})), PlainConsole)
    assert isinstance(make_console(settings(folder, tracking={"console": "rich"})), PlainConsole)  # no terminal here
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    live = make_console(settings(folder, tracking={"console": "rich"}))
    assert isinstance(live, LiveConsole)
    live.close()


def test_the_live_picture_shows_the_run() -> None:
    screen = io.StringIO()
    live = LiveConsole(10, "runs/[demo]", Console(file=screen, force_terminal=True, width=100))
    live.evaluation({"step": 0, "reward/mean": -0.5})
    live.step(LINE | {"step": 1, "reward/mean": 0.25})
    live.step(LINE | {"warnings": ["policy/loss is nan"], "dropped/tie": 2})
    live.close()
    text = screen.getvalue()
    for part in (
        "runs/[demo]",
        "3/10",
        "+1.250",
        "first step +0.250",
        "0.0125",
        "321",
        "generate 40%",
        "loss is nan",
        "dropped 2",
        "step 4, for 0 s",
    ):
        assert part in text
    assert "held-out reward" in text


HOSTILE = {"prompt": "[red]say\nit[/red]", "response": "a\x1b[2Jb\u202e " + "long " * 200, "reward": 0.001234}


def test_a_sample_is_one_short_line_that_steers_no_terminal() -> None:
    text = sample_text(HOSTILE)
    assert text.startswith("   sample  [red]say it[/red] -> a\\x1b[2Jb\\u202e long")
    assert text.endswith("...  [reward +0.00123]") and len(text) < 330 and text.isprintable()
    assert sample_text(HOSTILE | {"reward": None, "outcome": "Invalid"}).endswith("[Invalid]")
    assert len(sample_text({"prompt": "\x00" * 10**6, "response": "\x00" * 10**6})) < 330


def test_samples_are_shown_at_the_start_at_the_end_and_now_and_then() -> None:
    assert [step for step in range(1, 6) if shows_sample(step, 5)] == [1, 2, 3, 4, 5]
    assert [step for step in range(1, 101) if shows_sample(step, 100)] == [1, *range(10, 101, 10)]
    assert [step for step in range(1, 26) if shows_sample(step, 25)] == [1, 3, 6, 9, 12, 15, 18, 21, 24, 25]


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_phases_and_samples_are_shown(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    live = kind == "live"
    console = LiveConsole(9, "run", Console(file=screen, force_terminal=True, width=400)) if live else PlainConsole(9)
    console.phase("starting [policy]")
    console.samples(1, [HOSTILE])
    console.samples(2, [])
    console.close()
    shown = screen.getvalue() if live else capsys.readouterr().out
    assert "0 s  starting [policy]" in shown
    assert "[red]say it[/red] -> a\\x1b[2Jb" in shown
    assert not live or "starting [policy], for 0 s" in shown, "what goes on has a running clock"


def test_plain_lines_come_from_the_record(
    folder: Path, settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    with Record(settings(folder, tracking={"console": "plain"}), resume=False) as record:
        record.evaluation(0, {"reward/mean": 0.5, "rollout/length": 20.0})
        record.step(1, {"reward/mean": 0.5})
    out = capsys.readouterr().out
    assert "held-out, after step 0:  reward +0.500" in out
    assert "step 1/100  reward +0.500  kl -" in out


def test_a_terminal_that_went_away_does_not_stop_the_run(
    folder: Path,
    settings: Callable[..., Settings],
    lines: Callable[[Path], list[dict]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record(settings(folder, tracking={"console": "plain"}), resume=False)

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Gone())
        record.step(1, {"reward/mean": 0.5})
    record.step(2, {"reward/mean": 0.5})
    assert len(lines(folder / "metrics.jsonl")) == 2


def test_a_supervised_run_shows_its_loss(capsys: pytest.CaptureFixture) -> None:
    console = SupervisedConsole(9)
    console.evaluation({"step": 0, "heldout/loss": 3.25})
    console.step(
        {"step": 2, "train/loss": 1.5, "train/grad_norm": 0.25, "train/learning_rate": 1e-5, "warnings": ["odd"]}
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "held-out, after step 0:  loss 3.2500"
    assert shown[1] == "step 2/9  loss 1.5000  gradient 0.25  rate 1.00e-05  - tokens/s  ! odd"
