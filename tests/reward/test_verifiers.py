"""Verifiers: known answers, the fields of a prompt's line, and worker processes that hang or die."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.reward import VERIFIERS
from rlhf.reward.errors import RewardError
from rlhf.reward.verifiers.constraints import CHECKS
from rlhf.reward.verifiers.instructions import loosened
from rlhf.reward.verifiers.judge import VerifierJudge
from rlhf.reward.verifiers.verifier import PayloadError, check_prompts, make_verifier
from rlhf.reward.verifiers.workers import WorkerPool
from rlhf.types import Failed, Invalid, Prompt, TimedOut

DOCS = Path(__file__).parents[2] / "docs" / "verifiers.md"


def score(name: str, response: str, payload: dict[str, Any]) -> float:
    """The verifier's score, in this process."""
    verifier = make_verifier(name)
    return verifier.score("the prompt", response, verifier.read(payload))


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("1/2", r"so the answer is $\frac{2}{4}$", 1.0),
        (r"\frac{1}{2}", "The answer is 0.5.", 1.0),
        (1000, "That makes 1,000 apples", 1.0),
        ("x^2-1", "$(x-1)(x+1)$", 1.0),
        (r"\{1,2\}", r"$\{2,1\}$", 1.0),
        ("3", r"\boxed{3} is not it, \boxed{4} is", 0.0),
        ("4", "first 3, then 4", 1.0),
        ("$5$", "6", 0.0),
        ("5", "I do not know", 0.0),
        ("5", "", 0.0),
    ],
)
def test_mathematical_equivalence(answer: str | int, response: str, right: float) -> None:
    assert score("math", response, {"answer": answer}) == right


# One constraint with its parameters, a response that meets it, and one that does not.
MET = {
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"},
        "Dr. Smith went home.",
        "He went. She did too.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n***\n***\ntwo"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Later"},
        "first\n\nlater, it rained",
        "later\n\nfirst",
    ),
    "keywords:existence": ({"keywords": ["sea", "Sun"]}, "The SEA and the sunset", "The sea alone"),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "A category", "A Cat."),
    "keywords:frequency": (
        {"keyword": "c++", "frequency": 2, "relation": "at least"},
        "C++ is c++",
        "c++ is c",
    ),
    "keywords:letter_frequency": (
        {"letter": "A", "let_frequency": 2, "let_relation": "less than"},
        "an owl",
        "Anna",
    ),
    "punctuation:no_comma": ({}, "no pause", "a, b"),
    "language:response_language": ({"language": "de"}, "Das ist ein schöner Tag heute.", "This is a fine day today."),
    "change_case:english_capital": ({}, "THIS IS A FINE DAY FOR A WALK", "This is a fine day for a walk"),
    "change_case:english_lowercase": ({}, "this is a fine day for a walk", "This is a fine day for a walk"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        "A WELL-KNOWN fact".lower() + " WELL-KNOWN",
        "ONE and TWO",
    ),
    "startend:end_checker": ({"end_phrase": "The end."}, 'So it was "the end."', "The end. Or not"),
    "startend:quotation": ({}, ' "all of it" ', '"a part" of it'),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "say it. Yes.", "Yes. Say it."),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\np. s. Write!", "Bye."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name], [place]", "[name]"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b\n**bold**", "* a\n* b\n* c"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nx\nSection 2\ny",
        "Section one, Section 2",
    ),
    "detectable_format:title": ({}, "<<A tale>>\nOnce", "<< >>\nOnce"),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    "detectable_format:constrained_response": ({}, "I think: My answer is maybe.", "Maybe."),
}


def test_every_constraint_has_an_example() -> None:
    assert set(MET) == set(CHECKS)


@pytest.mark.parametrize("name", MET)
def test_constraints(name: str) -> None:
    parameters, good, bad = MET[name]
    payload = {"instruction_id_list": [name], "kwargs": [parameters]}
    assert [score("instructions", text, payload) for text in (good, bad, " \n")] == [1.0, 0.0, 0.0]


def test_several_constraints_are_counted() -> None:
    payload = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"],
        "kwargs": [{"num_words": None}, {}, {}],  # a published file has every parameter in every line, mostly null
    }
    assert score("instructions", '"<<A tale>>, told"', payload) == pytest.approx(2 / 3)
    assert score("instructions", '"<<A tale>>, told"', payload | {"strict": True}) == 0.0
    assert score("instructions", '"<<A tale>> told"', payload | {"strict": True}) == 1.0


def test_the_loose_count_forgives_a_first_line() -> None:
    payload = {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]}
    response = 'Of course, here it is:\n{"a": 1}\nAnything else?'
    assert score("instructions", response, payload) == 0.0
    assert score("instructions", response, payload | {"loose": True}) == 1.0


@hypothesis.settings(max_examples=25)  # guessing languages takes its time
@given(st.text(alphabet="ab* \n", max_size=30))
def test_what_is_met_is_met_loosely(response: str) -> None:
    assert loosened(response)[0] == response
    payload = {"instruction_id_list": list(MET), "kwargs": [MET[name][0] for name in MET]}
    assert score("instructions", response, payload) <= score("instructions", response, payload | {"loose": True})


@pytest.mark.parametrize(
    ("payload", "response", "right"),
    [
        ({"pattern": r"answer: \w+"}, "my answer: yes", 1.0),
        ({"pattern": r"answer: \w+", "match": "full"}, "my answer: yes", 0.0),
        (
            {"pattern": r"ANSWER: (\w+)", "flags": ["ignorecase"], "group": 1, "answer": "no"},
            "answer: yes answer: no",
            1.0,
        ),
        ({"pattern": r"answer: (\w+)", "group": 1, "answer": "yes"}, "answer: yes answer: no", 0.0),
        ({"pattern": r"^b(?P<rest>.*)", "flags": ["multiline"], "group": "rest", "answer": " x "}, "a\nb x", 1.0),
        ({"pattern": r"a(b)?", "group": 1, "answer": "b"}, "a", 0.0),
        ({"pattern": r"<a>.*</a>", "flags": ["dotall"], "match": "full"}, "<a>\n</a>", 1.0),
    ],
)
def test_patterns(payload: dict[str, Any], response: str, right: float) -> None:
    assert score("regex", response, payload) == right


@pytest.mark.parametrize(
    "dataset", ["arc_agi", "basic_arithmetic", "countdown", "course_schedule", "leg_counting", "zebra_puzzles"]
)
def test_the_right_answer_is_right_after_a_way_through_json(dataset: str) -> None:
    import reasoning_gym

    entry = json.loads(json.dumps(reasoning_gym.create_dataset(dataset, seed=3, size=1)[0]))
    assert score("reasoning_gym", str(entry["answer"]), {"dataset": dataset, "entry": entry}) == 1.0


def test_a_task_of_reasoning_gym() -> None:
    import reasoning_gym

    entry = json.loads(json.dumps(reasoning_gym.create_dataset("leg_counting", seed=1, size=1)[0]))
    payload = {"dataset": "leg_counting", "entry": entry}
    assert score("reasoning_gym", f"Let me count. <answer>{entry['answer']}</answer>", payload) == 1.0
    assert score("reasoning_gym", entry["answer"], payload) == 1.0
    assert score("reasoning_gym", f"{entry['answer']} <answer>x</answer>", payload) < 0.1


@pytest.mark.parametrize(
    ("name", "payload", "message"),
    [
        ("math", {}, "field `answer`: missing"),
        ("math", {"answer": " "}, "field `answer`: empty"),
        ("math", {"answer": True}, "field `answer"),
        ("instructions", {"instruction_id_list": ["x:y"], "kwargs": [{}]}, "there is no constraint `x:y`"),
        ("instructions", {"instruction_id_list": ["startend:quotation"], "kwargs": []}, "`kwargs`: has 0 entries"),
        (
            "instructions",
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keyword": "x"}]},
            r"field `kwargs\.0\.keywords`: Field required",
        ),
        ("reasoning_gym", {"dataset": "none", "entry": {}}, "no data set `none`"),
        ("reasoning_gym", {"dataset": "composite", "entry": {}}, "name the task's own"),
        ("reasoning_gym", {"dataset": "leg_counting", "entry": {"question": ""}}, "has no `answer`"),
        ("regex", {"pattern": "("}, "not a regular expression"),
        ("regex", {"pattern": "a", "group": 1, "answer": "x"}, "no group 1"),
        ("regex", {"pattern": "(a)", "group": 1}, "give both or neither"),
        ("regex", {"pattern": "a", "flags": ["x"]}, r"field `flags\.0`"),
        ("code", {"tests": []}, "field `tests"),
        ("code", {"tests": ["assert 1"], "time_limit_s": 0}, "field `time_limit_s`"),
    ],
)
def test_a_line_that_cannot_be_verified_against(name: str, payload: dict[str, Any], message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        make_verifier(name).read(payload)


def test_prompts_are_checked_before_a_run() -> None:
    prompts = [Prompt("good", (1,), "2+2?", {"answer": 4}), Prompt("0123", (1,), "What is 1+1?", {"answr": 2})]
    check_prompts("math", prompts[:1], "train.jsonl")
    with pytest.raises(RewardError, match=r"train\.jsonl: prompt 0123 \(`What is 1\+1\?`\): field `answer`: missing"):
        check_prompts("math", prompts, "train.jsonl")


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_field_is_documented(name: str) -> None:
    """The page lists exactly the verifier's fields, in its own section, and with its own words."""
    section = re.split(rf"^## .*`{name}`.*$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", re.split(r"^## ", section, flags=re.MULTILINE)[0], re.MULTILINE)
    fields = make_verifier(name).fields.model_fields
    assert rows == [(field, info.description) for field, info in fields.items()]


def verified(run, name: str, responses: list[str], payload: dict[str, Any], settings, deadline_s: float = 60.0) -> list:
    """What the judge of a server says, from worker processes."""

    async def scenario() -> list:
        judge = await VerifierJudge.start(name, settings)
        try:
            items = [(response,) for response in responses]
            return await judge.judge(Prompt("p", (1,), "?", payload), items, deadline_s)
        finally:
            judge.close()

    return run(scenario())


def test_a_response_that_hangs_is_timed_out_and_holds_no_other_up(run, tiny_settings, monkeypatch) -> None:
    monkeypatch.setattr("rlhf.reward.verifiers.patterns.RegexVerifier.time_limit_s", 1.0)
    responses = ["ab", "a" * 60, "b", "a" * 60, "aab"]
    values = verified(run, "regex", responses, {"pattern": "(a+)+b", "match": "full"}, tiny_settings())
    assert values == [1.0, TimedOut(1.0), 0.0, TimedOut(1.0), 1.0]


def test_a_line_at_fault_is_invalid(run, tiny_settings) -> None:
    (value,) = verified(run, "regex", ["x"], {"patern": "x"}, tiny_settings())
    assert value == Invalid("field `pattern`: missing")


def test_a_worker_that_dies_is_replaced(run) -> None:
    async def scenario() -> list:
        pool = await WorkerPool.start("regex", 1)
        try:
            ask = ("?", "ab", {"pattern": "b"}, 5.0)
            before = await pool.verify(*ask)
            (worker,) = pool._all
            worker._process.kill()
            return [before, await pool.verify(*ask), await pool.verify(*ask)], list(pool._all)
        finally:
            pool.close()

    (before, lost, after), workers = run(scenario())
    assert [worker._process.poll() for worker in workers] == [-9], "closing ends the workers"
    assert (before, after) == (1.0, 1.0)
    assert isinstance(lost, Failed) and "ended with status -9" in lost.reason


def test_a_worker_that_cannot_be_replaced_is_tried_again(run, monkeypatch) -> None:
    async def scenario() -> list:
        pool = await WorkerPool.start("regex", 1)
        try:
            ask = ("?", "ab", {"pattern": "b"}, 5.0)
            (worker,) = pool._all
            monkeypatch.setattr("rlhf.reward.verifiers.workers.WORKER", "no.such.module")
            worker._process.kill()
            lost = [await pool.verify(*ask), await pool.verify(*ask)]
            monkeypatch.undo()
            return [*lost, await pool.verify(*ask)]
        finally:
            pool.close()

    lost, again, after = run(scenario())
    assert "ended with status -9" in lost.reason and "as it started" in again.reason
    assert after == 1.0


def test_the_deadline_counts_from_the_question(run, tiny_settings) -> None:
    values = verified(run, "regex", ["a" * 60], {"pattern": "(a+)+b", "match": "full"}, tiny_settings(), deadline_s=0.3)
    assert values == [TimedOut(0.3)]


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    monkeypatch.delitem(__import__("sys").modules, "rlhf.reward.verifiers.mathematics", raising=False)
    with pytest.raises(RewardError, match=r"needs the package that holds `math_verify`.*\.\[verifiers\]"):
        make_verifier("math")


def test_all_verifiers_can_be_made() -> None:
    assert all(asyncio.iscoroutinefunction(make_verifier(name).score) is False for name in VERIFIERS)
