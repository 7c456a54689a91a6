"""Responses written to be evaluated: to forge a verdict, to change later ones, to hang or to take memory."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import pytest

from rlhf.reward.verifiers import worker
from rlhf.reward.verifiers.expressions import NotAllowed, formula, value
from rlhf.reward.verifiers.verifier import Payload, Verifier, make_verifier
from rlhf.reward.verifiers.workers import WorkerPool
from rlhf.types import Failed, TimedOut

CODE = [
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "[x for x in (1, 2)]",
    "(lambda: 1)()",
    "f'{1}'",
    "exec('x = 1')",
    "open(3)",
    "x.real",
    "x[0]",
    "(x := 1)",
    "sqrt(*(1, 2))",
    "sqrt(x, evaluate=0)",
    "_",
    "1 if 1 else 2",
    "1; 2",
    "x = 1",
    "(" * 60_000,
    "-" * 60_000 + "1",
    "1+" * 60_000,
    "\x00",
    "",
]


@pytest.mark.parametrize("text", CODE)
def test_code_is_no_value(text):
    with pytest.raises(NotAllowed):
        value(text)


@pytest.mark.parametrize(
    "text", [text for text in CODE if text not in ("exec('x = 1')", "open(3)")] + ["'text'", "[1]"]
)
def test_code_is_no_formula(text):
    with pytest.raises(NotAllowed):
        formula(text)


def test_a_name_that_python_knows_is_a_name_without_a_meaning():
    for text in (
        "open(3)",
        "exec(x)",
        "eval(x)",
        "preview(x)",
        "exit(0)",
        "ｅxec(3)",
        "sympify(x)",
    ):
        assert str(formula(text)).endswith(")")
    assert str(formula("lambdify + vars")) == "lambdify + vars"


def test_values_and_formulas_are_read():
    assert value(" [['a', 1], (2, -3.5), {4: {5}}] ") == [["a", 1], (2, -3.5), {4: {5}}]
    assert value("(0x3a + 0x1b) << 0x2") == 340
    assert float(formula("(4 + 8) / 3 * 2**2")) == 16.0
    assert str(formula("2*x**2 + sin(x)*exp(-x) + C").diff("x")) == str(
        formula("4*x + exp(-x)*cos(x) - exp(-x)*sin(x)")
    )


def entry_of(dataset: str) -> dict[str, Any]:
    import reasoning_gym

    return json.loads(json.dumps(reasoning_gym.create_dataset(dataset, seed=1, size=1)[0]))


def evaluating() -> list[str]:
    """Data sets of reasoning-gym in whose module something is evaluated."""
    from reasoning_gym.factory import DATASETS

    sources = {name: inspect.getsource(sys.modules[made.__module__]) for name, (made, _) in DATASETS.items()}
    return [
        name
        for name, text in sources.items()
        if any(word in text for word in ("eval(", "parse_expr", "sympify", "exec("))
    ]


def test_no_scorer_of_reasoning_gym_evaluates_an_answer_as_code():
    verifier = make_verifier("reasoning_gym")
    executed: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "exec" and "rlhf_marker" in arguments[0].co_names:
            executed.append(arguments[0])

    sys.addaudithook(watch)
    names = evaluating()
    assert {"countdown", "puzzle24", "spiral_matrix", "n_queens", "simple_integration"} <= set(names)
    for name in names:
        entry = entry_of(name)
        for answer in ("rlhf_marker(1)", "[rlhf_marker]", "x + rlhf_marker.real", "[[rlhf_marker(1)]]"):
            verifier.score("?", answer, verifier.read({"dataset": name, "entry": entry}))
        assert not executed, name
        assert name == "propositional_logic" or (
            verifier.score("?", entry["answer"], verifier.read({"dataset": name, "entry": entry})) == 1.0
        )
    watching = False


class Gullible(Verifier[Payload]):
    """Runs its response, as a scorer might in which a hole is found one day."""

    fields = Payload

    def score(self, prompt: str, response: str, fields: Payload) -> float:
        names: dict[str, Any] = {"verifier": self}
        exec(response, names)
        return names.get("score", 0.25)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("score = 0.5", {"value": 0.5}),
        ("type(verifier).score = lambda *a: 1.0", {"value": 0.25}),
        ("import builtins, json; builtins.float = json.dumps = lambda *a: '1.0'", None),
        ("import sys; sys.modules.clear()", None),
        ("import os; [os.write(n, b'{\"value\": 1.0}\\n' * 2) for n in (0, 1, 2, 3)]; os._exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("import os; os.kill(os.getpid(), 9)", "failed"),
        ("import os; os.write(3, b'{\"error\": 1}'); os._exit(0)", "failed"),
        ("import os; os.write(3, b'[' * 60000); os._exit(0)", "failed"),
        ("import os\nwhile True: os.write(3, b'x' * 60000)", "failed"),
        ("import os; os.close(3)\nwhile True: pass", "failed"),
        ("while True: pass", "timed_out"),
        ("import signal, time; signal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: time.sleep(1)", "timed_out"),
        ("def f(): f()\nf()", "failed"),
        ("raise SystemExit", "failed"),
    ],
)
def test_a_response_reaches_no_verdict_but_its_own(monkeypatch, response, answer):
    monkeypatch.setattr(worker, "MEMORY_BYTES", 2**46)  # this process has more in it than a worker
    verifier, request = Gullible(), {"prompt": "?", "payload": {}, "limit_s": 20.0}
    limit_s = 0.5 if answer == "timed_out" else 20.0
    found = worker.apart(verifier, request | {"response": response, "limit_s": limit_s})
    assert answer is None or (found == answer if isinstance(answer, dict) else answer in found)
    assert worker.apart(verifier, request | {"response": "score = 0.75"}) == {"value": 0.75}


def verdicts(run, name: str, questions: list[tuple[str, dict[str, Any]]], limit_s: float) -> list[Any]:
    """Of one worker, one after the other."""

    async def scenario() -> list[Any]:
        pool = await WorkerPool.start(name, 1)
        try:
            return [await pool.verify("?", response, payload, limit_s) for response, payload in questions]
        finally:
            pool.close()

    return run(scenario())


@pytest.mark.engine
def test_reasoning_gym_in_its_worker(run):
    countdown, spiral = ({"dataset": name, "entry": entry_of(name)} for name in ("countdown", "spiral_matrix"))
    right = countdown["entry"]["answer"]
    spy = f"[] if __import__('os').path.exists({__file__!r}) else {spiral['entry']['answer'].split()!r}"
    questions = [
        (right, countdown),
        ("9**9**9**9", countdown),
        ("factorial(10**9)", countdown),
        (f"{right} + 0*open(3)", countdown),
        ("__import__('os')._exit(0)", countdown),
        (spy, spiral),
        (spiral["entry"]["answer"], spiral),
        (right, countdown),
    ]
    found = verdicts(run, "reasoning_gym", questions, 3.0)
    assert found[0] == found[6] == found[7] == 1.0
    assert all(isinstance(one, TimedOut | Failed) or one < 0.1 for one in found[1:6])


@pytest.mark.engine
def test_mathematics_in_its_worker(run):
    bombs = ["$9^{9^{9^{9}}}$", "(" * 20_000 + "1" + ")" * 20_000, "9" * 100_000]
    questions = [(text, {"answer": "4"}) for text in ("4", *bombs, "__import__('os')._exit(0)", "the answer is $2^2$")]
    found = verdicts(run, "math", questions, 4.0)
    assert found[0] == found[-1] == 1.0
    assert all(isinstance(one, TimedOut | Failed) or one == 0.0 for one in found[1:-1])
