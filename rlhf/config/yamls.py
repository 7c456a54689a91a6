"""YAML as the configuration reads and writes it: the plain scalars of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, where `off` is false, `1e-6` is text, `1:30` is a number and a repeated key wins silently. Here
only `true` and `false` are booleans, `1e-6` is a number, and a repeated key is an error. Owns the dialect; knows
nothing of settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

Path = tuple[str, ...]

_SCALARS = {
    "tag:yaml.org,2002:bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "tag:yaml.org,2002:null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "tag:yaml.org,2002:int": (re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    "tag:yaml.org,2002:float": (
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
}


class DuplicateKey(yaml.MarkedYAMLError):
    """A mapping holds the same key twice."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                raise DuplicateKey(
                    None, None, f"`{key.value}` stands here and on line {first[key.value]}", key.start_mark
                )
            first[key.value if isinstance(key, yaml.ScalarNode) else f"?{line}"] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _dialect in (_Loader, _Dumper):
    for _tag, (_pattern, _first) in _SCALARS.items():
        _dialect.add_implicit_resolver(_tag, _pattern, list(_first))


def parse(text: str) -> Any:
    """The value of one YAML document; None for an empty one. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def lines(text: str) -> dict[Path, int]:
    """Line (from 1) of each key of the outermost mapping, `(key,)`, and of the mappings inside it, `(key, inner, ...)`."""
    found: dict[Path, int] = {}

    def walk(node: yaml.Node | None, path: Path) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                found[here] = key.start_mark.line + 1
                walk(value, here)

    walk(yaml.compose(text, _Loader), ())
    return found


def dump(value: Mapping[str, Any]) -> str:
    """YAML of nested mappings and lists, keys in their order; `parse` gives the value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
