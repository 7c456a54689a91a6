"""What `rlhf generate` writes, and when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.commands import evaluate
from rlhf.commands.evaluate import Asked
from rlhf.commands.generate import write_rows
from rlhf.config import UserError
from rlhf.tracking.report import HeldOut

NAN = float("nan")


def row(prompt: str, response: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **more}


def test_rows_are_written_in_order_as_soon_as_they_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"

    async def run() -> int:
        first, second = asyncio.Event(), asyncio.Event()

        async def answer(number: int, after: asyncio.Event, then: asyncio.Event | None) -> list[dict[str, Any]]:
            await after.wait()
            if then is not None:
                then.set()
            return [row(f"p{number}", "é")] * number

        second.set()  # the second prompt is done first
        answers = [answer(1, first, None), answer(2, second, first), answer(0, second, None)]
        return await write_rows(answers, str(out))

    assert asyncio.run(run()) == 3
    assert [json.loads(line)["prompt"] for line in out.read_text(encoding="utf-8").splitlines()] == ["p1", "p2", "p2"]
    assert "3 of 3 prompts" in capsys.readouterr().err


def test_what_was_done_outlives_a_failure(tmp_path: Path) -> None:
    ended = []

    async def good() -> list[dict[str, Any]]:
        return [row("p", "r")]

    async def bad() -> list[dict[str, Any]]:
        raise RuntimeError("the engine has died")

    async def slow() -> list[dict[str, Any]]:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)
        return []

    with pytest.raises(RuntimeError, match="the engine has died"):
        asyncio.run(write_rows([good(), bad(), slow()], str(tmp_path / "out.jsonl")))
    assert json.loads((tmp_path / "out.jsonl").read_text()) == row("p", "r")
    assert ended, "nothing goes on behind it"


def test_a_person_reads_text_and_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    async def answer() -> list[dict[str, Any]]:
        return [row("Hi?", "Yes.", reward=0.5), row("Hi?", "No.")]

    asyncio.run(write_rows([answer()], None))
    assert capsys.readouterr().out == "> Hi?\nYes. [reward 0.5]\n\n> Hi?\nNo.\n\n"


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no-model", "--prompt", "Hi", "--out", str(tmp_path / "none" / "out.jsonl")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("ours", [[1.0, NAN, 2.0], [NAN, 3.0, NAN]], ids=["some", "none"])
def test_only_prompts_with_a_reward_for_both_answers_are_compared(
    tiny_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ours: list[float]
) -> None:
    judged = {"a": ours, "b": [0.5, NAN, NAN]}

    async def answered(settings: Any, model: str, *_: Any) -> HeldOut:
        return HeldOut([""] * 3, [""] * 3, judged[model], [1] * 3)

    monkeypatch.setattr(evaluate, "as_model", lambda name, _: nullcontext(name))
    monkeypatch.setattr(evaluate, "held_out_prompts", lambda *_: [Asked(model, [None] * 3, None) for model in judged])
    monkeypatch.setattr(evaluate, "_judged_answers", answered)
    settings = tiny_settings(data={"eval_prompts": "unused.jsonl"})
    if ours[0] == 1:
        evaluate.evaluate(settings, "a", "b", None)
        assert "win rate  1.000" in (shown := capsys.readouterr().out) and "over 1 prompts" in shown
    else:
        with pytest.raises(UserError, match="none of 3 held-out prompts has a reward for both answers"):
            evaluate.evaluate(settings, "a", "b", None)
