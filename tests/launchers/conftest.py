"""A machine on which the programs of a cluster are stand-ins, so that the real launch scripts can run on it in a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fake_commands.py"
TINY = ROOT / "configs" / "tiny.yaml"


def _hear_interrupts() -> None:
    """A shell that starts the tests in the background has them ignore SIGINT, and a script cannot undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Stage:
    """Runs a launch script among stand-ins; files under `folder` steer them and hold what they saw."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_dir = folder / "run"
        self.process: subprocess.Popen | None = None
        self.arguments = [str(TINY), f"run.dir={self.run_dir}"]
        self.environment = {"FAKE": str(folder), "FAKE_PYTHON": sys.executable, "GRACE_S": "5"}
        (folder / "bin").mkdir()
        (folder / "driver").write_text("stay")
        for name in ("srun", "scontrol", "scancel", "ssh", "ray", "python", "rlhf"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{FAKES}" {name} "$@"\n')
            program.chmod(0o755)

    def start(self, *command: str, options: Sequence[str] = (), **environment: str) -> None:
        self.log = (self.folder / "log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            ["bash", *command, *self.arguments, *options],
            cwd=self.folder,
            env=os.environ | self.environment | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"} | environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )

    def until(self, name: str) -> None:
        """Wait until a stand-in has left the file `name`."""
        self.wait_for((self.folder / name).exists)

    def wait_for(self, condition: Callable[[], bool], running: bool = True) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert (self.process.poll() is None) is running and time.monotonic() < end, self.output
            time.sleep(0.02)

    def ended(self) -> int:
        return self.process.wait(120)

    @property
    def output(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for process in processes_of(tmp_path):
        with suppress(ProcessLookupError):  # it may just have ended
            os.kill(process, signal.SIGKILL)


def processes_of(folder: Path) -> list[int]:
    """All processes that were started for one stage, in whatever session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or is another user's
                continue
            if f"FAKE={folder}".encode() in environment:
                found.append(int(entry.name))
    return found
