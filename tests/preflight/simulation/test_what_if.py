"""`rlhf plan --simulate` on a run folder that is written here: its own simulation is right, and what cannot be simulated is refused."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.config import Settings, yamls
from rlhf.preflight.simulation.engine import Decoding, Engine

SPEED = Decoding(0.02, 0.004)
ENGINES, PROMPTS, JUDGE_S, PUBLISH_S = 2, 12, 0.1, 0.25


def learn_s(tokens: int) -> float:
    return 0.3 + 2e-3 * tokens


def lines_of_step(step: int, now: float, rng: random.Random) -> tuple[list[dict[str, Any]], float]:
    """What a synchronous step records that begins now, and when it ends: each engine gets every second prompt at once."""
    spans, arrived, tokens = [], now, 0
    for place in range(ENGINES):
        engine, asked = Engine(SPEED, 16), {}
        for number in range(place, PROMPTS, ENGINES):
            asked[number] = [rng.randint(3, 90) for _ in range(2)]
            engine.add(now, number, asked[number])
        while (end := engine.next_end()) < math.inf:
            for number in engine.end(end):
                facts = {"prompt": f"p{number}", "place": (step - 1) * PROMPTS + number}
                written = {"prompt_tokens": 10, "tokens": asked[number], "versions": [step - 1]}
                spans.append(
                    {"who": f"engine-{place}", "what": "sample", "start": now, "stop": end, **facts, **written}
                )
                spans.append({"who": "reward", "what": "judge", "start": end, "stop": end + JUDGE_S, **facts})
                arrived, tokens = max(arrived, end + JUDGE_S), tokens + 10 + sum(asked[number])
    learned = arrived + learn_s(tokens)
    spans += [
        {"who": "loop", "what": "wait", "start": now, "stop": arrived},
        {"who": "policy", "what": "learn", "start": arrived, "stop": learned, "tokens": tokens},
        {"who": "policy", "what": "publish", "start": learned, "stop": learned + PUBLISH_S},
    ]
    return [{"step": step} | span for span in spans], learned + PUBLISH_S


def write_run(folder: Path, steps: int, **sections: dict[str, Any]) -> Path:
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder)},
        "data": {"prompts": "asset:tiny-prompts.jsonl"},
        "policy": {"model": "asset:tiny-llama", "micro_batch_tokens": 2048},
        "reward": {"kind": "function", "path": "builtins:len"},
        "rollout": {"engines": ENGINES, "max_tokens": 90, "max_num_seqs": 16},
        "loop": {"prompts_per_step": PROMPTS, "steps": steps},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    folder.mkdir()
    (folder / "config.yaml").write_text(yamls.dump(Settings.model_validate(tree).model_dump()))
    now, rng = 1000.0, random.Random(5)
    with (folder / "spans.jsonl").open("w") as spans, (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, steps + 1):
            lines, end = lines_of_step(step, now, rng)
            spans.writelines(json.dumps(line) + "\n" for line in lines)
            line = {"step": step, "time": end, "time/step": end - now, "loop/prompts_trained": PROMPTS}
            metrics.write(json.dumps(line) + "\n")
            now = end + 0.01
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 20)


def rows(run: Path, tmp_path: Path, *overrides: str) -> Iterator[dict[str, Any]]:
    """What the command says, by the kind of the row."""
    path = tmp_path / "answer.json"
    assert main(["plan", "--simulate", str(run), "--json", str(path), *overrides]) == 0
    yield from json.loads(path.read_text())["rows"]


def test_the_run_itself_is_simulated_as_it_was(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, itself, *others = rows(run, tmp_path)
    assert (measured["what"], itself["what"]) == ("measured", "simulated")
    assert itself["step_s"] == pytest.approx(measured["step_s"], rel=0.03)
    assert itself["tokens_per_s"] == pytest.approx(measured["tokens_per_s"], rel=0.06)
    for share in ("idle_engines", "idle_policy"):
        assert itself[share] == pytest.approx(measured[share], abs=0.03)
    assert [row["staleness"] for row in others if row["what"] == "other bound"] == [1, 2, 4]
    assert {(row["engines"], row["ranks"]) for row in others if row["what"] == "other split"} == {(1, 2)}
    said = capsys.readouterr().out
    best = min([itself, *others], key=lambda row: row["step_s"])
    assert (
        f"Best of these: rollout.engines={best['engines']} policy.ranks={best['ranks']} loop.staleness={best['staleness']}"
        in said
    )
    assert "The simulation of the run itself is off by" in said and "20 ms, and 4 ms for each sequence" in said


def test_what_is_asked_for_is_simulated_too(run: Path, tmp_path: Path) -> None:
    asked = ("rollout.engines=6", "policy.ranks=2", "loop.prompts_per_step=24", "loop.staleness=1")
    answer = {row["what"]: row for row in rows(run, tmp_path, *asked)}
    row = answer["asked for"]
    assert (row["engines"], row["ranks"], row["prompts"], row["staleness"], row["stream"]) == (6, 2, 24, 1, True)
    assert row["tokens_per_s"] > 1.5 * answer["simulated"]["tokens_per_s"]


def test_bounds_that_the_settings_refuse_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", 5, algorithm={"name": "grpo", "samples_per_prompt": 2, "correction": "none"})
    assert {row["staleness"] for row in rows(folder, tmp_path)} == {0}
    said = capsys.readouterr().out
    assert (
        "Not simulated: loop.staleness 1, 2, 4. " in said and "`algorithm.correction`: with `loop.staleness: 1`" in said
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["policy.learning_rate=1"], r"the effect of `policy\.learning_rate` is not simulated.*loop\.staleness"),
        (["rollout.engine=3"], r"the effect of `rollout\.engine` is not simulated"),
        (["rollout.engines=0"], r"rollout\.engines"),
        (["config.yaml"], r"leave out CONFIG, --model and --gpu"),
        (["--model", "llama-3.1-8b"], r"leave out CONFIG, --model and --gpu"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["plan", "--simulate", str(run), *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said


def test_a_folder_that_says_too_little_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(folder: Path) -> str:
        assert main(["plan", "--simulate", str(folder)]) == 2
        return capsys.readouterr().err

    assert "no config.yaml, so this is no run folder" in refusal(tmp_path)
    assert "3 steps are recorded, but with loop.staleness 0 at least 4 are needed" in refusal(
        write_run(tmp_path / "short", 3)
    )
    ahead = write_run(tmp_path / "ahead", 7, loop={"prompts_per_step": PROMPTS, "staleness": 2})
    assert "7 steps are recorded, but with loop.staleness 2 at least 8 are needed" in refusal(ahead)
    (ahead / "spans.jsonl").unlink()
    assert "spans.jsonl has no line of an engine" in refusal(ahead)


@pytest.mark.parametrize("line", ['{"what": "learn"}', '{"what": "sample", "tokens": 3}', '{"who": "policy"}'])
def test_a_damaged_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    folder = write_run(tmp_path / "run", 5)
    with (folder / "spans.jsonl").open("a") as file:
        file.write(line + "\n")
    assert main(["plan", "--simulate", str(folder)]) == 2
    assert "a line that no run writes" in capsys.readouterr().err
