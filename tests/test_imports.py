"""Imports point downwards only, and rooms of one storey do not know each other."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Mapping
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
    ("preflight",),
    ("commands",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}
REWARD_STOREYS = ((None,), ("verifiers",), ("judges",), ("serving", "training"))
"""The inner rooms of `reward`; None: the files beside them."""
NAME = re.compile(r"(rlhf(?:\.\w+)+)(?::(\w+))?")
"""A module or what is in it, given as a string."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[tuple[str, ...], int]]:
    """(parts of the name below `rlhf`, line) of every import of the package in this file, inside functions and as strings too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (name := NAME.fullmatch(node.value)):
            names = [name[1]]
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_engines_knows_vllm(path: Path) -> None:
    """Inside functions too, and by the names of its modules."""
    if room_of(path) == "engines":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"vllm(\.\w+)+", node.value) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            names = texts if called in ("import_module", "__import__", "find_spec") else []
        wrong = [name for name in names if name.partition(".")[0] == "vllm"]
        assert not wrong, f"{path}:{node.lineno}: {wrong[0]}; only `rlhf.engines` knows vLLM"


def test_names_given_as_strings_are_there() -> None:
    """Also those of the entry points, with which the shell and vLLM find the package."""
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = {**project["scripts"], **project["entry-points"]["vllm.general_plugins"]}
    strings = [("pyproject.toml", text) for text in points.values()]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append((f"{path}:{node.lineno}", node.value))
    for place, text in strings:
        name = NAME.fullmatch(text)
        if name is None or name[1].split(".")[1] not in FLOOR:
            continue
        module, inside = root.joinpath(*name[1].split(".")), name[2]
        if not there(module):  # a name with a dot before its last part
            module, inside = module.parent, module.name
        assert there(module) and (inside is None or inside in bound_names(module)), f"{place}: there is no `{text}`"


def there(module: Path) -> bool:
    return module.with_suffix(".py").exists() or (module / "__init__.py").exists()


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


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """A circle of imports, also of those inside functions or for types only: none of its modules can be understood without the others."""
    modules = {module_of(path): path for path in FILES}
    waiting = {name: imported_modules(path, modules) - {name} for name, path in modules.items()}
    while free := {name for name, needed in waiting.items() if not needed}:
        waiting = {name: needed - free for name, needed in waiting.items() if name not in free}
    while above := waiting.keys() - {name for needed in waiting.values() for name in needed}:
        waiting = {name: needed for name, needed in waiting.items() if name not in above}
    assert not waiting, "\n".join(f"{name} imports {', '.join(sorted(needed))}" for name, needed in waiting.items())


def imported_modules(path: Path, modules: Mapping[str, Path]) -> set[str]:
    """Of these modules, those that a file imports from anywhere in it. A package that merely holds a module is not imported for itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module or "" for name in inside}
    return found & modules.keys()


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
                    found = there(source / name) or name in bound_names(source)
                    assert found, f"{path}:{node.lineno}: {node.module} has no `{name}`"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stay_in_their_module(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own: set[str] = set()  # modules of the package, by the names that this file gives them
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rlhf":
            source = PACKAGE.parent.joinpath(*(node.module or "").split("."))
            private = [alias.name for alias in node.names if is_private(alias.name)]
            assert not private, f"{path}:{node.lineno}: `{private[0]}` is {node.module}'s own"
            own |= {alias.asname or alias.name for alias in node.names if there(source / alias.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
            assert not is_private(node.attr), f"{path}:{node.lineno}: {node.value.id}.{node.attr} is that module's own"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


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
