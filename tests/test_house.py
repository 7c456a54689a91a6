"""What a newcomer and a robot are told is so: commands, files, hooks and the workflow of hosted continuous integration."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "AGENTS.md")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
LINT = re.findall(r"^\t\$\(BIN\)/(.*)$", MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0], re.MULTILINE)
"""The commands of `make lint`."""


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")


def test_its_make_targets_exist(page: str) -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page, re.MULTILINE))
    assert {"install", "lint", "test"} <= named <= TARGETS


def test_its_files_exist(page: str) -> None:
    example = "mymethod"  # the method that CONTRIBUTING.md adds
    named = set(re.findall(r"(?:rlhf|tests|docs|configs|requirements)/[\w./-]*\w|\b[A-Z]+\.md|\bpyproject\.toml", page))
    links = {link for link in re.findall(r"\]\(([^)#]+)", page) if "://" not in link}
    missing = {name for name in named | links if example not in name and not (ROOT / name).exists()}
    assert len(named) > 10 and missing - {"rlhf/algorithms/NAME.py"} == set()


def test_its_commands_exist(page: str) -> None:
    for command in re.findall(r"\.venv/bin/rlhf (\w+)", page):
        assert command in COMMANDS, command
    for module in re.findall(r"python -m (rlhf[\w.]*)", page):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_names_of_code_in_its_steps_exist(page: str) -> None:
    """`name` in rlhf/some/file.py, or the file and then the name: what is said to be in a file is in it."""
    pairs = [(name, file) for name, file in re.findall(r"`(\w+)` in `(rlhf/[\w/]+\.py)`", page)]
    pairs += [(name, file) for file, name in re.findall(r"`(rlhf/[\w/]+\.py)`, `(\w+)`", page)]
    assert pairs
    for name, file in pairs:
        assert re.search(rf"\bdef {name}\b|\bclass {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), name


def test_lint_checks_style_format_and_types() -> None:
    assert LINT == ["ruff check .", "ruff format --check .", "mypy"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"] == ["rlhf"]


def test_continuous_integration_lints_and_then_tests() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]


def test_the_hosted_workflow_runs_the_same_commands() -> None:
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    assert [run for run in runs if run.startswith("make ")] == ["make lint", "make test"]
    assert {step["uses"] for step in steps if "uses" in step} == {
        "actions/checkout@v4",
        "actions/setup-python@v5",
        "actions/cache@v4",
    }
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (python,) = (step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
    assert floor == f">={python}"


def test_hooks_are_the_environments_own_tools() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    entries = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    assert {entry.split(" --")[0] for entry in entries} == {"ruff check", "ruff format", "mypy"}
    command = [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"]
    subprocess.run(command, cwd=ROOT, check=True)
