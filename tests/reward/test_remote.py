"""Asking a reward service: the same verdicts as without the network, retries, deadlines, and services that are not what they were."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhf.cluster import LocalRuntime
from rlhf.config.reward import SourceSettings
from rlhf.reward.errors import RewardError
from rlhf.reward.judges import asking, remote
from rlhf.reward.judges.asking import pause_s
from rlhf.reward.judges.remote import RemoteJudge
from rlhf.reward.scoring import Measured
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Prompt, TimedOut
from tests.reward.services import TOKEN, reward_service, service

pytestmark = pytest.mark.engine

PROMPT = Prompt("p", (1,), "Say it.", {"n": 3})
HERE = "tests.reward.sample_rewards"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_REWARD_TOKEN", TOKEN)
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "START_S", 1.0)


def judged(run, settings, rollout):
    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings)
        return await pool.judge(rollout), pool.infos[0].fingerprint

    try:
        return run(scenario())
    finally:
        runtime.stop()


def test_a_remote_model_judges_like_the_model(run, tiny_settings, make_text_rollout, classifier):
    texts = ["good", "a much longer text than that", "", "é", "good"]
    there = tiny_settings(reward={"kind": "model", "path": str(classifier), "cache": 9})
    with reward_service(there) as url:
        over_http, fingerprint = judged(
            run, tiny_settings(reward={"kind": "remote", "path": None, "url": url + "/"}), make_text_rollout(texts)
        )
    here, own = judged(run, there, make_text_rollout(texts))
    assert fingerprint == own
    assert [o.value for o in over_http.outcomes] == pytest.approx([o.value for o in here.outcomes], abs=1e-5)
    assert np.mean(over_http.measures["cache_hits"]) == 0.0


def test_failures_keep_their_kind_over_the_network(run, tiny_settings, make_text_rollout):
    texts = ["four", "bad", "slow", "nan"]
    there = tiny_settings(reward={"path": f"{HERE}:moody", "deadline_s": 0.3})
    with reward_service(there) as url:
        over_http, _ = judged(
            run, tiny_settings(reward={"kind": "remote", "path": None, "url": url}), make_text_rollout(texts)
        )
    here, _ = judged(run, there, make_text_rollout(texts))
    assert over_http.outcomes == here.outcomes


def test_a_remote_judge_that_compares_gives_the_same_matrix(run, tiny_settings, make_text_rollout):
    texts = ["long", "short one", "bad", "the longest of all", "none"]
    there = tiny_settings(reward={"kind": "pairwise_function", "path": f"{HERE}:picky"})
    with reward_service(there) as url:
        reward = {"kind": "pairwise_remote", "path": None, "url": url}
        over_http, _ = judged(run, tiny_settings(reward=reward), make_text_rollout(texts))
    here, _ = judged(run, there, make_text_rollout(texts))
    np.testing.assert_allclose(over_http.preferences, here.preferences, atol=1e-12)
    assert [type(o) for o in over_http.outcomes] == [type(o) for o in here.outcomes]
    assert over_http.measures.keys() == here.measures.keys()
    for name, values in here.measures.items():
        assert np.nanmean(over_http.measures[name]) == pytest.approx(np.nanmean(values)), name


def fake(replies: list[Response], seen: list[str] | None = None, compares: bool = False):
    """A service that answers /judge with these replies, one after the other, the last one again and again."""

    async def make():
        async def info(request):
            return JSONResponse({"kind": "model", "compares": compares, "fingerprint": "f"})

        async def judge(request):
            (seen if seen is not None else []).append(request.headers["Authorization"])
            return replies.pop(0) if len(replies) > 1 else replies[0]

        return Starlette(routes=[Route("/info", info), Route("/judge", judge, methods=["POST"])])

    return service(make)


def ask(run, url: str, deadline_s: float = 5.0, kind: str = "remote"):
    """The value for one response."""

    async def scenario():
        judge = await RemoteJudge.start(SourceSettings(kind=kind, url=url))
        (value,) = await judge.judge(PROMPT, [("x",)], deadline_s)
        return value

    return run(scenario())


def right() -> JSONResponse:
    return JSONResponse({"fingerprint": "f", "outcomes": [{"outcome": "score", "value": 7}]})


def test_a_busy_service_is_asked_again(run):
    seen: list[str] = []
    busy = [JSONResponse({"error": "busy"}, status) for status in (429, 503, 502)]
    with fake([*busy, right()], seen) as url:
        assert ask(run, url) == Measured(7.0, {})
    assert seen == [f"Bearer {TOKEN}"] * 4


def test_a_service_that_stays_busy_fails_within_the_deadline(run):
    with fake([JSONResponse({"error": "the queue is full"}, 429, {"Retry-After": "0"})]) as url:
        value = ask(run, url, deadline_s=0.3)
    assert (
        isinstance(value, Failed)
        and "429" in value.reason
        and "the queue is full" in value.reason
        and "0.3 s" in value.reason
    )
    with fake([JSONResponse({"error": "busy"}, 429, {"Retry-After": "3600"})]) as url:
        assert "after 1 attempts" in ask(run, url, deadline_s=60.0).reason  # not waited for: there is no time left then


def test_a_silent_service_times_out(run):
    async def make():
        async def info(request):
            return JSONResponse({"kind": "model", "compares": False, "fingerprint": "f"})

        async def judge(request):
            await asyncio.sleep(1.0)
            return right()

        return Starlette(routes=[Route("/info", info), Route("/judge", judge, methods=["POST"])])

    with service(make) as url:
        assert ask(run, url, deadline_s=0.2) == TimedOut(0.2)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (JSONResponse({"error": "`payload`: wrong"}, 422), "`payload`: wrong"),
        (PlainTextResponse("hello"), "not one of a reward service"),
        (JSONResponse({"fingerprint": "f", "outcomes": []}), "0 outcomes for 1 responses"),
        (
            JSONResponse({"fingerprint": "g", "outcomes": [{"outcome": "score", "value": 7}]}),
            "judges with g, and judged with f at the start",
        ),
    ],
)
def test_answers_that_are_none_are_failures_and_are_not_asked_for_again(run, reply, words):
    seen: list[str] = []
    with fake([reply], seen) as url:
        value = ask(run, url)
    assert isinstance(value, Failed) and words in value.reason
    assert len(seen) == 1


def test_at_the_start_a_wrong_service_is_an_error_in_words(run, monkeypatch, tiny_settings):
    with fake([right()], compares=True) as url, pytest.raises(RewardError, match="Set `reward.kind: pairwise_remote`"):
        ask(run, url)
    with fake([right()]) as url, pytest.raises(RewardError, match="Set `reward.kind: remote`"):
        ask(run, url, kind="pairwise_remote")
    with pytest.raises(RewardError, match="cannot be reached"):
        ask(run, url)  # it has ended

    async def other():
        return Starlette(routes=[Route("/info", lambda request: PlainTextResponse("welcome"))])

    with service(other) as url, pytest.raises(RewardError, match="not a reward service: welcome"):
        ask(run, url)
    with reward_service(tiny_settings(reward={"path": f"{HERE}:moody"})) as url:
        monkeypatch.setenv("RLHF_REWARD_TOKEN", "guess")
        with pytest.raises(RewardError, match="401.*RLHF_REWARD_TOKEN"):
            ask(run, url)
    monkeypatch.delenv("RLHF_REWARD_TOKEN")
    with pytest.raises(RewardError, match="Set the environment variable RLHF_REWARD_TOKEN"):
        ask(run, url)


@given(st.integers(0, 10_000), st.floats(0, 100), st.floats(0, 1))
def test_pauses_grow_to_a_limit_and_are_never_shorter_than_asked_for(attempt, asked_for, luck):
    pause = pause_s(attempt, asked_for, luck)
    assert asked_for <= pause <= asked_for + min(asking.LONGEST_PAUSE_S, 0.1 * 2.0 ** min(attempt, 20))
    assert pause_s(attempt + 1, asked_for, luck) >= pause
