"""A run on one machine, from outside: who can reach it, and what is left when it is told to end, or loses a rank."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[1]
MARK = "RLHF_TEST_RUN"
TIMEOUT_S = 600
SMALL = ("rollout.engines=1", "data.eval_prompts=null", "loop.eval_every=0")
ALONE = ("policy.ranks=1", "checkpoint.every=0")


class Run:
    """`rlhf train` on the tiny model, as a user starts it, with a mark by which all its processes are known."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self._mark = folder, uuid.uuid4().hex
        plain = (f"run.dir={folder}", "cluster.device=cpu", "tracking.console=off", "loop.steps=100000")
        command = [sys.executable, "-m", "rlhf.cli", "train", "configs/tiny.yaml", *plain, *SMALL, *options]
        self._errors = folder.with_name(f"{folder.name}-{self._mark}.log")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {MARK: self._mark},
            stdout=subprocess.DEVNULL,
            stderr=self._errors.open("w"),
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        """Those that live, the driver among them."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # it has ended, or is another user's
                continue
        return found

    def steps(self) -> list[int]:
        """Those whose line is written to its end."""
        metrics = self.folder / "metrics.jsonl"
        written = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        return [json.loads(line)["step"] for line in written if line.endswith("\n")]

    def said(self) -> str:
        return self._errors.read_text()

    def wait(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end, f"nothing came: {self.said()[-3000:]}"
            assert self.process.poll() is None, f"the run has ended: {self.said()[-3000:]}"
            time.sleep(0.2)

    def listening(self) -> dict[str, list[str]]:
        """Address -> who listens there, or takes datagrams."""
        found: dict[str, list[str]] = {}
        for process in self.processes():
            try:
                sockets = process.net_connections("inet")
            except psutil.Error:
                continue
            for one in sockets:
                if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and one.laddr:
                    found.setdefault(one.laddr.ip, []).append(f"{process.name()}:{one.laddr.port}")
        return found

    def must_be_private(self, ray: bool) -> None:
        """Nothing listens where others could reach it."""
        listening = self.listening()
        assert len(self.processes()) > (5 if ray else 0)
        assert sum(map(len, listening.values())) > (8 if ray else 0), "what is looked at is what listens"
        open_to_others = {
            ip: who
            for ip, who in listening.items()
            if not ip.removeprefix("::ffff:").startswith("127.") and ip != "::1"
        }
        assert open_to_others == {}

    def kill(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()

    def must_end_well(self) -> None:
        """Told by SIGTERM, with one line, and nobody is left."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=TIMEOUT_S) == 143, self.said()[-6000:]
        said = self.said()
        assert said.splitlines().count("rlhf: ended by SIGTERM") == 1, said[-6000:]
        for word in ("Traceback", "Stack trace", "stack trace", "*** ", "terminate called", "SIGABRT"):
            assert word not in said, said[-6000:]
        self.must_be_gone()

    def must_be_gone(self) -> None:
        end = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        assert [process.cmdline() for process in left] == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*options: str) -> Run:
        runs.append(Run(tmp_path / "run", *options))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def test_a_killed_rank_ends_the_run_with_its_name_and_resume_goes_on_until_sigterm(start: Callable[..., Run]) -> None:
    """And nothing listens beyond the loopback."""
    run = start("checkpoint.every=1")
    run.wait(lambda: len(run.steps()) >= 2)
    run.must_be_private(ray=True)
    (rank, *_) = [process for process in run.processes() if "ray::PolicyRank" in " ".join(process.cmdline())]
    rank.kill()
    assert run.process.wait(timeout=TIMEOUT_S) not in (0, 143)
    assert "died while the driver waited for" in run.said()
    assert re.search(r"policy-\d", run.said())
    run.must_be_gone()
    done = run.steps()
    again = start("checkpoint.every=1", "--resume")
    again.wait(lambda: len(again.steps()) > len(done))
    again.must_end_well()
    assert again.steps() == list(range(1, len(again.steps()) + 1))


def test_in_one_process_nothing_listens_beyond_the_loopback_and_sigterm_ends_it(start: Callable[..., Run]) -> None:
    run = start(*ALONE, "--debug")
    run.wait(run.steps)
    run.must_be_private(ray=False)
    run.must_end_well()
    assert run.steps()


def test_sigterm_ends_a_run_that_is_starting(start: Callable[..., Run]) -> None:
    run = start(*ALONE)
    # Ray's own processes start; no rank is killed while DeepSpeed builds, which would make the next run wait.
    run.wait(lambda: any("raylet" in process.name() for process in run.processes()))
    run.must_end_well()
