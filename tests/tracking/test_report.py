"""Curve, table and summary, made from a run folder alone."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.config import UserError
from rlhf.tracking import report
from rlhf.tracking.report import HeldOut

NAN = float("nan")


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


def held_out(rewards: list[float], word: str = "good") -> HeldOut:
    n = len(rewards)
    return HeldOut([f"prompt {i}" for i in range(n)], [f"[{word}] {i}" for i in range(n)], rewards, [10] * n)


@pytest.mark.parametrize(
    ("before", "after", "rate"),
    [
        ([0.0, 0.0], [1.0, 1.0], 1.0),
        ([1.0, 1.0], [0.0, 0.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], 0.625),
        ([0.0, NAN, 0.0], [1.0, 1.0, NAN], 1.0),
    ],
)
def test_win_rate(before: list[float], after: list[float], rate: float) -> None:
    assert report.win_rate(before, after)[0] == rate


@pytest.mark.parametrize(("wins", "n"), [(0, 8), (1, 2), (20, 32), (32, 32), (300, 400)])
def test_the_interval_holds_the_rates_that_the_wins_do_not_refute(wins: int, n: int) -> None:
    """Wilson's bounds are the true rates from which what was seen is 1.96 standard errors away."""
    rate, interval = report.win_rate([0.0] * n, [1.0] * wins + [-1.0] * (n - wins))
    assert interval[0] <= rate <= interval[1]
    for bound in interval:
        assert abs(rate - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), abs=1e-5)


def test_all_prompts_saying_the_same_prove_no_certainty() -> None:
    assert report.win_rate([0.0] * 2, [1.0] * 2)[1] == pytest.approx((0.342, 1.0), abs=1e-3)
    assert report.win_rate([0.0] * 64, [1.0] * 64)[1] == pytest.approx((0.943, 1.0), abs=1e-3)


def test_win_rate_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        report.win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no prompt has a reward on both sides"):
        report.win_rate([NAN, 1.0], [1.0, NAN])


def test_an_unjudged_response_is_left_out_not_zero() -> None:
    before, after = held_out([1.0, 2.0, 3.0]), held_out([2.0, NAN, 5.0])
    comparison = report.compare(before, after, [0.0, 9.0, 0.5], [0.5, 9.0, 1.0], 0.125)
    assert (comparison.n_prompts, comparison.n_unjudged) == (2, 1)
    assert comparison.before == report.Average(2.0, 0.25, 10.0)
    assert comparison.after == report.Average(3.5, 0.75, 10.0)
    assert comparison.win_rate == 1.0


def test_sides_with_other_prompts_are_refused() -> None:
    other = HeldOut(["another"], ["x"], [1.0], [1])
    with pytest.raises(ValueError, match="same prompts"):
        report.compare(held_out([1.0]), other, [0.0], [0.0], None)
    with pytest.raises(ValueError, match="one length"):
        HeldOut(["a"], ["b", "c"], [1.0], [1])


def test_summary_has_the_promised_fields(tmp_path: Path) -> None:
    comparison = report.compare(held_out([0.0, 0.0]), held_out([1.0, 2.0]), [0.1, 0.1], [0.6, 0.6], 0.17)
    path = report.write_summary(tmp_path, comparison, seconds=12.34, steps=24)
    summary = json.loads(path.read_text())
    assert path == tmp_path / "summary.json"
    assert summary["before"] == {"reward": 0.0, "judge": 0.1, "length": 10.0}
    assert summary["after"] == {"reward": 1.5, "judge": 0.6, "length": 10.0}
    assert summary["kl_per_token"] == 0.17
    assert summary["win_rate"] == 1.0
    assert summary["win_rate_interval"] == pytest.approx([0.342, 1.0], abs=1e-3)
    assert (summary["seconds"], summary["steps"]) == (12.3, 24)


def test_table_and_pairs_show_the_figures() -> None:
    before, after = held_out([0.0, NAN, 0.0, 0.0], "bad"), held_out([1.5, 1.5, 1.5, 1.5])
    comparison = report.compare(before, after, [0.1] * 4, [0.6] * 4, 0.17)
    table = printed(report.before_after_table(comparison, "VADER"))
    for part in ("3 held-out prompts", "+1.500", "VADER", "+0.600", "0.1700", "100.0%", "1 more had no reward"):
        assert part in table
    pairs = printed(report.sample_pairs(before, after))
    assert "[bad] 0" in pairs  # brackets in a response are text, not markup
    assert "prompt 2" in pairs
    assert "prompt 3" not in pairs


def test_held_out_answers_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "heldout_after.jsonl"
    rows = [{"prompt": "p", "response": "r", "reward": 0.5, "length": 3}]
    rows.append({"prompt": "q", "response": "s", "reward": None, "length": 4})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = report.read_held_out(path)
    assert (read.prompts, read.lengths, read.rewards[0]) == (["p", "q"], [3, 4], 0.5)
    assert math.isnan(read.rewards[1])
    path.write_text('{"prompt": "p"}\n')
    with pytest.raises(UserError, match=r"heldout_after\.jsonl.*'response'"):
        report.read_held_out(path)
    with pytest.raises(UserError, match="no held-out answers"):
        report.read_held_out(tmp_path / "none.jsonl")


def test_the_curve_is_drawn_from_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step yet"):
        report.plot(tmp_path)
    metrics = [{"step": s, "reward/mean": None if s == 4 else s / 10, "policy/kl": s / 100} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 9, "rew')
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "reward/mean": 0.0}\n{"step": 8, "reward/mean": 0.8}\n')
    path = report.plot(tmp_path)
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_a_run_without_rewards_still_has_a_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": null}\n')
    assert report.plot(tmp_path).exists()
