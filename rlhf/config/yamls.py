"""YAML as the configuration reads and writes it: the plain scalars of YAML 1.2, no key twice, no tags, and bounds on everything.

PyYAML follows YAML 1.1, where `off` is false, `1e-6` is text, `1:30` is a number and a repeated key wins silently. Here
only `true` and `false` are booleans, `1e-6` is a number, and a repeated key is an error. PyYAML scans and composes; the values are
made here, so that no text of any size or shape takes long or ends in another error than `Mistake`. Owns the dialect; knows nothing of
settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

Path = tuple[str, ...]

LONGEST = 2**20
"""Characters of a document."""
DEEPEST = 50
"""Mappings and lists inside each other."""
MOST = 20_000
"""Values, where one that aliases repeat counts each time."""
MOST_DIGITS = 1_000

_DIGITS = "[0-9](?:_?[0-9])*"
_SCALARS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "int": (re.compile(r"^[-+]?(?:0|[1-9](?:_?[0-9])*)$"), "-+0123456789"),
    "float": (
        re.compile(
            rf"^(?:[-+]?(?:{_DIGITS})?\.{_DIGITS}(?:[eE][-+]?[0-9]+)?|[-+]?{_DIGITS}\.(?:[eE][-+]?[0-9]+)?"
            rf"|[-+]?{_DIGITS}[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
}
_TAG = "tag:yaml.org,2002:"
_UNREADABLE = re.compile("[\x00\ud800-\udfff]")


class Mistake(yaml.YAMLError):
    """The text is no YAML that is read here.

    Attributes:
        line: from 1.
        problem: what is wrong there.
        remedy: what to do.
    """

    def __init__(self, line: int, problem: str, remedy: str):
        super().__init__(f"line {line}: {problem}. {remedy}")
        self.line, self.problem, self.remedy = line, problem, remedy


class _Loader(yaml.SafeLoader):
    """Composes nodes, within the bounds."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.composed = 0
        self.sizes: dict[int, int] = {}  # of a whole node, by its id; what is still being composed has none

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        self._check_event(event)
        self.composed += 1
        self.depth += 1
        if self.depth > DEEPEST:
            raise _mistake(event, f"more than {DEEPEST} mappings and lists are nested", "Write it flatter")
        node = super().compose_node(parent, index)
        assert node is not None
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self.sizes:
            raise _mistake(event, f"the alias `*{event.anchor}` stands inside what it names", "Write the value out")
        if not isinstance(event, yaml.AliasEvent):
            self.sizes[id(node)] = 1 + sum([self.sizes[id(part)] for part in _parts(node)])
        if max(self.composed, self.sizes[id(node)]) > MOST:
            raise _mistake(
                event, f"there are more than {MOST:,} values, each as often as aliases repeat it", "Write fewer"
            )
        return node

    def _check_event(self, event: Any) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace(_TAG, "!!")
            raise _mistake(
                event,
                f"the tag `{shown}` is not read here",
                "Write the plain value, a text that looks like a number in quotes",
            )


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _dialect in (_Loader, _Dumper):
    for _name, (_pattern, _first) in _SCALARS.items():
        _dialect.add_implicit_resolver(_TAG + _name, _pattern, list(_first))


def read(text: str) -> tuple[Any, dict[Path, int]]:
    """The value of one YAML document, None for an empty one; and the line (from 1) of each key of the outermost mapping, `(key,)`, and of
    the mappings inside it, `(key, inner, ...)`. All keys are text.

    Raises:
        Mistake: it is none, or passes a bound.
    """
    if len(text) > LONGEST:
        raise Mistake(1, f"there are {len(text):,} characters, and at most {LONGEST:,} are read", "Write less")
    try:
        node = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Mistake(line, f"the character U+{error.character:04X} is not allowed in YAML", "Remove it") from None
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error) from None
    except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF"
        raise Mistake(1, "a `\\U` in double quotes names no character", "Correct it, or use single quotes") from None
    lines: dict[Path, int] = {}
    return None if node is None else _value(node, (), lines), lines


def parse(text: str) -> Any:
    """The value alone."""
    return read(text)[0]


def dump(value: Mapping[str, Any]) -> str:
    """YAML of nested mappings and lists, keys in their order; `parse` gives the value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _value(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, "[]"), {}) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node)


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _mistake(key, "a key must be a name, not a list or a mapping", "Write `name: value`")
        name, line = key.value, key.start_mark.line + 1
        if name == "<<":
            raise _mistake(key, "`<<` merges nothing here", "Write the fields out")
        if name in value:
            raise _mistake(
                key, f"a key must not stand twice: `{name}` stands here and on line {first[name]}", "Remove one"
            )
        first[name] = lines[(*path, name)] = line
        _check_text(key)
        value[name] = _value(item, (*path, name), lines)
    return value


def _scalar(node: yaml.ScalarNode) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "bool":
        return text[0] in "tT"
    if kind == "null":
        return None
    if kind in ("int", "float") and len(text) > MOST_DIGITS:
        raise _mistake(node, f"a number of {len(text):,} characters", "Write one of a few digits, or a text in quotes")
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan")) + 0.0  # no -0.0
    _check_text(node)
    return text


def _check_text(node: yaml.ScalarNode) -> None:
    if found := _UNREADABLE.search(node.value):
        raise _mistake(node, f"the text holds U+{ord(found[0]):04X}, which no file or name can hold", "Remove it")


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _mistake(place: Any, problem: str, remedy: str) -> Mistake:
    """About an event or a node."""
    return Mistake(place.start_mark.line + 1, problem, remedy)


def _not_yaml(error: yaml.MarkedYAMLError) -> Mistake:
    mark = error.problem_mark or error.context_mark
    line = 1 if mark is None else mark.line + 1
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in problem:
        return Mistake(line, "a tab stands where YAML wants spaces", "Indent with spaces")
    if isinstance(error, yaml.composer.ComposerError) and "single document" in problem:
        return Mistake(
            line, "a second document begins (`---`), and a configuration is one", "Write it into a file of its own"
        )
    where = "" if mark is None else f" (column {mark.column + 1})"
    remedy = "Put a text with special characters such as `: ` or `#` in quotes, and close every quote and bracket"
    return Mistake(line, f"this is not valid YAML: {problem}{where}", remedy)
