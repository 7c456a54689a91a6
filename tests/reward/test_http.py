"""The reward service over HTTP: answers, refusals, and that one caller's mistake is nobody else's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from rlhf.cluster import LocalRuntime
from rlhf.commands.serve import serve
from rlhf.config import UserError
from rlhf.reward.judges.wire import feedback_from_json, feedback_to_json
from rlhf.reward.serving import http
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Feedback, Invalid, Score, TimedOut

HERE = "tests.reward.sample_rewards"
OUTCOMES = st.one_of(
    st.builds(Score, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(Invalid, st.text()),
    st.builds(Failed, st.text()),
    st.builds(TimedOut, st.floats(0, 1e6), st.text(max_size=3)),
)


def asked(run, settings, questions, headers=None):
    """Responses to questions that are asked all at once: a dict as JSON, bytes as they are."""
    headers = {"Authorization": "Bearer secret"} if headers is None else headers
    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings, service=True)
        transport = httpx.ASGITransport(http.make_app(pool, settings, "secret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            return await asyncio.gather(*(_post(client, question) for question in questions))

    try:
        return run(scenario())
    finally:
        runtime.stop()


def _post(client, question):
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    return client.post("/judge", content=body)


def test_each_response_gets_its_outcome(run, tiny_settings):
    settings = tiny_settings(reward={"path": f"{HERE}:moody", "deadline_s": 0.2})
    (reply,) = asked(run, settings, [{"responses": ["four", "bad", "slow", "nan"]}])
    assert reply.status_code == 200 and reply.json()["fingerprint"] is None
    outcomes = feedback_from_json("p", reply.json(), 4).outcomes
    assert (outcomes[0], outcomes[2]) == (Score(4.0), TimedOut(0.2))
    assert outcomes[1].reason.startswith("ValueError: I do not judge this (")
    assert isinstance(outcomes[3], Invalid)


def test_prompt_and_payload_arrive(run, tiny_settings):
    settings = tiny_settings(reward={"path": f"{HERE}:sees"})
    (reply,) = asked(run, settings, [{"prompt": "Say it.", "payload": {"n": 3}, "responses": ["x"]}])
    assert reply.json()["outcomes"] == [{"outcome": "score", "value": 1.0}]


def test_a_judge_that_compares_gives_preferences(run, tiny_settings):
    settings = tiny_settings(reward={"kind": "pairwise_function", "path": f"{HERE}:picky"})
    (reply,) = asked(run, settings, [{"responses": ["long", "short one", "bad"]}])
    body = reply.json()
    assert body["preferences"][1][0] == pytest.approx(0.9) and body["preferences"][0][0] == 0.5
    assert body["preferences"][0][2] is None and body["outcomes"][2]["outcome"] == "failed"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        ({}, "`responses`: Field required"),
        (b'{"responses": ["\\ud800"]}', "not valid JSON"),  # half a character
        (b'{"responses": ["x"], "payload": {"a": ' + b"[" * 9999 + b"}}", "not valid JSON"),
        ({"responses": []}, "`responses`"),
        ({"responses": ["x", 3]}, "`responses[1]`: Input should be a valid string"),
        ({"responses": "x"}, "`responses`: Input should be a valid array"),
        ({"responses": ["x"], "payload": [1]}, "`payload`"),
        ({"responses": ["x"], "reponses": 1}, "`reponses`: Extra inputs"),
    ],
)
def test_malformed_requests_are_refused_in_words(run, tiny_settings, body, words):
    (reply,) = asked(run, tiny_settings(reward={"path": f"{HERE}:moody"}), [body])
    assert reply.status_code == 422 and words in reply.json()["error"]


def test_malformed_requests_harm_nobody_else(run, tiny_settings):
    settings = tiny_settings(reward={"path": f"{HERE}:moody", "max_waiting": 1000})
    questions = [b"{broken" if n % 10 == 0 else {"responses": ["x" * n]} for n in range(200)]
    replies = asked(run, settings, questions)
    for n, reply in enumerate(replies):
        if n % 10 == 0:
            assert reply.status_code == 422
        else:
            assert reply.json()["outcomes"] == [{"outcome": "score", "value": float(n)}]


@pytest.mark.parametrize(
    "headers",
    [{"X": "y"}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer secret2"}],
)
def test_without_the_token_nothing_is_answered_and_nothing_is_read(run, tiny_settings, headers):
    settings = tiny_settings(reward={"path": f"{HERE}:moody"})
    replies = asked(run, settings, [{"responses": ["x"]}, b"{broken"], headers)
    assert [reply.status_code for reply in replies] == [401, 401]
    assert "RLHF_REWARD_TOKEN" in replies[0].json()["error"] and "secret" not in replies[0].text


def test_bodies_beyond_the_limit_are_refused(run, tiny_settings, monkeypatch):
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 100)
    settings = tiny_settings(reward={"path": f"{HERE}:moody"})

    async def chunks():
        for _ in range(10):
            yield b'{"responses": ["xxxxx'

    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings, service=True)
        transport = httpx.ASGITransport(http.make_app(pool, settings, "secret"))
        client = httpx.AsyncClient(transport=transport, base_url="http://s", headers={"Authorization": "Bearer secret"})
        declared = await client.post("/judge", json={"responses": ["x" * 200]})
        undeclared = await client.post("/judge", content=chunks())
        small = await client.post("/judge", json={"responses": ["x"]})
        return declared, undeclared, small

    declared, undeclared, small = run(scenario())
    runtime.stop()
    assert declared.status_code == undeclared.status_code == 413 and small.status_code == 200
    assert "fewer responses" in declared.json()["error"] and "fewer responses" in undeclared.json()["error"]


def test_a_full_server_asks_to_come_back(run, tiny_settings):
    settings = tiny_settings(reward={"path": f"{HERE}:moody", "max_waiting": 2, "deadline_s": 0.3})
    slow = {"responses": ["slow", "slow"]}
    first, second = asked(run, settings, [slow, {"responses": ["x"]}])
    assert first.status_code == 200 and first.json()["outcomes"][0]["outcome"] == "timed_out"
    assert second.status_code == 429 and int(second.headers["Retry-After"]) >= 1


def test_health_and_info(run, tiny_settings, classifier):
    settings = tiny_settings(reward={"kind": "model", "path": str(classifier)})
    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings, service=True)
        transport = httpx.ASGITransport(http.make_app(pool, settings, "secret"))
        headers = {"Authorization": "Bearer secret"}
        async with httpx.AsyncClient(transport=transport, base_url="http://s", headers=headers) as client:
            await client.post("/judge", json={"responses": ["a", "b"]})
            health, info, lost = [await client.get(path) for path in ("/health", "/info", "/nothing")]
        return health, info, lost, pool.infos[0].fingerprint

    health, info, lost, fingerprint = run(scenario())
    runtime.stop()
    assert health.json() == {"healthy": True, "servers": {"reward-0": {"judged": 2, "broken": 0}}}
    assert info.json() | {"version": ""} == {
        "kind": "model",
        "compares": False,
        "fingerprint": fingerprint,
        "servers": 1,
        "version": "",
    }
    assert lost.status_code == 404 and lost.json() == {"error": "Not Found"}


@effort(max_examples=25)
@given(st.lists(OUTCOMES, min_size=1, max_size=5), st.dictionaries(st.text(max_size=5), st.lists(st.floats(-9, 9))))
def test_feedback_survives_the_wire(outcomes, measures):
    n = len(outcomes)
    matrix = [[0.5 if i == j else float("nan") for j in range(n)] for i in range(n)]
    there = Feedback("p", tuple(outcomes), np.array(matrix), {name: tuple(v) for name, v in measures.items()})
    back = feedback_from_json("p", json.loads(json.dumps(feedback_to_json(there), allow_nan=False)), n)
    assert (back.prompt_id, back.outcomes, back.measures) == (there.prompt_id, there.outcomes, there.measures)
    np.testing.assert_array_equal(back.preferences, there.preferences)


@pytest.mark.parametrize(
    "given_body",
    [
        None,
        [],
        {},
        {"outcomes": [{"outcome": "score", "value": "1"}]},
        {"outcomes": [{"outcome": "score", "value": float("nan")}]},
        {"outcomes": [{"outcome": "great"}]},
        {"outcomes": []},
        {"outcomes": [{"outcome": "score", "value": 1}], "preferences": [[0.5, 0.5]]},
    ],
)
def test_what_is_no_feedback_is_not_taken_for_one(given_body):
    with pytest.raises(ValueError, match="outcome|preferences"):
        feedback_from_json("p", given_body, 1)


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """`rlhf reward serve`, and the lines that it printed until it was ready."""
    config = folder / "serve.yaml"
    config.write_text(
        "data: {prompts: unused}\npolicy: {model: unused}\ncluster: {device: cpu, threads: 1}\n"
        f"reward: {{kind: function, path: '{HERE}:moody', servers: 2}}\n"
    )
    command = [sys.executable, "-m", "rlhf.cli", "reward", "serve", str(config), "--port", "0", *options]
    inherited = {name: value for name, value in os.environ.items() if name != "RLHF_REWARD_TOKEN"}
    process = subprocess.Popen(
        command, env=inherited | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    try:
        while not lines or "http://" not in lines[-1]:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line)
        yield process, lines
    finally:
        process.kill()
        process.communicate()


def score(url: str, token: str) -> httpx.Response:
    return httpx.post(f"{url}/judge", json={"responses": ["four"]}, headers={"Authorization": f"Bearer {token}"})


@pytest.mark.engine
def test_the_command_serves_with_ray_until_it_is_asked_to_end(tmp_path):
    with serving(tmp_path, RLHF_REWARD_TOKEN="a-secret-of-this-test") as (process, lines):
        assert len(lines) == 1 and "a-secret" not in lines[0]
        url = lines[0].split()[-1]
        assert score(url, "a-secret-of-this-test").json()["outcomes"] == [{"outcome": "score", "value": 4.0}]
        assert score(url, "guess").status_code == 401
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "a-secret" not in out + err


@pytest.mark.engine
def test_the_command_serves_in_one_process_and_makes_a_token(tmp_path):
    with serving(tmp_path, "--local") as (process, lines):
        token, url = lines[0].split()[-1], lines[1].split()[-1]
        assert len(token) > 30 and score(url, token).status_code == 200
        assert "1 server(s)" in lines[1]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(tiny_settings, monkeypatch):
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "t")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: this address cannot be used"):
            serve(tiny_settings(), "127.0.0.1", port, local=True)
    with pytest.raises(UserError, match="--port 99999: a port is a number from 0"):
        serve(tiny_settings(), "127.0.0.1", 99999, local=True)
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "with a line\n")
    with pytest.raises(UserError, match="RLHF_REWARD_TOKEN"):
        serve(tiny_settings(), "127.0.0.1", 0, local=True)
