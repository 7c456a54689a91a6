"""Weights & Biases: real offline files, and no way to stop or delay a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import Settings
from rlhf.tracking import Record
from rlhf.tracking import wandb as tracking_wandb
from rlhf.tracking.wandb import Wandb


class Run:
    """Remembers what it is told; `log` raises what it is given."""

    def __init__(self, error: Exception | None = None):
        self.error, self.logged, self.finished = error, [], False

    def log(self, values: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("rlhf.tracking")]


def test_lines_arrive_under_their_names(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    run = Run()
    wandb = Wandb(settings(tmp_path), tmp_path, "id", start=lambda *_: run)
    wandb.step({"step": 1, "time": 2.0, "reward/mean": 0.5, "policy/kl": None, "warnings": ["policy/kl is nan"]})
    wandb.evaluation({"step": 1, "reward/mean": 0.75})
    wandb.close()
    assert run.logged == [{"step": 1, "time": 2.0, "reward/mean": 0.5}, {"step": 1, "eval/reward/mean": 0.75}]
    assert run.finished


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("no network"), ImportError("no wandb")])
def test_a_failing_logger_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, settings: Callable[..., Settings]
) -> None:
    wandb = Wandb(settings(tmp_path), tmp_path, "id", start=lambda *_: Run(error))
    for step in range(5):
        wandb.step({"step": step})
    wandb.close()
    assert len(warnings(caplog)) == 1
    assert repr(error) in warnings(caplog)[0]


def test_a_start_that_fails_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: Callable[..., Settings]
) -> None:
    def start(*_: object) -> Run:
        raise ConnectionError("no route")

    wandb = Wandb(settings(tmp_path), tmp_path, "id", start=start)
    wandb.step({"step": 1})
    wandb.close()
    assert len(warnings(caplog)) == 1


def test_a_start_that_hangs_delays_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., Settings]
) -> None:
    monkeypatch.setattr(tracking_wandb, "FINISH_S", 0.1)
    monkeypatch.setattr(tracking_wandb, "QUEUE_LINES", 3)
    release = threading.Event()

    def start(*_: object) -> Run:
        release.wait(60)
        return Run()

    wandb = Wandb(settings(tmp_path), tmp_path, "id", start=start)
    for step in range(10):
        wandb.step({"step": step})
    wandb.close()
    assert len(warnings(caplog)) == 1
    release.set()


def test_offline_writes_its_files_into_the_run_folder(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Callable[..., Settings],
    lines: Callable[[Path], list[dict]],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # nothing here may reach for the network
    with Record(settings(folder, tracking={"wandb": "offline"}), resume=False) as record:
        record.step(1, {"reward/mean": 0.5})
        record.step(2, {"reward/mean": 0.75, "policy/loss": float("nan")})
        record.evaluation(2, {"reward/mean": 1.0})
    # W&B's own process may still be writing when `finish` returns; it has written all when it has ended, as at exit.
    pytest.importorskip("wandb").teardown()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert record.run_id in file.name
    content = file.read_bytes()
    for name in (b"reward/mean", b"eval/reward/mean"):
        assert name in content
    assert len(lines(folder / "metrics.jsonl")) == 2


def test_online_without_a_key_is_kept_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., Settings]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    wandb = Wandb(settings(tmp_path, tracking={"wandb": "online"}), tmp_path, "abc", start=None)
    wandb.step({"step": 1, "reward/mean": 0.5})
    wandb.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert any("kept offline" in text for text in warnings(caplog))
