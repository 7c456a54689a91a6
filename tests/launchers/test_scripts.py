"""Every launch script parses, and shellcheck finds nothing in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launchers"
SCRIPTS = sorted([*FOLDER.rglob("*.sh"), *FOLDER.rglob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    command = [str(Path(sys.executable).with_name("shellcheck")), "-x", str(script.relative_to(FOLDER.parent))]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_there_are_scripts() -> None:
    assert {path.name for path in SCRIPTS} >= {"train.sbatch", "train_container.sbatch", "job.sh", "hosts.sh"}
