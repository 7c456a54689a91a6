"""Every judge gets the whole conversation: models, functions that ask for it, services over HTTP, language models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf.cluster import LocalRuntime
from rlhf.reward.judges.llm_judge import Answerer, LlmJudge, Question
from rlhf.reward.judges.wire import prompt_to_json
from rlhf.reward.models import load_model
from rlhf.reward.reading import Example, as_text
from rlhf.reward.serving import http
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Feedback, Prompt, Score, Turn
from tests.reward.services import TOKEN, reward_service
from tests.reward.test_families import PROMPT
from tests.reward.test_http import asked

HERE = "tests.reward.sample_rewards"
CALL = Turn("assistant", "", '{"tool_calls": [{"name": "find"}]}')
CHAT = Prompt("p", (1,), PROMPT[-1].content, {"n": 3}, conversation=PROMPT)
TEXTS = ["Alien.", "Up, perhaps."]


def judged(run: Any, settings: Any, rollout: Any) -> Feedback:
    runtime = LocalRuntime()

    async def scenario() -> Feedback:
        return await (await RewardPool.start(runtime, settings)).judge(replace(rollout, prompt=CHAT))

    try:
        return run(scenario())
    finally:
        runtime.stop()


def values(verdict: Feedback) -> list[float]:
    return [outcome.value for outcome in verdict.outcomes if isinstance(outcome, Score)]


def test_a_model_reads_all_turns(run, tiny_settings, make_text_rollout, classifier, monkeypatch) -> None:
    """In the run, and in a service that the run asks."""
    monkeypatch.setenv("RLHF_REWARD_TOKEN", TOKEN)
    model = load_model(str(classifier), what="conversation")
    whole = model.score([Example(PROMPT, text) for text in TEXTS])
    last = model.score([Example(as_text(CHAT.text), text) for text in TEXTS])
    assert abs(whole - last).min() > 1e-3, "the turns must matter, or any would do"
    here = tiny_settings(reward={"kind": "model", "path": str(classifier), "input": "conversation"})
    assert values(judged(run, here, make_text_rollout(TEXTS))) == pytest.approx(whole, abs=1e-4)
    with reward_service(here) as url:
        there = tiny_settings(reward={"kind": "remote", "path": None, "url": url})
        assert values(judged(run, there, make_text_rollout(TEXTS))) == pytest.approx(whole, abs=1e-4)


def test_a_response_is_never_cut(run, tiny_settings, make_text_rollout, classifier) -> None:
    """The model reads 128 tokens: of a longer conversation the end; a longer response has failed, in words."""
    settings = tiny_settings(reward={"kind": "model", "path": str(classifier), "input": "conversation"})
    texts = ["a" * 100, "a" * 99 + "b", "a" * 200]
    first, second, third = judged(run, settings, make_text_rollout(texts)).outcomes
    assert isinstance(first, Score) and isinstance(second, Score) and first.value != second.value
    assert isinstance(third, Failed) and "tokens long, and the reward model reads 128" in third.reason


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [("function", "hears", 4.03), ("function", "hears_all", 4.03), ("pairwise_function", "compares_turns", 1 / 2)],
)
def test_a_function_may_ask_for_all_turns(kind, name, expected, run, tiny_settings, make_text_rollout) -> None:
    settings = tiny_settings(reward={"kind": kind, "path": f"{HERE}:{name}"})
    assert values(judged(run, settings, make_text_rollout(TEXTS))) == [pytest.approx(expected)] * 2


def test_a_service_is_asked_with_messages_or_a_prompt(run, tiny_settings) -> None:
    settings = tiny_settings(reward={"path": f"{HERE}:hears"})
    turns = [turn.message() for turn in PROMPT]
    questions = [
        {"messages": turns, "responses": ["a"]},
        {"prompt": "No.", "responses": ["a"]},
        {"responses": ["a"]},
        {"prompt": "No.", "messages": turns, "responses": ["a"]},
        {"messages": [{"role": "", "content": "x"}], "responses": ["a"]},
        {"messages": [{"role": "user"}], "responses": ["a"]},
    ]
    good, bad = (replies for replies in (asked(run, settings, questions[:3]), asked(run, settings, questions[3:])))
    assert [reply.json()["outcomes"][0]["value"] for reply in good] == pytest.approx([4.03, 1.03, 1.0])
    assert [reply.status_code for reply in bad] == [422] * 3
    assert "has `prompt` and `messages`; give one of them" in bad[0].json()["error"]
    assert "`messages[0].role`" in bad[1].json()["error"] and "`messages[0].content`" in bad[2].json()["error"]


def test_what_is_asked_becomes_the_same_prompt() -> None:
    for prompt in (CHAT, Prompt("p", (1,), "Hi"), Prompt("p", (1,), "x", conversation=(CALL, PROMPT[0]))):
        question = http.Question.model_validate({**prompt_to_json(prompt), "responses": ["a"]})
        assert question.as_prompt().conversation == prompt.conversation
        assert question.as_prompt().text == prompt.conversation[-1].content
    assert "messages" not in prompt_to_json(Prompt("p", (1,), "Hi")), "as services of an older version take it"


class Reads(Answerer):
    """Answers by what it is asked: which part of the conversation is there."""

    def __init__(self, most: int):
        self.most, self.questions = most, []

    def fits(self, question: str) -> bool:
        return len(question) <= self.most

    async def first_wins(self, question: str, deadline_s: float) -> float:
        self.questions.append(question)
        return 0.5


@pytest.mark.parametrize("most", [1000, 60, 30, 5])
def test_a_language_model_is_asked_about_the_end_of_what_is_too_long(most: int, run) -> None:
    answerer = Reads(most)

    async def scenario() -> list[Any]:
        return await LlmJudge(Question("<{prompt}> {a} or {b}?"), answerer).judge(CHAT, [("one", "two")], 1.0)

    run(scenario())
    whole = "System: Be kind.\n\nUser: Which film?\n\nAssistant: A sad one?\n\nUser: No."
    (question,) = answerer.questions
    end = "> one or two?"
    kept = max(0, min(len(whole), most - len(end) - 1))
    assert question == f"<{whole[len(whole) - kept :]}{end}"
