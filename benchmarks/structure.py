"""The structure of the package in numbers, of two checkouts side by side: `python benchmarks/structure.py OLD NEW`.

Reads the source alone and imports nothing of it, so that checkouts of any age can be compared.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

STRING_CALLS = {"call", "call_keep", "_all", "_ask_all"}
"""Methods whose first argument, as a text, was the name of another one."""


class Checkout:
    """The modules of `rlhf/` below a root, parsed."""

    def __init__(self, root: Path):
        self.root = root
        files = sorted((root / "rlhf").rglob("*.py"))
        self.sources = {self._name(file): file.read_text(encoding="utf-8") for file in files}
        self.trees = {name: ast.parse(text) for name, text in self.sources.items()}

    def _name(self, file: Path) -> str:
        parts = file.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def measures(self) -> dict[str, float]:
        """Name -> number, in the order to print them."""
        lines = {name: text.count("\n") for name, text in self.sources.items()}
        functions = [node for tree in self.trees.values() for node in ast.walk(tree) if _is_function(node)]
        imports = self.imports()
        rooms = {
            (_room(one), _room(other))
            for one, others in imports.items()
            for other in others
            if _room(one) != _room(other)
        }
        return {
            "files": len(lines),
            "lines": sum(lines.values()),
            "median file, lines": statistics.median(lines.values()),
            "longest file, lines": max(lines.values()),
            "longest function, lines": max(node.end_lineno - node.lineno + 1 for node in functions),
            "arrows between rooms": len(rooms),
            "arrows between modules": sum(map(len, imports.values())),
            "modules in import circles": sum(len(circle) for circle in circles(imports)),
            "calls that name a method by a string": self.string_calls(),
            "rooms that import vLLM": len(self.rooms_importing("vllm")),
            "rooms that import DeepSpeed": len(self.rooms_importing("deepspeed")),
            "files with DeepSpeed's internals": self.files_with(
                r"\bds_(id|tensor|shape|numel|status)\b|engine\.module\b"
            ),
            "private names used across modules": self.private_names(),
        }

    def imports(self) -> dict[str, set[str]]:
        """Module -> modules of the package that it imports, inside functions too."""
        return {name: set(self._imports_of(name)) - {name} for name in self.trees}

    def _imports_of(self, name: str) -> Iterator[str]:
        for node in ast.walk(self.trees[name]):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [one if one in self.trees else node.module for one in whole]
            yield from (one for one in names if one in self.trees)

    def string_calls(self) -> int:
        """Actor calls of the form `handle.call("method", ...)`."""
        calls = (node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
        return sum(
            isinstance(call.func, ast.Attribute)
            and call.func.attr in STRING_CALLS
            and bool(call.args)
            and isinstance(call.args[0], ast.Constant)
            and isinstance(call.args[0].value, str)
            for call in calls
        )

    def rooms_importing(self, package: str) -> set[str]:
        """Rooms with an import of a library, inside functions too."""
        found = re.compile(rf"^\s*(from|import) {package}\b", re.MULTILINE)
        return {_room(name) for name, text in self.sources.items() if found.search(text)}

    def files_with(self, pattern: str) -> int:
        """Files in which a pattern occurs."""
        return sum(bool(re.search(pattern, text)) for text in self.sources.values())

    def private_names(self) -> int:
        """Names with a leading underscore that another module imports, or reads of an imported module."""
        count = 0
        for tree in self.trees.values():
            modules = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rlhf":
                    names = [alias.name for alias in node.names]
                    count += sum(name.startswith("_") and not name.startswith("__") for name in names)
                    modules |= {
                        alias.asname or alias.name
                        for alias in node.names
                        if f"{node.module}.{alias.name}" in self.trees
                    }
            count += sum(
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in modules
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                for node in ast.walk(tree)
            )
        return count


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or through others. A package's own file is no module of it."""
    reach = {name: _reached(name, imports) for name in imports}
    found: list[set[str]] = []
    for name in imports:
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reached(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in imports[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "rlhf"


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roots", nargs="+", type=Path, metavar="CHECKOUT")
    parser.add_argument(
        "--json", type=Path, help="where to write the numbers, a list with one object for each checkout"
    )
    args = parser.parse_args()
    measured = [Checkout(root).measures() for root in args.roots]
    for name in measured[0]:
        print(f"| {name} | " + " | ".join(f"{one[name]:g}" for one in measured) + " |")
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
