"""`rlhf submit`: what travels, what is refused before anything is sent, and a real jobs server that runs it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.commands.submit import CONFIG, MAX_UPLOAD_MB, pack, travelling_files
from rlhf.config import Settings, UserError, load, show
from rlhf.config.sft import SftSettings
from rlhf.config.sft_checks import load_sft

BASE: dict[str, dict[str, Any]] = {
    "run": {"dir": "/shared/runs/one"},
    "data": {"prompts": "prompts.jsonl"},
    "policy": {"model": "/shared/model"},
    "reward": {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"},
    "cluster": {"device": "cpu"},
}


def settings(**sections: dict[str, Any]) -> Settings:
    return Settings(**{name: BASE.get(name, {}) | sections.get(name, {}) for name in BASE | sections})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "prompts.jsonl").write_text("{}\n")
    return folder


def test_what_the_configuration_names_by_relative_path_travels(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (here / "held").mkdir()
    (here / "held" / "out.jsonl").write_text("held out")
    (here / "pairs.jsonl").write_text("canaries")
    (here / "judge.py").write_text("def score(*_): return 0.0")
    (here / "mine" / "deep").mkdir(parents=True)
    (here / "mine" / "deep" / "method.py").write_text("")
    (here / "mine" / "big.bin").write_text("not code")
    chosen = settings(
        data={"eval_prompts": "held/out.jsonl"},
        reward={"path": "judge:score", "canaries": "pairs.jsonl"},
        algorithm={"name": "mine.deep.method:make"},
        cluster={"address": "10.0.0.1:6379"},
    )
    files = travelling_files(chosen)
    assert set(map(str, files)) == {"prompts.jsonl", "held/out.jsonl", "pairs.jsonl", "judge.py", "mine/deep/method.py"}
    folder = tmp_path_factory.mktemp("job")
    pack(chosen, files, folder)
    assert (folder / "held" / "out.jsonl").read_text() == "held out"
    arrived = load(folder / CONFIG)
    assert arrived.cluster.address == "auto", "the run joins the cluster that its job runs in"
    assert arrived.model_copy(update={"cluster": chosen.cluster}) == chosen


def test_a_supervised_run_travels_too(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sections = {name: BASE[name] for name in ("run", "policy", "cluster")}
    chosen = SftSettings(**sections, data={"examples": "prompts.jsonl", "eval_examples": "/shared/held.jsonl"})
    files = travelling_files(chosen)
    assert files == [Path("prompts.jsonl")]
    folder = tmp_path_factory.mktemp("job")
    pack(chosen, files, folder)
    arrived = load_sft(folder / CONFIG)
    assert arrived.model_copy(update={"cluster": chosen.cluster}) == chosen


def test_absolute_paths_and_assets_stay_where_they_are(here: Path) -> None:
    assert travelling_files(settings(data={"prompts": str(here / "prompts.jsonl")})) == []
    assert travelling_files(settings(data={"prompts": "x" * 300})) == [], "a name that no file can have"
    assert travelling_files(settings(data={"prompts": "asset:tiny-prompts.jsonl"}, policy={"model": "org/name"})) == []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"run": {"dir": "runs/one"}}, "run.dir=runs/one: a relative path"),
        ({"cluster": {"device": "auto"}}, "cluster.device: `auto` would ask"),
        ({"policy": {"model": "model"}}, "policy.model=model: a relative path"),
        ({"reward": {"kind": "model", "path": "model"}}, "reward.path=model: a relative path"),
        ({"data": {"prompts": "../here/prompts.jsonl"}}, "data.prompts=../here/prompts.jsonl: leads out"),
        ({"data": {"prompts": "big.jsonl"}}, "would travel with the job"),
        (
            {"data": {"prompts": ["prompts.jsonl", "../here/prompts.jsonl"]}},
            "data.prompts[1]=../here/prompts.jsonl: leads out",
        ),
        ({"data": {"prompts": "hf:model@main:train"}}, "data.prompts=hf:model@main:train: a data set in a folder"),
        ({"data": {"prompts": "hf:model:train"}}, "data.prompts=hf:model:train: a data set in a folder"),
    ],
)
def test_what_cannot_work_there_is_refused_here(here: Path, sections: dict[str, Any], says: str) -> None:
    (here / "model").mkdir()
    with (here / "big.jsonl").open("w") as big:
        big.truncate((MAX_UPLOAD_MB + 1) * 2**20)
    with pytest.raises(UserError, match=re.escape(says)):
        travelling_files(settings(**sections))


def test_no_jobs_server_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        tiny = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
        assert main(["submit", tiny, "run.dir=/tmp/r", "cluster.device=cpu", "--address", address]) == 2
    assert "no jobs server answers there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def jobs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """URL of a Ray head with its dashboard, and the environment that has its token."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text("0123456789abcdef" * 4)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ports = {
        name: free_port()
        for name in ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    }
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--disable-usage-stats", "--include-dashboard=true"]
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    with tempfile.TemporaryDirectory(prefix="ray-") as short, (folder / "log").open("w") as log:
        command = ["ray", "start", "--head", "--block", *options, f"--temp-dir={short}"]
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while not answers(url):
                assert head.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.2)
            yield url, environment
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    """Whether the jobs server is there; it refuses us, who have no token."""
    try:
        urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    raise AssertionError("the jobs server let us in without a token")


def submit(server: tuple[str, dict[str, str]], folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    url, environment = server
    command = [sys.executable, "-m", "rlhf.cli", "submit", "run.yaml", "--address", url, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.engine
def test_a_job_is_run_followed_and_its_status_is_ours(jobs_server: Any, here: Path) -> None:
    """The run ends with a mistake in the file that travelled, before it needs engines."""
    short = {"data": {"max_prompt_tokens": 64}, "rollout": {"max_tokens": 16}}
    chosen = settings(run={"dir": str(here / "run")}, policy={"model": "asset:tiny-llama"}, **short)
    (here / "run.yaml").write_text(show(chosen))
    followed = submit(jobs_server, here, "--follow")
    assert "with config.yaml, prompts.jsonl" in followed.stdout, followed.stderr
    assert "prompts.jsonl" in followed.stdout.partition("rlhf: ")[2], (
        "the job's own output: it has read the file that travelled"
    )
    assert followed.returncode == 2
    examples = SftSettings(
        run={"dir": str(here / "sft")},
        data={"examples": "prompts.jsonl"},
        **{name: BASE[name] for name in ("policy", "cluster")},
    )
    (here / "run.yaml").write_text(show(examples))
    left = submit(jobs_server, here, "--command", "sft")
    assert left.returncode == 0, left.stderr
    assert "with config.yaml, prompts.jsonl" in left.stdout
    assert "ray job stop --address" in left.stdout


@pytest.mark.engine
def test_a_wrong_token_is_a_message(jobs_server: Any, here: Path) -> None:
    (here / "run.yaml").write_text(show(settings()))
    url, environment = jobs_server
    wrong = (url, environment | {"RAY_AUTH_TOKEN": "f" * 64, "RAY_AUTH_TOKEN_PATH": ""})
    refused = submit(wrong, here)
    assert refused.returncode == 2
    assert "Ray refused the token" in refused.stderr
