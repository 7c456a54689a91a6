"""What a user's reward function raises, of whatever class, is the outcome of the response that it was called for, and tells the line."""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.algorithms import make
from rlhf.algorithms.registry import AlgorithmError
from rlhf.config import Settings, UserError
from rlhf.reward.errors import RewardError
from rlhf.reward.functions import load_function
from rlhf.reward.judges.function_judge import FunctionJudge
from rlhf.reward.judges.workplace import Workplace
from rlhf.reward.scoring import outcome_of
from rlhf.types import Failed, Invalid, Prompt, Score, TimedOut
from tests.reward import raising

PROMPT = Prompt("p", (1,), "a prompt", {"answer": "x"})
LINE = "tests/reward/raising.py:"
EXPECTED = {
    "key": "KeyError: 'anwser'",
    "stop": "StopIteration: no more",
    "stop_async": "StopAsyncIteration: no more",
    "own": "OwnBase: mine",
    "exit": "SystemExit: 3",
    "closed": "GeneratorExit",
    "cancelled": "CancelledError: by me",
    "timeout": "TimeoutError",
    "unspeakable": "Unspeakable: its message cannot be shown, because that raised ZeroDivisionError",
    "long": f"ValueError: {'x' * 400} ...",
    "recursion": "RecursionError: maximum recursion depth exceeded",
}
IN_THREAD = pytest.mark.parametrize("inline", [True, False], ids=["debug", "thread"])


def judged(run: Any, function: Any, responses: list[str], inline: bool, deadline_s: float = 60.0) -> list[Any]:
    workplace = Workplace(inline)
    try:
        items = [(response,) for response in responses]
        return [outcome_of(value) for value in run(FunctionJudge(function, workplace).judge(PROMPT, items, deadline_s))]
    finally:
        workplace.close()


@IN_THREAD
@pytest.mark.parametrize("function", [raising.score, raising.score_async], ids=["plain", "async"])
def test_whatever_is_raised_fails_its_own_response(run: Any, function: Any, inline: bool) -> None:
    outcomes = judged(run, function, ["four", *EXPECTED, "sixsix"], inline)
    assert outcomes[0] == Score(4.0) and outcomes[-1] == Score(6.0)
    for outcome, (response, message) in zip(outcomes[1:-1], EXPECTED.items(), strict=True):
        if function is raising.score_async and response == "stop":
            message = "RuntimeError: coroutine raised StopIteration"  # Python itself says so
        assert isinstance(outcome, Failed), (response, outcome)
        assert outcome.reason.startswith(message), outcome
        assert LINE in outcome.reason, outcome
    line = inspect.getsourcelines(raising.score)[1] + 2
    assert outcomes[1].reason.startswith(f"KeyError: 'anwser' ({LINE}{line} in score: return payload[\"anwser\"]")


def test_an_interrupt_that_the_code_raises_is_an_outcome_and_ctrl_c_is_not(run: Any) -> None:
    """Ctrl-C reaches the main thread alone."""
    failed, score = judged(run, raising.interrupts, ["interrupt", "x"], inline=False)
    assert failed.reason.startswith("KeyboardInterrupt (") and score == Score(1.0)
    with pytest.raises(KeyboardInterrupt):
        raise_from(run, inline=True)


def raise_from(run: Any, inline: bool) -> None:
    judge = FunctionJudge(raising.interrupts, Workplace(inline))
    judge._called("a prompt", "interrupt", {})


@IN_THREAD
def test_a_list_that_breaks_while_it_is_read_fails_all_its_responses(run: Any, inline: bool) -> None:
    assert judged(run, raising.all_at_once, ["four", "sixsix"], inline) == [Score(4.0), Score(6.0)]
    for response, message in EXPECTED.items():
        if response == "stop":
            message = "RuntimeError: generator raised StopIteration"
        outcomes = judged(run, raising.all_at_once, ["four", response], inline)
        assert all(isinstance(one, Failed) and one.reason.startswith(message) for one in outcomes), (response, outcomes)


def test_what_has_no_order_is_no_list(run: Any) -> None:
    for outcome in judged(run, raising.as_mapping, ["a", "b"], inline=True):
        assert outcome == Failed("the function returned {0: 1.0, 1: 1.0}, which is not a list")


def test_a_value_that_breaks_when_it_is_looked_at_is_a_failure(run: Any) -> None:
    odd, huge, sound = judged(run, raising.odd, ["odd", "huge", "x"], inline=True)
    assert odd == Failed("the judge returned an object of the class Odd, which is not a number")
    assert isinstance(huge, Failed) and sound == Score(1.0)


def test_a_function_that_refuses_to_be_cancelled_is_not_waited_for(run: Any) -> None:
    async def scenario() -> list[Any]:
        raising.GATE[:] = [asyncio.Event()]
        outcomes = await FunctionJudge(raising.stubborn, Workplace(True)).judge(PROMPT, [("x",)], 0.05)
        raising.GATE[0].set()
        return outcomes

    assert run(asyncio.wait_for(scenario(), 60)) == [TimedOut(0.05)]


def test_a_call_that_is_given_up_is_cancelled(run: Any) -> None:
    """A cancelled judging must not be taken for a function that raised CancelledError."""
    ended = []

    async def waits(prompt: str, response: str, payload: Any) -> float:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(response)
        return 1.0

    async def scenario() -> None:
        task = asyncio.ensure_future(FunctionJudge(waits, Workplace(True)).judge(PROMPT, [("x",), ("y",)], 60.0))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(5):
            await asyncio.sleep(0)

    run(scenario())
    assert sorted(ended) == ["x", "y"]


@pytest.mark.parametrize("name", ["forgets", "forgets_async"])
def test_a_function_without_a_return_is_refused(name: str) -> None:
    with pytest.raises(RewardError, match=r"has no `return` statement with a value \(.*raising.py:\d+\)"):
        load_function(f"tests.reward.raising:{name}")


def test_a_function_that_returns_at_times_or_never_ends_by_itself_is_not_refused(run: Any) -> None:
    for name in ("forgets_at_times", "at_times_in_one_line", "raises_only", "all_at_once", "decorated"):
        load_function(f"tests.reward.raising:{name}")
    invalid, score = judged(run, raising.forgets_at_times, ["", "x"], inline=True)
    assert invalid == Invalid("the judge returned None") and score == Score(1.0)


def test_a_built_in_function_without_a_signature_is_no_crash() -> None:
    assert load_function("builtins:max") is max


@IN_THREAD
def test_a_model_that_raises_stop_iteration_is_not_waited_for(run: Any, inline: bool) -> None:
    workplace = Workplace(inline)
    with pytest.raises(RuntimeError, match="StopIteration"):
        run(asyncio.wait_for(workplace.run(next, iter(())), 60))
    workplace.close()


@IN_THREAD
def test_an_error_shows_the_users_lines_and_none_of_ours(run: Any, inline: bool) -> None:
    """Where it was raised, what stands there, and where that was called."""
    (outcome,) = judged(run, raising.nested, ["x"], inline)
    place = r"tests/reward/raising\.py:\d+ in"
    lines = (
        rf"{place} looked_up: return payload\[\"anwser\"\]; called at {place} nested: return looked_up\(payload\) \+ 1"
    )
    expected = rf"KeyError: 'anwser' \({lines}\)"
    assert isinstance(outcome, Failed) and re.fullmatch(expected, outcome.reason), outcome


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("my.py:score", "Name the module, not its file: `my:score`"),
        ("./my.py:score", "Name the module, not its file: `my:score`"),
        ("/home/me/my.py:score", "Name the module, not its file: `my:score`"),
        ("~/my.py:score", "Name the module, not its file: `my:score`"),
        (":x", "is not an import path. Write `module:name`"),
        ("a:", "is not an import path"),
        ("a:b:c", "is not an import path"),
        ("..a:b", "is not an import path"),
        ("a b:c", "is not an import path"),
        ("a\0:c", "is not an import path"),
        ("builtins:dict", "is a class"),
        ("builtins:nothing", "has no function `nothing`"),
        ("tests.reward.raising:Judge", "is a class"),
        ("tests.reward.raising:GATE", "has no function `GATE`"),
        ("tests.reward.raising:yields", "is a generator"),
        ("tests.reward.raising:yields_async", "is a generator"),
        ("tests.reward.raising:deeper", r"must take 3 arguments, \(prompt, response, payload\); it takes \(depth\)"),
    ],
)
def test_what_is_no_function_to_judge_with_is_refused(path: str, says: str) -> None:
    with pytest.raises(RewardError, match=says) as refused:
        load_function(path)
    assert str(refused.value).startswith("`reward.path`: ")


def test_an_object_that_can_be_called_judges() -> None:
    assert load_function("tests.reward.raising:judge") is raising.judge


# At import, and in an algorithm

MODULE = """
import json
{at_import}
def reward(prompt, response, payload):
    return 1.0

def declare(settings):
    return options(settings)["anwser"]

def options(settings):
    return settings.algorithm.options
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`module(code)`: the name of a fresh module in the folder that the run is started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(at_import: str = "") -> str:
        name = f"code_of_a_user_{len(list(tmp_path.glob('*.py')))}_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(MODULE.format(at_import=at_import))
        return name

    return make


@pytest.mark.parametrize(
    ("at_import", "message", "line"),
    [
        ('TABLE = {}["x"]', "KeyError: 'x'.", '.py:3 in <module>: TABLE = {}["x"]'),
        ("raise SystemExit('no')", "SystemExit: no.", ".py:3 in <module>: raise SystemExit('no')"),
        ("json.loads('{')", "JSONDecodeError: Expecting", ".py:3 in <module>: json.loads('{')"),
        (
            "import nltk_is_not_here",
            "No module named 'nltk_is_not_here'.",
            ".py:3 in <module>: import nltk_is_not_here",
        ),
        ("def broken(:", "SyntaxError: invalid syntax (", "py, line 3)"),
    ],
)
def test_an_error_at_import_shows_the_users_line(module: Any, at_import: str, message: str, line: str) -> None:
    name = module(at_import)
    with pytest.raises(RewardError) as reward:
        load_function(f"{name}:reward")
    with pytest.raises(AlgorithmError) as algorithm:
        make(own(f"{name}:declare"))
    for error, field in ((reward, "reward.path"), (algorithm, "algorithm.name")):
        text = str(error.value)
        assert text.startswith(f"`{field}`: cannot import the module `{name}`") and message in text and line in text
        assert "rlhf/" not in text, "no lines of ours"


def test_an_algorithm_that_breaks_shows_the_users_line(module: Any) -> None:
    name = module()
    with pytest.raises(AlgorithmError, match="raised KeyError: 'anwser'") as broken:
        make(own(f"{name}:declare"))
    assert str(broken.value).endswith(f'{name}.py:8 in declare: return options(settings)["anwser"]')
    with pytest.raises(AlgorithmError, match="has no function `nothing`"):
        make(own(f"{name}:nothing"))


def test_what_an_algorithm_says_to_its_user_is_passed_on(module: Any) -> None:
    name = module(
        "from rlhf.config import UserError\ndef declare(settings):\n    raise UserError('options.beta is missing')\nkept = declare"
    )
    with pytest.raises(UserError, match="^options.beta is missing$"):
        make(own(f"{name}:kept"))


def own(path: str) -> Settings:
    sections = {"data": {"prompts": "p"}, "policy": {"model": "m"}, "reward": {"path": "r"}}
    return Settings.model_validate(sections | {"algorithm": {"name": path}})
