"""What a newcomer and a robot are told is so: commands, files, hooks and the workflow of hosted continuous integration."""

from __future__ import annotations

import ast
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
SOURCES = sorted((ROOT / "rlhf").rglob("*.py"))
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


def is_lookup(node: ast.expr) -> bool:
    """`getattr(thing, name)` with a name that is not written there."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"):
        return False
    return not isinstance(node.args[1], ast.Constant)


def called_by_name(tree: ast.AST) -> list[int]:
    """Lines where a method is called by a name that only the running program knows, or that is a string."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("remote", "options") and is_lookup(node.value):
            lines.append(node.lineno)
        if isinstance(node, ast.Call):
            verb = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            text = bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
            by_string = (
                verb in ("ask", "keep", "share", "call", "call_keep", "tell") and text and len(node.keywords) > 0
            )
            if by_string or verb == "methodcaller" or is_lookup(node.func):
                lines.append(node.lineno)
    return lines


def test_methods_are_looked_up_by_name_in_one_place() -> None:
    """A call names its method by the function itself, which readers, editors and mypy find (`rlhf/cluster/calls.py`)."""
    found = {path.relative_to(ROOT).as_posix(): called_by_name(ast.parse(path.read_text())) for path in SOURCES}
    classes = {"rlhf/reward/verifiers/verifier.py"}  # a class, by the name of its kind
    assert {path for path, lines in found.items() if lines} == classes
    tree = ast.parse((ROOT / "rlhf/cluster/calls.py").read_text())
    assert len([node for node in ast.walk(tree) if isinstance(node, ast.expr) and is_lookup(node)]) == 1


@pytest.mark.parametrize(
    "line", ['handle.call("learn", deadline=1)', "getattr(actor, method).remote()", "getattr(self, name)(1)"]
)
def test_a_call_by_name_is_found(line: str) -> None:
    assert called_by_name(ast.parse(line)) == [1]


def deepspeed_details(tree: ast.AST) -> list[int]:
    """Lines that import DeepSpeed, look into its engine, or know how it marks parameters."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = any(alias.name.partition(".")[0] == "deepspeed" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found = (node.module or "").partition(".")[0] == "deepspeed"
        elif isinstance(node, ast.Attribute):
            trained = isinstance(node.value, ast.Attribute) and node.value.attr == "engine"
            found = node.attr.startswith("ds_") or (trained and node.attr in ("module", "optimizer"))
        else:
            found = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("ds_")
        if found:
            lines.append(node.lineno)
    return lines


def test_deepspeed_is_known_in_one_place() -> None:
    """`rlhf/training/deepspeed.py` and its siblings: what else trains sees `Trainer`, `PlacedModel` and whole or local tensors."""
    found = [path for path in SOURCES if deepspeed_details(ast.parse(path.read_text()))]
    assert found and {path.name.startswith("deepspeed") for path in found} == {True}
    assert {path.parent for path in found} == {ROOT / "rlhf" / "training"}


@pytest.mark.parametrize(
    "line",
    ['hasattr(parameter, "ds_id")', "parameter.ds_shape", "trainer.engine.module", "from deepspeed.zero import Init"],
)
def test_a_detail_of_deepspeeds_is_found(line: str) -> None:
    assert deepspeed_details(ast.parse(line)) == [1]


def test_the_architecture_page_names_what_there_is() -> None:
    """Files, and `file::Name` or `file::Class.method` for what is defined in one."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:rlhf|tests)/[\w/.]*)(?:::([\w.]+))?`", text)
    assert len(named) > 50
    for file, name in named:
        assert (ROOT / file).exists(), file
        assert not name or name in defined(ROOT / file), f"{file}::{name}"


def defined(file: Path) -> set[str]:
    """Functions, classes, their methods, and variables of a module."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names |= {
                f"{node.name}.{one.name}" for one in inner if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names
