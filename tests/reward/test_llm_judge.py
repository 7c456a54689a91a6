"""LLM judges: the question, the answer tokens, endpoints that misbehave, and real vLLM against transformers."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhf.cluster import LocalRuntime
from rlhf.config import UserError
from rlhf.config.reward import SourceSettings
from rlhf.data.weight_files import WeightsError
from rlhf.engines.arguments import engine_arguments
from rlhf.engines.engine import EngineDied
from rlhf.reward.errors import RewardError
from rlhf.reward.judges import asking, llm_judge_endpoint
from rlhf.reward.judges.llm_judge import PLACES, QUESTION, LlmJudge, Question, check_llm_judge, make_llm_judge
from rlhf.reward.judges.llm_judge_endpoint import Endpoint, read_choice
from rlhf.reward.judges.llm_judge_engine import JudgeEngine, Reader, judge_environment, judge_spec, open_model
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.spec import rollout_environment, rollout_spec
from rlhf.types import Failed, Feedback, Prompt, Score, TimedOut
from tests.reward.services import service


def test_the_built_in_question_has_a_place_for_everything() -> None:
    assert all(QUESTION.count(place) == 1 for place in PLACES)


def test_places_are_filled_once() -> None:
    question = Question('{"json": "{prompt}"} {a} or {b}? {c}')
    assert question.about("{a}", "{b}", "{prompt}") == '{"json": "{a}"} {b} or {prompt}? {c}'


def test_a_question_from_a_file(tmp_path) -> None:
    file = tmp_path / "question.txt"
    file.write_text("{prompt}: {a} or {b}?\n")
    assert Question.read(str(file)).about("P", "1", "2") == "P: 1 or 2?"
    file.write_text("{prompt}: {a} or B?")
    with pytest.raises(RewardError, match=r"judge_prompt`: .*question\.txt has no \{b\}"):
        Question.read(str(file))
    with pytest.raises(RewardError, match="cannot be read as text"):
        Question.read(str(tmp_path / "none.txt"))


def test_the_answers_are_the_tokens_of_the_letters(tiny_model) -> None:
    opened = open_model(str(tiny_model), "A or B?")
    assert opened.answers == (opened.reader.tokens("A")[0], opened.reader.tokens("B")[0])
    assert opened.reader.text("A or B?") == "<|user|>A or B?<|end|><|assistant|>"
    assert opened.question_tokens == len("A or B?") + 3


def test_weights_that_are_not_the_models_are_refused_before_an_engine_starts(tiny_model, tmp_path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"^`reward\.path`: .*up_proj\.weight` is missing"):
        open_model(str(folder), "A or B?")


@pytest.mark.parametrize(("gpus", "devices"), [(0.0, 1), (0.5, 1), (1.0, 1), (2.0, 2)])
def test_its_engine_is_run_as_the_rollouts_are(tiny_model, tiny_settings, gpus: float, devices: int) -> None:
    """With two devices in a placement group vLLM would choose Ray by itself, and then refuse the bundle."""
    settings = tiny_settings(reward={"gpus": gpus}, rollout={"tensor_parallel_size": devices})
    opened = open_model(str(tiny_model), "A or B?")
    judge = engine_arguments(judge_spec(settings, opened, 64, cpu=False))
    engine = engine_arguments(rollout_spec(settings, str(tiny_model), backend="nccl", gpu=True, local=False))
    for name in ("tensor_parallel_size", "distributed_executor_backend"):
        assert judge[name] == engine[name]
    assert judge["distributed_executor_backend"] == ("mp" if devices == 2 else None)
    threads = {"HF_HUB_OFFLINE", "OMP_NUM_THREADS", "RLHF_CORES_SHARED_BY"}
    judges, rollouts = judge_environment(settings, local=False), rollout_environment(settings, local=False)
    assert judges.keys() - threads == rollouts.keys() - threads


def test_an_engine_that_gives_no_answer_is_a_failure_of_that_question(run, tiny_model) -> None:
    async def dies(ids: list[int], choices: tuple[int, int]) -> list[float]:
        raise EngineDied("its core ended")

    async def sleeps(ids: list[int], choices: tuple[int, int]) -> list[float]:
        return await asyncio.Future()

    opened = open_model(str(tiny_model), "A or B?")
    dead, silent = (JudgeEngine(SimpleNamespace(choose=choose), opened, 64, "weights") for choose in (dies, sleeps))
    assert run(dead.first_wins("A or B?", 5.0)) == Failed("the judge's engine has died: its core ended")
    assert run(silent.first_wins("A or B?", 0.01)) == TimedOut(0.01)
    assert "the judge reads 63" in run(dead.first_wins("x" * 64, 5.0)).reason, "it is not asked"


def test_letters_that_are_no_tokens_are_refused(tiny_model) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None  # then the answer begins with a blank, and byte tokens do not join
    with pytest.raises(RewardError, match="` A` after the question is not one token of its own"):
        Reader(tokenizer, "tiny").answers("A or B?")
    bare = Reader(tokenizer, "tiny")
    assert bare.answers("A or B?\n") == (bare.tokens("A")[0], bare.tokens("B")[0])


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="`reward.path`: there is no model in"):
        check_llm_judge(SourceSettings(kind="llm_judge", path=str(tmp_path)))


def top(**logprobs: float) -> dict[str, Any]:
    """A choice with these tokens told; `_` is a blank."""
    told = [{"token": token.replace("_", " "), "logprob": value} for token, value in logprobs.items()]
    return {"message": {"content": "x"}, "logprobs": {"content": [{"token": "x", "top_logprobs": told}]}}


@pytest.mark.parametrize(
    ("choice", "probability"),
    [
        (top(A=math.log(0.6), B=math.log(0.2), The=math.log(0.1)), 0.75),
        (top(A=math.log(0.2), _A=math.log(0.4), B=math.log(0.2)), 0.75),
        (top(B=-0.1), 0.0),
        ({"message": {"content": " A\n"}, "logprobs": None}, 1.0),
        ({"message": {"content": "**B"}}, 0.0),
    ],
)
def test_reading_a_reply(choice: dict[str, Any], probability: float) -> None:
    assert read_choice(choice) == pytest.approx(probability)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (top(The=-0.1, a=-1.0), "neither A nor B is among the 2 likeliest"),
        ({"message": {"content": "Both"}}, "answered `Both`, neither"),
        ({"message": {"content": "?"}}, "neither A nor B"),
        ({"message": {"content": None}}, "not a chat completion"),
        ({"text": "A"}, "not a chat completion"),
    ],
)
def test_a_reply_without_an_answer_is_a_failure(choice: dict[str, Any], reason: str) -> None:
    verdict = read_choice(choice)
    assert isinstance(verdict, Failed) and reason in verdict.reason


Handler = Callable[[dict[str, Any]], Response]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Handler], Any]]:
    """`with endpoint(handler) as source`: an endpoint on this machine that answers requests as the handler says."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.01)

    @contextmanager
    def run_endpoint(handler: Handler) -> Iterator[SourceSettings]:
        async def answer(request: Request) -> Response:
            if request.headers.get("Authorization") != "Bearer sk-right":
                return PlainTextResponse("wrong key", 401)
            return handler(await request.json())

        async def app() -> Starlette:
            return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])

        with service(app) as url:
            yield SourceSettings(kind="llm_judge", path="judge-1", url=f"{url}/v1/")

    yield run_endpoint


def asked(run, source: SourceSettings, tiny_settings, *items: tuple[str, str], deadline_s: float = 30.0) -> list[Any]:
    """Verdicts of the endpoint's judge on pairs."""

    async def scenario() -> list[Any]:
        judge = await make_llm_judge(source, tiny_settings(), local=True)
        return await judge.judge(Prompt("p", (1,), "Which?", {}), items, deadline_s)

    return run(scenario())


def reply(choice: dict[str, Any]) -> Response:
    return JSONResponse({"choices": [choice]})


def test_an_endpoint_is_asked_with_log_probs(run, tiny_settings, endpoint) -> None:
    seen: list[dict[str, Any]] = []

    def handler(request: dict[str, Any]) -> Response:
        seen.append(request)
        return reply(top(A=math.log(0.3), B=math.log(0.1)))

    with endpoint(handler) as source:
        assert asked(run, source, tiny_settings, ("one", "two")) == [pytest.approx(0.75)]
    question = Question(QUESTION).about("Which?", "one", "two")
    assert seen[-1] == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_an_endpoint_that_refuses_log_probs_is_asked_without(run, tiny_settings, endpoint) -> None:
    def handler(request: dict[str, Any]) -> Response:
        if "logprobs" in request:
            return JSONResponse({"error": {"message": "unknown parameter: logprobs"}}, 400)
        return reply({"message": {"content": "B"}})

    with endpoint(handler) as source:
        assert asked(run, source, tiny_settings, ("one", "two")) == [0.0]


def test_a_busy_endpoint_is_asked_again(run, tiny_settings, endpoint) -> None:
    answers = iter([reply(top(A=0.0)), PlainTextResponse("", 503), PlainTextResponse("", 429), reply(top(A=-1, B=-1))])
    with endpoint(lambda _: next(answers)) as source:
        assert asked(run, source, tiny_settings, ("one", "two")) == [pytest.approx(0.5)]


def test_what_fails_is_told_by_pair(run, tiny_settings, endpoint) -> None:
    def handler(request: dict[str, Any]) -> Response:
        text = request["messages"][0]["content"]
        if "fatal" in text:
            return JSONResponse({"error": "too long"}, 400)
        if "busy" in text:
            return PlainTextResponse("later", 503)
        return PlainTextResponse("<html>") if "odd" in text else reply(top(A=-1, B=-1))

    with endpoint(handler) as source:
        pairs = [("good", "bad"), ("fatal", "bad"), ("busy", "bad"), ("odd", "bad")]
        good, fatal, busy, odd = asked(run, source, tiny_settings, *pairs, deadline_s=1.5)
    assert good == pytest.approx(0.5)
    assert "answers 400" in fatal.reason and "too long" in fatal.reason
    assert "answers 503: later, still after" in busy.reason
    assert "no chat completion" in odd.reason


def test_an_endpoint_that_is_silent_times_out(run, tiny_settings, endpoint) -> None:
    async def scenario(source: SourceSettings) -> Any:
        judge = LlmJudge(Question(QUESTION), await Endpoint.start(source))
        llm_judge = judge._answerer
        llm_judge._free = asyncio.Semaphore(0)  # all requests that may be under way are
        return await judge.judge(Prompt("p", (1,), "?", {}), [("a", "b")], 0.1)

    with endpoint(lambda _: reply(top(A=0.0))) as source:
        assert run(scenario(source)) == [TimedOut(0.1)]


def test_a_wrong_key_or_address_is_told_at_the_start(run, tiny_settings, endpoint, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with endpoint(lambda _: reply(top(A=0.0))) as source:
        with pytest.raises(RewardError, match=r"answers 401: wrong key.*OPENAI_API_KEY") as caught:
            asked(run, source, tiny_settings, ("a", "b"))
        assert "sk-wrong" not in str(caught.value)
    monkeypatch.setattr(llm_judge_endpoint, "START_S", 0.5)
    with pytest.raises(RewardError, match="cannot be reached"):
        asked(run, source, tiny_settings, ("a", "b"))


TEXTS = ["good", "a longer response", "", "good"]


@pytest.fixture(scope="session")
def judge_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made to answer A or B: one direction of its residual stream, always there, speaks for these two."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        head = embedding.clone()
        head[:, 0] = 0.0
        head[tokenizer("AB")["input_ids"], 0] = torch.tensor([60.0, 64.0])
        model.lm_head.weight = torch.nn.Parameter(head)
        embedding[:, 0] = 0.6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def vllm_server(model: Path, key: str) -> Iterator[str]:
    """vLLM's own OpenAI-compatible server with this model, by the name of judge; its URL. It may still be loading."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "judge", "--dtype", "float32", "--enforce-eager"]
    environment = os.environ | {
        "VLLM_API_KEY": key,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command += ["--kv-cache-memory-bytes", str(2**25)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def expected(model: Path, question: Question, texts: list[str]) -> np.ndarray:
    """p(i, j) from transformers: softmax over the two tokens after the question, [K, K]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    letters = [tokenizer("A")["input_ids"][0], tokenizer("B")["input_ids"][0]]
    raw = np.full((len(texts), len(texts)), 0.5)
    for i, j in permutations(range(len(texts)), 2):
        chat = [{"role": "user", "content": question.about("Say it.", texts[i], texts[j])}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            raw[i, j] = torch.softmax(llm(**ids).logits[0, -1, letters], dim=0)[0]
    return raw


def check_against_transformers(verdict: Feedback, raw: np.ndarray) -> None:
    """The matrix is the mean of both orders; what is measured is measured on the pairs that were asked about."""
    both = (raw + 1 - raw.T) / 2
    both[0, 3] = both[3, 0] = 0.5  # the same response, not asked about
    assert verdict.preferences == pytest.approx(both, abs=2e-4)
    assert np.abs(both - 0.5).max() > 0.01, "a judge that finds all alike would show nothing"
    pairs = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    assert verdict.measures["position_bias"] == pytest.approx([raw[i, j] + raw[j, i] - 1 for i, j in pairs], abs=4e-4)
    assert verdict.measures["undecided"] == tuple(float((raw[i, j] > 0.5) == (raw[j, i] > 0.5)) for i, j in pairs)


def judged(run, settings, rollout) -> Feedback:
    """The verdict of a server in this process."""
    runtime = LocalRuntime()

    async def scenario() -> Feedback:
        pool = await RewardPool.start(runtime, settings)
        verdict = await pool.judge(rollout)
        assert pool.infos[0].fingerprint == (await pool.fingerprints())["reward-0"]
        return verdict

    try:
        return run(scenario())
    finally:
        runtime.stop()


@pytest.fixture
def short_question(tmp_path) -> Path:
    """One that the tiny model, which reads 512 bytes, has room for."""
    file = tmp_path / "question.txt"
    file.write_text("{prompt}\nA: {a}\nB: {b}\nA or B?")
    return file


@pytest.mark.engine
def test_a_model_judges_as_transformers_says(
    run, tiny_settings, make_text_rollout, judge_model, short_question, monkeypatch
) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    reward = {"kind": "llm_judge", "path": str(judge_model), "judge_prompt": str(short_question), "batch_tokens": 600}
    settings = tiny_settings(reward=reward)
    verdict = judged(run, settings, make_text_rollout([*TEXTS, "x" * 600]))
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ, "it would concern a rollout engine in this process"
    assert "tokens, and the judge reads" in verdict.outcomes[4].reason
    assert isinstance(verdict.outcomes[0], Score)
    short = Feedback("p", verdict.outcomes[:4], verdict.preferences[:4, :4], verdict.measures)
    check_against_transformers(short, expected(judge_model, Question.read(str(short_question)), TEXTS))


@pytest.mark.engine
def test_the_endpoint_of_vllm_judges_as_transformers_says(
    run, tiny_settings, make_text_rollout, judge_model, short_question, monkeypatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    with vllm_server(judge_model, "sk-of-this-test") as url:
        reward = {"kind": "llm_judge", "path": "judge", "url": url, "judge_prompt": str(short_question)}
        monkeypatch.setattr(llm_judge_endpoint, "START_S", 200.0)  # until the server has loaded the model
        verdict = judged(run, tiny_settings(reward=reward), make_text_rollout(TEXTS))
    check_against_transformers(verdict, expected(judge_model, Question.read(str(short_question)), TEXTS))
