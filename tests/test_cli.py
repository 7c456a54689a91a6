"""The command line: every command reaches its function with what was typed, and a user's mistake ends with status 2."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rlhf.commands.evaluate
import rlhf.commands.generate
import rlhf.commands.train
from rlhf.cli import main
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What three commands were called with."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    places = {"train": rlhf.commands.train, "generate": rlhf.commands.generate, "evaluate": rlhf.commands.evaluate}
    for name, module in places.items():
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: made.append((bound(real, a, k), k)))
    return made


def bound(real: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments, once the real function's signature has accepted the call."""
    inspect.signature(real).bind(*args, **kwargs)
    return args


def test_train_takes_overrides_before_and_after_options(calls: list) -> None:
    assert main(["train", TINY, "loop.steps=3", "--debug", "loop.steps=4", "run.seed=9", "run.dir=runs/none-here"]) == 0
    ((settings,), options) = calls[0]
    assert isinstance(settings, Settings)
    assert (settings.loop.steps, settings.run.seed) == (4, 9)
    assert options == {"debug": True, "resume": False, "replay": None}


def test_a_replay_begins_with_the_first_step(calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", TINY, "--replay", "runs/recorded"]) == 0
    assert calls[0][1]["replay"] == "runs/recorded"
    assert main(["train", TINY, "--replay", "runs/recorded", "--resume"]) == 2
    assert "begins with the first step" in capsys.readouterr().err


def test_eval_and_generate_reach_the_loop(calls: list) -> None:
    assert main(["eval", TINY, "--policy", "export", "loop.eval_limit=3", "--json", "out.json"]) == 0
    assert main(["generate", "m", "--prompt", "a", "--prompt", "b", "--n", "2", "--temperature", "0"]) == 0
    assert calls[0][0][0].loop.eval_limit == 3
    assert calls[0][1] == {"policy": "export", "baseline": None, "json_path": "out.json"}
    assert calls[1][1]["model"] == "m" and calls[1][1]["prompts"] == ["a", "b"] and calls[1][1]["n"] == 2


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str], calls: list) -> None:
    assert main(["train", TINY, "--dry-run", "loop.steps=3", "run.dir=runs/none-here"]) == 0
    assert "3 steps" in capsys.readouterr().out
    assert not calls


def test_config_show_prints_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", TINY, "algorithm.beta=0.5"]) == 0
    out = capsys.readouterr().out
    assert "beta: 0.5" in out and "publish_deadline_s" in out


def test_output_that_nobody_reads_on_ends_quietly() -> None:
    program = (
        "import os, signal, sys\n"
        "from rlhf.cli import main\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 1)\n"
        "assert main(['config', 'show', 'configs/movie_reviews.yaml']) == 0\n"
        "assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN  # else a lost peer's socket would kill a run\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_algorithms_lists_the_methods_and_the_fields_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms"]) == 0
    table = capsys.readouterr().out
    lines = [line.split()[0] for line in table.splitlines() if line[:1].strip()]
    assert [name for name in lines if name in METHODS] == list(METHODS)
    assert main(["algorithms", "rloo"]) == 0
    out = capsys.readouterr().out
    for field, info in METHODS["rloo"].model_fields.items():
        assert field == "name" or (f"\n{field} = " in out and info.description.replace("`", "")[:20] in out)
    assert "samples_per_prompt = 4  (whole number ≥ 2, ≤ 4096)" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["algorithms", "pp0"],
        ["train", "none.yaml"],
        ["train", TINY, "loop.stepz=3"],
        ["train", TINY, "policy.model=./none", "--dry-run"],
        ["fetch", "asset:none"],
        [],
        ["trian"],
        ["train"],
        ["train", TINY, "--bogus"],
        ["fetch", "a", "--b"],
        ["fetch", "some/model"],
        ["doctor", "--no-step", "--prompt", ""],
        ["generate", "asset:tiny-llama", "--prompts", ""],
        ["generate", "asset:tiny-llama", "--prompts", "~nobody-of-this-name/prompts.jsonl"],
        ["generate", "asset:tiny-llama", "--prompt", "Hi", "--template-arguments", '{"tokenize": true}'],
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("rlhf: ") and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("generate m --prompt p --n 0", "--n: `0` is not a whole number"),
        ("generate m --prompt p --temperature nan", "--temperature: `nan` is not a finite number"),
        ("generate m --prompt p --max-tokens 0", "--max-tokens: `0` is not"),
        ("generate m --prompt p --max-tokens 99999999", "is not a whole number of at least 1 and at most 16,777,216"),
        ("generate m --prompt p --out .", "--out: `.` is a folder"),
        ("generate m --prompt p --best-of 1", "--best-of: `1` is not a whole number of at least 2"),
        ("eval CONFIG --policy m --json none/x.json", "--json: `none/x.json`: its folder does not exist"),
        ("plan --model llama-3.1-8b --json none/x.json", "--json: `none/x.json`: its folder does not exist"),
        ("plan --model llama-3.1-8b --nodes 100000000", "--nodes: `100000000` is not a whole number of at least 1 and"),
        ("plan --model llama-3.1-8b --gpus-per-node 0", "--gpus-per-node: `0` is not"),
        ("plan --model llama-3.1-8b loop.stepz=3", "rlhf: `rlhf plan --model`: override `loop.stepz=3`: "),
        ("doctor --json .", "--json: `.` is a folder"),
        ("reward calibrate CONFIG --output .", "--output: `.` is a folder"),
        ("reward serve CONFIG --port 99999", "--port: `99999` is not a port"),
        ("reward train --model m --train t --output o --threads 0", "--threads: `0` is not"),
        ("submit CONFIG --address nonsense", "--address: `nonsense` is no address"),
    ],
)
def test_an_option_that_cannot_be_is_refused_at_once(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.replace("CONFIG", TINY).split()) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert says in message


def test_fetch_prints_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "asset:tiny-prompts.jsonl"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\nfrom rlhf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_message_shows_what_a_user_wrote_without_driving_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "run\x1b[31m.yaml"]) == 2
    assert main(["train", "x/" * 4000]) == 2
    said = capsys.readouterr().err
    assert "run\\x1b[31m.yaml" in said and "\x1b" not in said and len(said) < 1500
