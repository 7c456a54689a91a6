"""Verdicts remembered by content."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rlhf.cluster import LocalRuntime
from rlhf.reward.judges.cache import CachedJudge
from rlhf.reward.scoring import Measured
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Prompt, TimedOut

PROMPT = Prompt("p", (1,), "Say it.", {"n": 3})


class Counting:
    """A judge that notes what it was asked; `bad` fails, `slow` times out, `odd` is measured."""

    def __init__(self, fingerprint: str = "f"):
        self.asked: list[tuple[str, ...]] = []
        self._fingerprint = fingerprint

    async def judge(self, prompt, items, deadline_s):
        self.asked += items
        special = {"bad": Failed("bad"), "slow": TimedOut(1.0), "odd": Measured(1.0, {"length": 3.0})}
        return [special.get(texts[0], float(len(texts[0]))) for texts in items]

    def fingerprint(self):
        return self._fingerprint

    def close(self):
        pass


def ask(judge, *texts: str, prompt: Prompt = PROMPT):
    return asyncio.run(judge.judge(prompt, [(text,) for text in texts], 1.0))


def test_a_repeated_response_is_judged_once():
    inner = Counting()
    judge = CachedJudge(inner, 10)
    assert ask(judge, "one", "three", "one") == [
        Measured(3.0, {"cache_hits": 0.0}),
        Measured(5.0, {"cache_hits": 0.0}),
    ] + [Measured(3.0, {"cache_hits": 0.0})]
    assert ask(judge, "three", "seven7") == [Measured(5.0, {"cache_hits": 1.0}), Measured(6.0, {"cache_hits": 0.0})]
    assert inner.asked == [("one",), ("three",), ("seven7",)]


def test_another_prompt_payload_or_order_is_another_question():
    inner = Counting()
    judge = CachedJudge(inner, 10)
    for prompt in (PROMPT, replace(PROMPT, text="Say."), replace(PROMPT, payload={"n": 4}), replace(PROMPT, id="q")):
        ask(judge, "one", prompt=prompt)
    assert len(inner.asked) == 3, "only the id does not matter"
    for texts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b")):
        asyncio.run(judge.judge(PROMPT, [texts], 1.0))
    assert inner.asked[3:] == [("a", "b"), ("b", "a"), ("ab",)]


def test_failures_are_tried_again_and_measures_are_kept():
    inner = Counting()
    judge = CachedJudge(inner, 10)
    for _ in range(2):
        assert ask(judge, "bad", "slow") == [Failed("bad"), TimedOut(1.0)]
    assert inner.asked == [("bad",), ("slow",)] * 2
    assert ask(judge, "odd", "odd")[1] == Measured(1.0, {"length": 3.0, "cache_hits": 0.0})
    assert ask(judge, "odd") == [Measured(1.0, {"length": 3.0, "cache_hits": 1.0})]


def test_the_longest_unused_verdict_goes_first():
    inner = Counting()
    judge = CachedJudge(inner, 2)
    ask(judge, "a", "b")
    ask(judge, "a")  # now b is the older one
    ask(judge, "c")
    inner.asked.clear()
    ask(judge, "a")
    ask(judge, "b")
    assert inner.asked == [("b",)]


@pytest.mark.parametrize("entries", [0, 100])
def test_hits_are_counted_through_the_pool(run, tiny_settings, make_text_rollout, classifier, entries):
    settings = tiny_settings(reward={"kind": "model", "path": str(classifier), "cache": entries})
    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings)
        first = await pool.judge(make_text_rollout(["good", "bad"]))
        return first, await pool.judge(make_text_rollout(["bad", "new"]))

    first, second = run(scenario())
    runtime.stop()
    assert second.measures == ({"cache_hits": (1.0, 0.0)} if entries else {})
    assert second.outcomes[0].value == pytest.approx(first.outcomes[1].value, abs=1e-6)
