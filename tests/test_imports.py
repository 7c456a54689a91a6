"""Imports point downwards only, and rooms of one storey do not know each other."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf"
STOREYS = (
    ("types", "config"),
    ("tracking", "cluster", "data", "algorithms"),
    ("transfer",),
    ("training", "engines"),
    ("rollout", "policy", "reward"),
    ("loop",),
    ("preflight", "commands"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}
REWARD_STOREYS = ((None,), ("verifiers",), ("judges",), ("serving", "training"))
"""The inner rooms of `reward`; None: the files beside them."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[tuple[str, ...], int]]:
    """(parts of the name below `rlhf`, line) of every import of the package in this file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "rlhf" and len(parts) > 1 and parts[1] in FLOOR:
                found.add((tuple(parts[1:]), node.lineno))
    return found


def imported_rooms(path: Path) -> set[tuple[str, int]]:
    return {(name[0], line) for name, line in imports(path)}


def test_every_room_has_a_storey() -> None:
    assert {room_of(path) for path in FILES} <= FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    wrong = [
        f"{path}:{line}: `{room}` must not import `{other}`"
        for other, line in imported_rooms(path)
        if other != room and FLOOR[other] >= FLOOR[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_types_stand_alone() -> None:
    """The nouns know nothing, not even the settings; the settings know nothing of the nouns."""
    assert not imported_rooms(PACKAGE / "types.py")
    for path in (PACKAGE / "config").glob("*.py"):
        assert {room for room, _ in imported_rooms(path)} <= {"config"}


def test_the_inner_rooms_of_reward_have_storeys_too() -> None:
    floor = {room: number for number, rooms in enumerate(REWARD_STOREYS) for room in rooms}
    for path in (path for path in FILES if room_of(path) == "reward"):
        own = path.parent.name if path.parent.name in floor else None
        for name, line in imports(path):
            other = name[1] if len(name) > 1 and name[1] in floor else None
            assert name[0] != "reward" or other == own or floor[other] < floor[own], f"{path}:{line}: not `{other}`"


def test_what_is_imported_from_the_package_is_there() -> None:
    """Also where an import stands inside of a function, and in the examples and benchmarks, which no test runs to their ends."""
    root = PACKAGE.parent
    for path in (
        path for folder in ("rlhf", "examples", "benchmarks", "tests") for path in (root / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rlhf":
                source = root.joinpath(*node.module.split("."))
                for name in (alias.name for alias in node.names):
                    there = (source / f"{name}.py").exists() or (source / name / "__init__.py").exists()
                    assert there or name in bound_names(source), f"{path}:{node.lineno}: {node.module} has no `{name}`"


@functools.cache
def bound_names(module: Path) -> set[str]:
    """What a module or package binds: functions, classes, variables and what it imports itself."""
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
