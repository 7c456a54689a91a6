"""What is looked at before a run starts: each thing that would end the run later is refused in the dry run, with its field and a remedy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from rlhf.cli import main
from rlhf.config import Settings, UserError, load
from rlhf.config.sft_checks import load_sft
from rlhf.data.assets import resolve
from rlhf.preflight.machine import check_tensor_parallel
from rlhf.preflight.plan import describe
from rlhf.preflight.ready import ready
from rlhf.preflight.sft import describe_sft
from rlhf.reward.judges import llm_judge_endpoint, remote
from rlhf.reward.judges.wire import TOKEN

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
REWARDS = """
import os, re, sys, time

def number(prompt, response, payload):
    print("what it prints is not its answer")
    return len(response)

def pair(prompt, a, b, payload):
    return 0.75

def hangs(prompt, response, payload):
    time.sleep(10_000)
    return 1.0

def holds_the_interpreter(prompt, response, payload):
    return float(bool(re.match(r"(a|aa)+$", "a" * 60 + "b")))

def ends_the_process(prompt, response, payload):
    os.write(2, b"out of luck")
    os._exit(7)
    return 1.0

def misspelt(prompt, response, payload):
    return payload["anwser"]

def textual(prompt, response, payload):
    return "good"

def never(prompt, response, payload):
    return None if response else 1.0

def slowly_at_last(prompt, response, payload, calls=[]):
    time.sleep(0.7)
    calls.append(prompt)
    return 1.0 if len(calls) == 3 else None
"""


@pytest.fixture
def tiny(tmp_path: Path):
    """Settings of the tiny run in a folder of the test's own."""
    return lambda *overrides: load(TINY, [f"run.dir={tmp_path / 'run'}", *overrides])


def refusal(settings: Settings, resume: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        ready(settings, resume=resume)
    return str(caught.value)


def test_a_folder_where_no_run_can_begin(tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "--resume found no run in this folder" in refusal(tiny(), resume=True)
    run.mkdir()
    (run / "logs").mkdir()
    ready(tiny())  # what others put there may stay
    (run / "config.yaml").write_text("somebody's own")
    assert "has config.yaml, which a run would write over" in refusal(tiny())
    (run / "manifest.json").write_text("{}")
    assert "already holds a run. Choose another run.dir, continue that run with --resume" in refusal(tiny())
    assert "is not a folder" in refusal(tiny(f"run.dir={run}/config.yaml"))
    assert "cannot be written" in refusal(tiny(f"run.dir={run}/config.yaml/x"))
    assert "cannot be written (File name too long)" in refusal(tiny(f"run.dir={tmp_path}/{'x' * 300}"))


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_folder_that_holds_a_run_is_refused_before_torch_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    sft = tmp_path / "sft.yaml"
    sft.write_text("data: {examples: rows.jsonl}\npolicy: {model: some/model}\n")
    config = TINY if command == "train" else str(sft)
    program = f"""
import sys
from rlhf.cli import main
status = main([{command!r}, {config!r}, "run.dir={tmp_path}"])
sys.exit(9 if "torch" in sys.modules or "ray" in sys.modules else status)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, "already holds a run" in done.stderr) == (2, True), done.stderr


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_this_test.py").write_text(REWARDS)
    (tmp_path / "endless_at_import.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "rewards_of_this_test"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hangs", "did not judge a trial response within 1 s (`reward.deadline_s`)"),
        ("holds_the_interpreter", "did not judge a trial response within 1 s (`reward.deadline_s`)"),
        ("ends_the_process", "ended its process (status 7) instead of judging a trial response; it said: out of luck"),
        ("misspelt", "KeyError: 'anwser' (rewards_of_this_test.py"),
        ("textual", "the judge returned 'good', which is not a number"),
        ("nothing_of_this_name", "has no function `nothing_of_this_name`"),
    ],
)
def test_a_function_that_cannot_judge(
    tiny, users_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(tiny(f"reward.path={users_module}:{name}", "reward.deadline_s=1"))
    assert message.startswith("`reward.path`: ")
    assert words in message


def test_a_module_that_ends_the_interpreter_at_import(tiny, users_module: str) -> None:
    assert "ended its process (status 3)" in refusal(tiny("reward.path=endless_at_import:reward"))


def test_the_verdict_stands_in_the_plan(tiny, users_module: str) -> None:
    assert "reward: a trial response scores 25" in describe(tiny(f"reward.path={users_module}:number"))
    pairwise = ("reward.kind=pairwise_function", f"reward.path={users_module}:pair")
    assert "reward: a trial response beats another with probability 0.75" in describe(tiny(*pairwise))
    words = "NO REWARD for a trial response to any of 3 prompts: the judge returned None"
    assert words in describe(tiny(f"reward.path={users_module}:never"))
    each_in_time = (f"reward.path={users_module}:slowly_at_last", "reward.deadline_s=1")
    assert "reward: a trial response scores 1" in describe(tiny(*each_in_time))


class Service(BaseHTTPRequestHandler):
    """A reward service and an OpenAI-compatible endpoint, as far as they are asked before a run."""

    def do_GET(self) -> None:
        self._answer({"kind": "function", "compares": False, "fingerprint": None})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"choices": [{"message": {"content": "A"}}]})

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_services_are_asked(tiny, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remotely = ("reward.kind=remote", "reward.path=null")
    monkeypatch.delenv(TOKEN, raising=False)
    assert TOKEN in refusal(tiny(*remotely, f"reward.url={service}"))
    monkeypatch.setenv(TOKEN, "a-token")
    monkeypatch.setattr(remote, "START_S", 0.5)
    monkeypatch.setattr(llm_judge_endpoint, "START_S", 0.5)
    assert f"reward: {service} answers" in describe(tiny(*remotely, f"reward.url={service}"))
    judge = ("reward.kind=llm_judge", "reward.path=a-model")
    assert f"reward: {service} answers" in describe(tiny(*judge, f"reward.url={service}"))
    away = f"reward.url=http://127.0.0.1:{closed_port()}"
    assert "cannot be reached" in refusal(tiny(*remotely, away))
    assert "cannot be reached" in refusal(tiny(*judge, away))


def test_the_head_of_a_cluster_is_looked_for(tiny) -> None:
    away = f"127.0.0.1:{closed_port()}"
    assert f"`cluster.address`: nothing answers at {away}" in refusal(tiny(f"cluster.address={away}"))
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        seen = ready(tiny(f"cluster.address={address}")).seen
    assert f"cluster `{address}`: its GPUs, memory and disks are not looked at from here" in seen[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_are_not_there(tiny) -> None:
    on_gpus = ("cluster.device=auto", "reward.gpus=1", "rollout.transfer=nccl")
    assert "`reward.gpus`, `rollout.transfer`: this is for GPUs" in refusal(tiny(*on_gpus))


@pytest.mark.parametrize(("memory", "fits"), [(80 << 30, True), (1 << 24, False)])
def test_what_the_gpus_hold_is_a_matter_of_the_dry_run(tiny, monkeypatch, memory: int, fits: bool) -> None:
    """It refuses; a run may go on, since the estimate may err."""
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=memory)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    settings = tiny("cluster.device=cuda", "rollout.cpu_kv_cache_gb=1")
    found = ready(settings).gpu_fit
    assert (found.refusal() is None) == fits
    if fits:
        assert list(found.lines())[-1] == "fits"
    else:
        assert "does not fit this machine's GPUs: " in (found.refusal() or "")
        with pytest.raises(UserError, match="does not fit this machine.s GPUs: "):
            describe(settings)


def test_what_is_too_large_for_this_machine(tiny) -> None:
    assert "this machine has" in refusal(tiny("rollout.cpu_kv_cache_gb=100000"))
    checkpoints = ("loop.steps=1000000000", "checkpoint.every=1", "checkpoint.keep=1000000", "loop.eval_every=0")
    message = refusal(tiny(*checkpoints))
    assert message.startswith("`run.dir`: ") and "checkpoints and export of this run take about" in message
    ready(tiny(*checkpoints, "checkpoint.every=1000000000"))  # it makes one


@pytest.mark.parametrize(
    ("heads", "shared", "feedforward", "rows", "size", "words"),
    [
        (8, 4, 256, 320, 2, None),
        (8, 2, 256, 320, 4, None),  # key-value heads are copied
        (14, 2, 4864, 151936, 4, "14 attention heads"),
        (12, 6, 264, 128, 4, "6 key-value heads"),
        (12, 4, 258, 192, 4, "258 numbers in the feed-forward block"),
        (6, 6, 258, 320, 3, "320 rows of the embedding"),
        (8, 8, 258, 320, 4, "evenly. Set it to one of 1, 2$"),
    ],
)
def test_devices_that_cannot_share_a_model(
    heads: int, shared: int, feedforward: int, rows: int, size: int, words: str | None
) -> None:
    config = LlamaConfig(
        hidden_size=heads * 8,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        intermediate_size=feedforward,
        vocab_size=rows,
    )
    if words is None:
        check_tensor_parallel(config, size, "rollout.tensor_parallel_size", "a model")
        return
    with pytest.raises(UserError, match=r"^`rollout\.tensor_parallel_size`: . devices cannot share the ") as caught:
        check_tensor_parallel(config, size, "rollout.tensor_parallel_size", "a model")
    assert words in f"{caught.value}$"


def test_a_model_without_key_value_heads_of_its_own() -> None:
    check_tensor_parallel(
        GPT2Config(n_embd=48, n_head=12, vocab_size=50257), 4, "rollout.tensor_parallel_size", "a model"
    )


def test_tensor_parallel_of_the_run(tiny) -> None:
    message = refusal(tiny("rollout.tensor_parallel_size=3"))
    assert message.startswith("`rollout.tensor_parallel_size`: 3 devices cannot share")


def test_a_supervised_run(tmp_path: Path) -> None:
    examples = tmp_path / "rows.jsonl"
    examples.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(8)))
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\ndata: {{examples: {examples}, chat_template: false, max_tokens: 64}}\n"
        f"policy: {{model: {resolve('asset:tiny-llama')}}}\ntraining: {{batch_size: 4}}\n"
    )
    assert "checkpoints and export of this run take about" in describe_sft(load_sft(config))
    with pytest.raises(UserError, match=r"cluster\.address.*nothing answers"):
        describe_sft(load_sft(config, [f"cluster.address=127.0.0.1:{closed_port()}"]))
    with pytest.raises(UserError, match=r"checkpoints and export of this run take about"):
        many = ["checkpoint.every=1", "checkpoint.keep=1000000", "training.epochs=1000000"]
        describe_sft(load_sft(config, many))
    os.mkdir(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        describe_sft(load_sft(config))


def test_the_run_itself_looks_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing has started when it is refused: the folder of the run does not exist."""
    run = tmp_path / "run"
    assert main(["train", TINY, f"run.dir={run}", "rollout.tensor_parallel_size=3"]) == 2
    assert "`rollout.tensor_parallel_size`" in capsys.readouterr().err
    assert not run.exists()
