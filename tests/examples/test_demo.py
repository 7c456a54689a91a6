"""The last part of the demo: from a run folder to table, figures and curve. (Its first parts are the whole system.)"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

DEMO = Path(__file__).parents[2] / "examples" / "movie_reviews" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """demo.py with a judge that counts exclamation marks, and nothing to prepare."""
    judge, prepare = ModuleType("judge"), ModuleType("prepare")
    judge.vader = lambda text: float(text.count("!"))
    monkeypatch.setitem(sys.modules, "judge", judge)
    monkeypatch.setitem(sys.modules, "prepare", prepare)
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_result_is_shown_and_written(demo: ModuleType, tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(4)]
    for moment, reward, text in (("before", -0.1, "bad"), ("after", 1.8, "good!")):
        write(
            tmp_path / f"heldout_{moment}.jsonl",
            [{"prompt": prompt, "response": text, "reward": reward, "length": 30} for prompt in prompts],
        )
    write(
        tmp_path / "metrics.jsonl", [{"step": step, "reward/mean": step / 10, "policy/kl": 0.0} for step in (1, 2, 3)]
    )
    write(tmp_path / "evaluations.jsonl", [{"step": 0, "policy/kl": 0.0}, {"step": 3, "policy/kl": 0.17}])
    manifest = {"host": {"cpus": 2, "processor": "AMD EPYC"}, "dtype": "bf16: AVX-512 BF16"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    console = Console(file=io.StringIO(), width=200)
    demo.show_result(tmp_path, 324.0, console)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["before"] == {"reward": -0.1, "judge": 0.0, "length": 30.0}
    assert summary["after"] == {"reward": 1.8, "judge": 1.0, "length": 30.0}
    assert (summary["kl_per_token"], summary["win_rate"], summary["steps"]) == (0.17, 1.0, 3)
    assert summary["seconds"] == 324.0
    text = console.file.getvalue()
    for part in (
        "+1.900",
        "VADER",
        "prompt 2",
        "curve.png",
        "summary.json",
        "5.4 minutes",
        "bf16: AVX-512 BF16; 2 cores of AMD EPYC",
    ):
        assert part in text.replace("\n", "")
    assert (tmp_path / "curve.png").exists()


def test_an_earlier_demo_is_set_aside_but_its_reward_model_stays(demo: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for name in ("first", "second"):
        (folder / "reward_model").mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(name)
        demo.set_aside(folder)
    assert [entry.name for entry in folder.iterdir()] == ["reward_model"]
    assert (tmp_path / "demo-previous" / "manifest.json").read_text() == "second"
    demo.set_aside(folder)  # no run: nothing to do
    assert (tmp_path / "demo-previous" / "manifest.json").exists()


# In place of `rlhf train`: says in a file that it runs, which signals it gets, and that it has ended in order, which takes it a moment.
STAND_IN = """#!{python}
import signal, sys, time

def note(text):
    with open("{notes}", "a") as file:
        file.write(text + "\\n")

def end(number, _):
    note(signal.Signals(number).name)
    time.sleep(0.3)
    note("ended")
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
note("started")
{work}
"""

# Starts demo.py with that for a Python. (Packages and data are the real system's.)
START = """
import runpy, sys, types
for name, function in (("judge", "check_packages"), ("prepare", "prepare")):
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], function, lambda *_, **__: None)
sys.executable, demo = sys.argv[1:3]
sys.argv = [demo, *sys.argv[3:]]
runpy.run_path(demo, run_name="__main__")
"""


def started_demo(folder: Path, work: str) -> tuple[subprocess.Popen[str], Path]:
    """The demo, in a session of its own as from a terminal, with a stand-in that does this; and where the stand-in writes."""
    stand_in, notes = folder / "stand_in", folder / "notes"
    stand_in.write_text(STAND_IN.format(python=sys.executable, notes=notes, work=work))
    stand_in.chmod(0o755)
    command = [sys.executable, "-c", START, stand_in, DEMO, f"run.dir={folder / 'run'}"]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True), notes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_that_the_demo_has_started(tmp_path: Path, number: signal.Signals) -> None:
    demo, notes = started_demo(tmp_path, work="time.sleep(60)")
    while not (notes.exists() and notes.read_text() == "started\n"):
        assert demo.poll() is None, demo.stderr.read()
        time.sleep(0.02)
    os.killpg(demo.pid, number)  # as Ctrl-C in a terminal: to all that belong to it
    demo.communicate(timeout=60)
    assert notes.read_text().split() == ["started", "SIGTERM", "ended"]
    assert demo.returncode == 128 + number


def test_a_run_that_fails_ends_the_demo(tmp_path: Path) -> None:
    demo, _ = started_demo(tmp_path, work="sys.exit(2)")
    _, errors = demo.communicate(timeout=60)
    assert (demo.returncode, errors) == (1, "demo: `rlhf train` ended with status 2; its own message stands above\n")
