"""Best-of-N and rejection sampling: which responses are kept, and the command's own path with the real engine and judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.commands.best_of import Selection, generate_best
from rlhf.commands.generate import ask
from rlhf.config import load
from rlhf.config.loader import UserError
from rlhf.engines.sampling import Sampling
from rlhf.types import Failed, Feedback, Invalid, Score

CONFIG = """
data: {prompts: asset:tiny-prompts.jsonl}
policy: {model: asset:tiny-llama, dtype: fp32}
rollout: {cpu_kv_cache_gb: 0.1}
reward: {kind: function, path: "tests.helpers:mean_byte"}
cluster: {device: cpu, threads: 1}
"""
VERDICT = Feedback("p", (Score(1.0), Failed("x"), Score(3.0), Score(3.0), Invalid("y")))


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        (Selection(), [(2, 3.0, True)]),
        (Selection(at_least=3.5), []),
        (Selection(all=True), [(0, 1.0, False), (2, 3.0, True), (3, 3.0, False)]),
        (Selection(all=True, at_least=2.0), [(2, 3.0, True), (3, 3.0, False)]),
    ],
)
def test_what_is_kept(selection: Selection, kept: list[tuple[int, float, bool]]) -> None:
    assert selection.kept(VERDICT) == kept
    assert selection.kept(Feedback("p", (Failed("x"),))) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--best-of", "4"], "--reward-config CONFIG"),
        (["--keep-all"], "belong to --best-of"),
        (["--best-of", "4", "--n", "2", "--reward-config", "x.yaml"], "Leave out --n"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "asset:tiny-llama", "--prompt", "Hi", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def judge(tmp_path: Path):
    path = tmp_path / "judge.yaml"
    path.write_text(CONFIG)
    return load(path)


@pytest.mark.parametrize("sampling", [Sampling(n=1, max_tokens=4), Sampling(n=4, max_tokens=4, temperature=0.0)])
def test_there_must_be_something_to_choose_from(judge, sampling: Sampling) -> None:
    question = ask("asset:tiny-llama", None, ["Hi"], 4)
    with pytest.raises(UserError, match="--best-of chooses among different responses"):
        generate_best(question, judge, sampling, Selection(), None)


@pytest.mark.engine
def test_the_best_of_four_is_written_with_its_reward(judge, tmp_path: Path) -> None:
    question, sampling = ask("asset:tiny-llama", None, ["Hi", "Ho"], 8), Sampling(n=4, max_tokens=8)

    def rows(name: str, selection: Selection) -> list[dict]:
        generate_best(question, judge, sampling, selection, str(tmp_path / name))
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    everything, best = rows("all", Selection(all=True)), rows("best", Selection())
    assert len(everything) == 8 and sum(row["best"] for row in everything) == 2
    for prompt, row in zip(("Hi", "Ho"), best, strict=True):
        of_prompt = [one for one in everything if one["prompt"] == prompt]
        assert len({one["reward"] for one in of_prompt}) > 1
        assert row["reward"] == max(one["reward"] for one in of_prompt)
        assert row["response"] in [one["response"] for one in of_prompt if one["best"]]
