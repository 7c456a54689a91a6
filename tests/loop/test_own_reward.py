"""The user's own reward function, through the command line: what is wrong with it is said once, by its own lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli import main

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
CODE = """
def misspelt(prompt, response, payload):
    return wanted(payload) in response

def wanted(payload):
    return payload["anwser"]

def sometimes(prompt, response, payload):
    if payload.get("anwser") == response:
        return 1.0
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`train(name, options)`: the status of a run in a folder with the user's module, which is judged by this function of it."""
    monkeypatch.chdir(tmp_path)
    name = f"rewards_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)

    def run(function: str, *options: str) -> int:
        own = [f"reward.path={name}:{function}", "loop.steps=2", "data.eval_prompts=null", "rollout.max_tokens=4"]
        return main(["train", TINY, *own, *options])

    return run


def test_an_error_in_a_call_is_found_before_the_run_with_the_users_lines(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train("misspelt", "--dry-run") == train("misspelt") == 2
    said = capsys.readouterr().err
    assert "KeyError: 'anwser'" in said and '.py:6 in wanted: return payload["anwser"]' in said
    assert ".py:3 in misspelt: return wanted(payload) in response" in said
    assert "rlhf/" not in said and not (tmp_path / "runs").exists()


@pytest.mark.engine
def test_a_function_that_gives_no_reward_ends_the_run_with_the_likely_cause(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train("sometimes", "--debug") == 2
    said = capsys.readouterr().err
    assert "step 1: none of the 32 responses has a reward: 32 x invalid (the judge returned None)" in said
    assert "have a `return` in every branch" in said
