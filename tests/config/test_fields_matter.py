"""No field is silently ignored: each one is read somewhere outside rlhf/config.

A field counts as read when an attribute of its name is taken from something that stands for its section:
`settings.loop.steps`, `loop.steps` or `self.loop.steps`; or from a parameter or attribute whose annotation is the
section's class (`settings: PolicySettings` ... `settings.learning_rate`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from rlhf.config import Settings

PACKAGE = Path(__file__).parents[2] / "rlhf"
# The plan and the console show values to people; that alone changes nothing.
SHOWING = ("config", "preflight")
SECTIONS = {name: info.annotation for name, info in Settings.model_fields.items()}
FIELDS = {f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields}


def section_names(tree: ast.AST) -> dict[str, str]:
    """Names in a file that stand for a section: annotated with its class, or assigned from `... .section`."""
    classes = {section.__name__: name for name, section in SECTIONS.items()}
    names = {name: name for name in SECTIONS}
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            target = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            section = classes.get(last_name(node.annotation))
            if section and target:
                names[target] = section
        if isinstance(node, ast.Assign):
            for target, value in assigned(node):
                section = last_name(value)
                if section in SECTIONS and isinstance(value, ast.Attribute) and last_name(target):
                    names[last_name(target)] = section
    return names


def assigned(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def fields_read(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = section_names(tree)
    return {
        f"{names[last_name(node.value)]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and last_name(node.value) in names
    }


def test_every_field_is_read() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in SHOWING]
    ignored = sorted(FIELDS - {field for path in files for field in fields_read(path)})
    assert not ignored, "fields that change nothing; read them or remove them: " + ", ".join(ignored)


def test_every_field_is_described() -> None:
    for name, section in SECTIONS.items():
        for field, info in section.model_fields.items():
            assert info.description and info.description.endswith("."), f"{name}.{field}"
