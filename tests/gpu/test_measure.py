"""The prepared GPU script in miniature, on whatever device is there: its parts run, and what fails costs only itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(HERE))
    try:
        import measure
        import parts
    finally:
        sys.path.remove(str(HERE))
    measure.parts = parts
    return measure


@pytest.mark.parametrize("part", ["equality", "speed", "ragged", "logprobs", "step", "memory"])
def test_a_part_in_miniature(script: ModuleType, tmp_path: Path, part: str) -> None:
    file = tmp_path / "rows.jsonl"
    script.parts.PARTS[part](script.parts.Table(file), True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({tuple(row) for row in rows}) == 1, "rows of one table"
    assert all(row.get("right", True) for row in rows)
    forms = {row.get("form") for row in rows}
    if part in ("equality", "speed", "ragged", "step"):
        assert "flex" in forms
    if part == "logprobs":
        assert [row["chunk"] for row in rows] == ["naive", "512", "2048"]
        assert all(row["gap_gradients"] < 0.01 for row in rows)
    assert script.shown(part, script.Outcome("done", 1.0, tuple(rows))).count("\n") == len(rows) + 2


def test_the_script_needs_neither_ray_nor_vllm_nor_deepspeed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "report.json"
    assert script.main(["--smoke", "--parts", "machine", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["smoke"] and report["parts"]["machine"]["status"] == "done"
    facts = {row["what"]: row["value"] for row in report["parts"]["machine"]["rows"]}
    assert facts["of what is not needed, imported"] == ""
    assert "machine: done" in capsys.readouterr().out


def test_a_part_that_fails_or_hangs_keeps_its_rows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    write = "import sys, time; open(sys.argv[-1], 'a').write('{\"a\": 1}\\n'); print('said'); "

    def run(code: str, limit: float = 30.0) -> object:
        return script.run([sys.executable, "-c", write + code], limit)

    done, failed = run("pass"), run("sys.exit('broken')")
    assert (done.status, done.rows, done.why) == ("done", ({"a": 1},), "")
    assert (failed.status, failed.rows, failed.why) == ("failed", ({"a": 1},), "said\nbroken")
    assert run("pass", limit=1.0).status == "left out"
    monkeypatch.setattr(script, "LEAST_S", 0)
    hung = run("sys.stdout.flush(); time.sleep(60)", limit=1.5)
    assert (hung.status, hung.rows, hung.why) == ("timed out", ({"a": 1},), "said")
    skipped = script.run(
        [sys.executable, "-c", "import sys; open(sys.argv[-1], 'a').write('{\"left_out\": \"x\"}')"], 30
    )
    assert (skipped.status, skipped.why, skipped.rows) == ("left out", "x", ())


def test_the_parts_are_those_that_are_planned(script: ModuleType) -> None:
    assert list(script.PARTS) == list(script.parts.PARTS)
    assert sum(script.PARTS.values()) < 2 * script.LIMIT_S <= 1200
