"""`code`: does the program in the response pass its tests? It runs in a sandbox (`sandbox`), or not at all."""

from __future__ import annotations

import re
import secrets
from typing import Annotated

from pydantic import Field

from rlhf.reward.verifiers.sandbox import Limits, run_program, run_tests
from rlhf.reward.verifiers.verifier import Payload, Verifier

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)


class Example(Payload):
    stdin: str = Field("", description="What the program reads.")
    stdout: str = Field(description="What it must print; blanks at line ends and empty lines at the end do not count.")


class CodeFields(Payload):
    tests: Annotated[list[str], Field(min_length=1)] | Annotated[list[Example], Field(min_length=1)] = Field(
        description="Statements that raise if the program is wrong (`assert square(3) == 9`), which see the names that it "
        "defines; or objects with `stdin` and `stdout`, each a run of the whole program."
    )
    strict: bool = Field(
        True, description="True: 1 if all tests pass, else 0. False: the share of the tests that pass."
    )
    time_limit_s: float = Field(5.0, gt=0, le=60, description="Seconds for the statements together, or for each run.")
    memory_mb: int = Field(512, ge=64, le=65536, description="Memory, in MiB: the address space of a process.")
    forks: bool = Field(
        False,
        description="True: the program may start others (`subprocess`, `multiprocessing`), eight with all threads, each with "
        "`memory_mb` of its own. False: it is one process, with threads.",
    )


class CodeVerifier(Verifier[CodeFields]):
    """Python code from the last fenced block of the response; without one the score is 0.

    A program that raises, hangs, breaks a limit, ends before its tests or prints without end has failed; that is 0, not a failure.
    """

    fields = CodeFields
    time_limit_s = 600.0

    def score(self, prompt: str, response: str, fields: CodeFields) -> float:
        blocks = FENCED.findall(response)
        if not blocks:
            return 0.0
        limits = Limits(
            wall_s=fields.time_limit_s,
            cpu_s=max(1, round(fields.time_limit_s)),
            memory_bytes=fields.memory_mb * 2**20,
            forks=fields.forks,
        )
        statements = [test for test in fields.tests if isinstance(test, str)]
        examples = [test for test in fields.tests if isinstance(test, Example)]
        if statements:
            passed = _statements(blocks[-1], statements, limits)
        else:
            passed = _examples(blocks[-1], examples, limits, fields.strict)
        return float(all(passed)) if fields.strict else sum(passed) / len(fields.tests)


def _statements(code: str, tests: list[str], limits: Limits) -> list[bool]:
    nonce = secrets.token_hex(16)
    verdict = run_tests(code, tests, nonce, limits).verdict
    proof, _, marks = verdict.partition(b" ")
    if proof != nonce.encode() or len(marks) != len(tests):
        return [False] * len(tests)
    return [mark == ord("1") for mark in marks]


def _examples(code: str, examples: list[Example], limits: Limits, strict: bool) -> list[bool]:
    passed = []
    for example in examples:
        ran = run_program(code, example.stdin, limits)
        passed.append(ran.status == 0 and _lines(ran.output.decode("utf-8", "replace")) == _lines(example.stdout))
        if strict and not passed[-1]:
            break  # the others cannot change the score
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
