"""The run folder: what is in it, what refuses to start, and that nothing can stop it afterwards."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf.config import Settings, UserError
from rlhf.tracking import Record, jsonl
from rlhf.tracking.manifest import git_state, sha256
from rlhf.tracking.record import recorded_dtype
from rlhf.tracking.spans import Timing


def test_a_new_folder_describes_the_run(folder: Path, settings: Callable[..., Settings]) -> None:
    record = Record(settings(folder), resume=False)
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["seed"] == 7
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["run_id"] == record.run_id
    assert manifest["seed"] == 7 and manifest["resumed"] == []
    assert manifest["data"]["data.prompts"]["sha256"] == sha256(folder.parent / "prompts.jsonl")
    assert manifest["versions"]["torch"] and manifest["versions"]["vllm"]
    assert manifest["host"]["cpus"] >= 1 and manifest["host"]["processor"]
    assert manifest["command"] and manifest["started"]


def test_a_run_remembers_what_it_computes_in(folder: Path, settings: Callable[..., Settings]) -> None:
    assert recorded_dtype(str(folder)) is None
    record = Record(settings(folder, policy={"dtype": "fp32"}), resume=False)
    record.computes("fp32", "an old processor")
    assert recorded_dtype(str(folder)) == "fp32"
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == "fp32: an old processor"
    Record(settings(folder, policy={"dtype": "fp32"}), resume=True).computes("fp32", "as before the run was resumed")
    assert json.loads((folder / "manifest.json").read_text())["resumed"][0]["dtype"].endswith("resumed")


@pytest.mark.parametrize("text", ["", "policy: {dtype: bf16", "run: {}\n", "policy: 3\n", "a: 1\na: 2\n"])
def test_a_damaged_configuration_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: the file is damaged.*policy\.dtype"):
        recorded_dtype(str(tmp_path))


def test_asset_names_are_hashed_as_the_files_they_stand_for(
    folder: Path, tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    Record(
        settings(folder, data={"prompts": "asset:x"}), resume=False, resolve=lambda _: str(tmp_path / "prompts.jsonl")
    )
    data = json.loads((folder / "manifest.json").read_text())["data"]["data.prompts"]
    assert data == {"path": "asset:x", "sha256": sha256(tmp_path / "prompts.jsonl")}


def test_git_state_tells_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and not state["dirty"]
    (tmp_path / "file").write_text("two")
    state = git_state(tmp_path)
    assert state is not None and state["dirty"]
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") is None


def test_lines_are_on_disk_at_once(
    folder: Path, settings: Callable[..., Settings], lines: Callable[[Path], list[dict]]
) -> None:
    record = Record(settings(folder), resume=False)
    record.step(1, {"reward/mean": 0.5, "policy/kl": 0.0})
    record.evaluation(0, {"reward/mean": 0.25})
    record.samples(1, [{"prompt": "a", "responses": ["b"], "rewards": [float("nan")]}, {"prompt": "c"}])
    (step,) = lines(folder / "metrics.jsonl")
    assert step["step"] == 1 and step["reward/mean"] == 0.5 and step["time"] > 0
    assert lines(folder / "evaluations.jsonl")[0]["reward/mean"] == 0.25
    first, second = lines(folder / "samples.jsonl")
    assert first == {"step": 1, "prompt": "a", "responses": ["b"], "rewards": [None]}
    assert second["prompt"] == "c"


def timing(step: int) -> Timing:
    return Timing("engine-0", "sample", 1.5, 2.5, step, {"prompt": "a", "tokens": [3]})


def test_timings_are_written_with_the_next_step(
    folder: Path, settings: Callable[..., Settings], lines: Callable[[Path], list[dict]]
) -> None:
    with Record(settings(folder), resume=False) as record:
        record.timing(timing(1))
        record.timing(timing(2))
        assert lines(folder / "spans.jsonl") == []
        record.step(1, {})
        assert lines(folder / "spans.jsonl") == [timing(1).line(), timing(2).line()]
        record.timing(timing(3))
    assert lines(folder / "spans.jsonl") == [timing(step).line() for step in (1, 2, 3)], "none is left at the end"


def test_resuming_cuts_timings_of_steps_that_are_done_again(
    folder: Path, settings: Callable[..., Settings], lines: Callable[[Path], list[dict]]
) -> None:
    with Record(settings(folder), resume=False) as record:
        for step in (1, 2):
            record.timing(timing(step))
            record.timing(timing(step + 1))  # sampled ahead
            record.step(step, {})
    again = Record(settings(folder), resume=True)
    again.rewind(1)
    assert [line["step"] for line in lines(folder / "spans.jsonl")] == [1]


def test_a_folder_with_another_runs_timings_is_refused(folder: Path, settings: Callable[..., Settings]) -> None:
    folder.mkdir()
    (folder / "spans.jsonl").touch()
    with pytest.raises(UserError, match=r"holds no run, but has spans\.jsonl"):
        Record(settings(folder), resume=False)


def test_a_metric_that_is_no_number_becomes_null_with_a_warning(
    folder: Path, settings: Callable[..., Settings], lines: Callable[[Path], list[dict]]
) -> None:
    record = Record(settings(folder), resume=False)
    record.step(1, {"policy/loss": float("nan"), "policy/kl": float("inf"), "reward/mean": 1.0})
    (line,) = lines(folder / "metrics.jsonl")
    assert line["policy/loss"] is None and line["policy/kl"] is None and line["reward/mean"] == 1.0
    assert line["warnings"] == ["policy/loss is nan", "policy/kl is inf"]


def test_a_folder_with_a_run_is_refused(folder: Path, settings: Callable[..., Settings]) -> None:
    Record(settings(folder), resume=False)
    with pytest.raises(UserError, match=r"run\.dir.*--resume"):
        Record(settings(folder), resume=False)


def test_resume_without_a_run_is_refused(folder: Path, settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match=r"run\.dir.*--resume"):
        Record(settings(folder), resume=True)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_refused(
    folder: Path, tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*cannot be written.*Set run\.dir"):
        Record(settings(tmp_path / "file" / "run"), resume=False)


def test_a_full_disk_at_the_start_is_refused(folder: Path, settings: Callable[..., Settings]) -> None:
    """A real full disk: a file-size limit of the process, which makes every write fail."""
    code = (
        "import resource, signal, sys\n"
        "from rlhf.config import Settings, UserError\n"
        "from rlhf.tracking import Record\n"
        "settings = Settings.model_validate_json(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    Record(settings, resume=False)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, settings(folder).model_dump_json()],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=60,
    )
    assert "cannot be written (File too large)" in result.stdout, result.stderr


def test_a_line_that_cannot_be_written_does_not_stop_the_run(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    settings: Callable[..., Settings],
    lines: Callable[[Path], list[dict]],
) -> None:
    record = Record(settings(folder), resume=False)
    record.step(1, {"reward/mean": 1.0})
    (folder / "metrics.jsonl").rename(folder / "kept")
    (folder / "metrics.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        record.step(2, {"reward/mean": 2.0})
        record.step(3, {"reward/mean": 3.0})
    assert len([entry for entry in caplog.records if "a line was lost" in entry.message]) == 1
    (folder / "metrics.jsonl").rmdir()
    (folder / "kept").rename(folder / "metrics.jsonl")
    record.step(4, {"reward/mean": 4.0})
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 4]


def test_resume_keeps_the_run_and_its_old_configuration(folder: Path, settings: Callable[..., Settings]) -> None:
    first = Record(settings(folder), resume=False)
    second = Record(settings(folder, loop={"steps": 200}), resume=True)
    assert second.run_id == first.run_id
    assert yaml.safe_load((folder / "config.yaml").read_text())["loop"]["steps"] == 200
    assert yaml.safe_load((folder / "config.before-resume-1.yaml").read_text())["loop"]["steps"] == 100
    assert len(json.loads((folder / "manifest.json").read_text())["resumed"]) == 1


def test_each_start_notes_its_own_placement(folder: Path, settings: Callable[..., Settings]) -> None:
    for resume, lines in ((False, ["10.0.0.1: policy-0", "10.0.0.2: rollout-0"]), (True, ["10.0.0.3: everybody"])):
        with Record(settings(folder), resume=resume) as record:
            record.placed(lines)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["placement"] == ["10.0.0.1: policy-0", "10.0.0.2: rollout-0"]
    assert [start["placement"] for start in manifest["resumed"]] == [["10.0.0.3: everybody"]]


def test_rewind_cuts_off_what_will_be_done_again(
    folder: Path, settings: Callable[..., Settings], lines: Callable[[Path], list[dict]]
) -> None:
    record = Record(settings(folder), resume=False)
    record.evaluation(0, {"reward/mean": 0.0})
    for step in range(1, 6):
        record.step(step, {"reward/mean": float(step)})
        record.samples(step, [{"prompt": "p"}])
    record.evaluation(5, {"reward/mean": 1.0})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')  # the process died here
    resumed = Record(settings(folder), resume=True)
    resumed.rewind(3)
    resumed.step(4, {"reward/mean": 40.0})
    assert [line["reward/mean"] for line in lines(folder / "metrics.jsonl")] == [1.0, 2.0, 3.0, 40.0]
    assert [line["step"] for line in lines(folder / "samples.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(folder / "evaluations.jsonl")] == [0]


def test_what_a_response_may_hold_ends_no_line(tmp_path: Path) -> None:
    file = jsonl.JsonLines(tmp_path / "samples.jsonl")
    lines = [{"step": step, "response": "a\u2028b\u2029c\x85d\x0be\x1cf\rg\nh"} for step in (1, 2)]
    file.extend(lines)
    assert jsonl.read(file.path) == lines
    file.keep(1)
    assert jsonl.read(file.path) == lines[:1]


def test_a_torn_line_spoils_neither_reading_nor_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xe2\x82')  # torn inside a character
    jsonl.JsonLines(path).append({"step": 3})
    assert jsonl.read(path) == [{"step": 1}, {"step": 3}]
    assert jsonl.read(tmp_path / "none.jsonl") == []


class Raises:
    """A logger that fails whenever it can."""

    def __init__(self) -> None:
        self.calls = 0

    def step(self, line: object) -> None:
        self.calls += 1
        raise RuntimeError("no network")

    evaluation = step

    def close(self) -> None:
        raise RuntimeError("still no network")


def test_a_raising_logger_is_warned_about_once_and_dropped(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    settings: Callable[..., Settings],
    lines: Callable[[Path], list[dict]],
) -> None:
    record = Record(settings(folder), resume=False)
    logger = Raises()
    record._sinks.add("a logger", lambda: logger)
    with caplog.at_level(logging.WARNING):
        record.step(1, {"reward/mean": 1.0})
        record.step(2, {"reward/mean": 2.0})
        record.evaluation(2, {"reward/mean": 2.0})
        record.close()
    assert logger.calls == 1
    assert len([entry for entry in caplog.records if "no network" in entry.message]) == 1
    assert len(lines(folder / "metrics.jsonl")) == 2
