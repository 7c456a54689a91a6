"""From a YAML file and `section.key=value` overrides to `Settings`, or to an error that a person can act on.

Owns reading, merging and explaining; the fields are declared in the section files and what they demand of each other in
`checks.py`. Every mistake in a configuration is reported at once, each with its place, its field and what to do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.config import yamls
from rlhf.config.algorithm import METHODS, OwnAlgorithm
from rlhf.config.base import Section
from rlhf.config.checks import problems
from rlhf.config.settings import Settings
from rlhf.config.transforms import TRANSFORMS

Tree = TypeVar("Tree", bound=Section)


class UserError(Exception):
    """Something the user can put right. The command line prints the message and exits with 2, without a traceback."""


class ConfigError(UserError):
    """The configuration cannot be used; the message names the file, the field and the remedy."""


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Settings:
    """Read a configuration.

    Args:
        path: a YAML file with the sections as its keys.
        overrides: `section.key=value` (`policy.lora.rank=8` where a section lies in a section), the value in YAML; they win over
            the file, and a later one over an earlier one.

    Raises:
        ConfigError: with all mistakes found, each with its line or override, its field and a remedy.
    """
    return load_as(Settings, problems, path, overrides)


def load_as(
    tree: type[Tree],
    problems: Callable[[Tree], Sequence[str]],
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
) -> Tree:
    """The same for a command with settings of its own.

    Args:
        tree: its sections.
        problems: what its fields demand of each other, as `checks.problems`.
    """
    path = os.fspath(path)
    raw, places = _read(path, tree)
    for override in overrides:
        _apply(override, raw, places, tree)
    try:
        settings = tree.model_validate(raw)
    except ValidationError as error:
        raise _config_error(path, [_explain(details, places, tree) for details in _by_field(error, tree)]) from None
    found = problems(settings)
    if found:
        raise _config_error(path, found)
    return settings


def show(settings: Section) -> str:
    """The resolved settings as YAML, every default written out. `load` of this text gives the same settings."""
    return yamls.dump(settings.model_dump(mode="json"))


def _read(path: str, tree: type[Section]) -> tuple[dict[str, Any], dict[yamls.Path, str]]:
    """The sections in the file, and where each field stands, for messages."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file cannot be read as UTF-8 text: {error}") from None
    try:
        raw, found = yamls.parse(text), yamls.lines(text)
    except yamls.DuplicateKey as error:
        line = error.problem_mark.line + 1
        raise ConfigError(f"{path}, line {line}: a key must not stand twice: {error.problem}. Remove one") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not valid YAML: {error}") from None
    if raw is None:
        raise ConfigError(f"{path}: the file is empty; it needs at least {_required(tree)}")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected sections, such as `policy:` with indented fields under it, but the file holds "
            f"{_describe(raw)}"
        )
    return _filled(raw, (), tree), {field: f"line {line}" for field, line in found.items()}


def _filled(raw: dict[Any, Any], path: yamls.Path, tree: type[Section]) -> dict[str, Any]:
    """The same with {} for a section that is null: its fields are all commented out, which means the defaults."""
    filled: dict[str, Any] = {}
    for name, value in raw.items():
        here = (*path, str(name))
        if _fields(tree, here) is not None or not path:
            value = _filled(value, here, tree) if isinstance(value, dict) else {} if value is None else value
        filled[str(name)] = value
    return filled


def _apply(override: str, raw: dict[str, Any], places: dict[yamls.Path, str], tree: type[Section]) -> None:
    name, equals, text = override.partition("=")
    field = tuple(name.strip().split("."))
    nested = len(field) > 2 and _fields(tree, field[:-1]) is not None
    # Only `policy` and its like are meant: a method has no section inside it.
    if len(field) == 3 and field[0] != "algorithm" and field[1] not in (_fields(tree, field[:1]) or field):
        raise ConfigError(
            f"override `{override}`: there is no section `{'.'.join(field[:2])}`{_suggestion(tree, field[:2], None)}"
        )
    if not equals or not (len(field) == 2 or nested) or not all(field):
        raise ConfigError(f"override `{override}`: write it as section.key=value, for example loop.steps=5")
    try:
        value = yamls.parse(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"override `{override}`: the value is not valid YAML ({problem}); put it in quotes") from None
    section = raw
    for depth, part in enumerate(field[:-1], start=1):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"override `{override}`: the file gives no fields under `{'.'.join(field[:depth])}:`, so there are none to set"
            )
    section[field[-1]] = value
    places[field] = f"override `{override}`"


def _config_error(path: str, messages: Sequence[str]) -> ConfigError:
    if len(messages) == 1:
        return ConfigError(f"{path}: {messages[0]}")
    return ConfigError("\n  - ".join([f"{path}: {len(messages)} problems", *messages]))


def _by_field(error: ValidationError, tree: type[Section]) -> list[list[Any]]:
    """pydantic's findings; those about one value (a field that takes one of several types) together."""
    groups: dict[yamls.Path, list[Any]] = {}
    for detail in error.errors():
        field, _, inside = _place(detail, tree)
        groups.setdefault((*field, *inside), []).append(detail)
    return list(groups.values())


def _place(detail: Any, tree: type[Section]) -> tuple[yamls.Path, str | None, yamls.Path]:
    """The field that a finding is about, the method whose field it is, and the place in the field's list, `[0]` or `[0]`, `.field`, if it
    has one."""
    location, method = tuple(str(part) for part in detail["loc"]), None
    if location[0] == "algorithm" and len(location) > 1:  # the union's tag stands between section and field
        method, location = location[1], (location[0], *location[2:])
    depth = 1
    while depth < len(location) and _fields(tree, location[:depth], method) is not None:
        depth += 1
    return location[:depth], method, tuple(_inside(location[depth:]))


def _inside(location: yamls.Path) -> Iterator[str]:
    """A place in a list, as a person writes it; pydantic also names the transform that an entry is, which is left out."""
    for before, part in zip(("", *location), location, strict=False):
        if part.isdigit():
            yield f"[{part}]"
        elif before.isdigit() and part in TRANSFORMS:
            continue
        elif any(earlier.isdigit() for earlier in location) and part.isidentifier():
            yield f".{part}"


def _explain(details: Sequence[Any], places: dict[yamls.Path, str], tree: type[Section]) -> str:
    """What pydantic found wrong with one value, in words, with its place in front."""
    # Of a field's types, the one that the value comes nearest to.
    deepest = max(len(detail["loc"]) for detail in details)
    details = [detail for detail in details if len(detail["loc"]) == deepest]
    detail = details[0]
    kind, (field, method, inside) = detail["type"], _place(detail, tree)
    outwards = (field[:depth] for depth in range(len(field), 0, -1))
    place = next((places[path] for path in outwards if path in places), None) or _within(field, places)
    if len(inside) > 1 or kind in ("union_tag_invalid", "model_attributes_type") or (inside and "tag" in kind):
        what = _explain_inside(details, f"{'.'.join(field)}{''.join(inside)}")
    elif kind == "missing" and not inside:
        what = _missing(tree, field)
    elif kind == "extra_forbidden":
        owner = f" of `algorithm.name: {method}`" if method in METHODS else ""
        noun = "field" if len(field) > 1 else "section"
        what = f"`{'.'.join(field)}` is not a known {noun}{owner}{_suggestion(tree, field, method)}"
    elif kind == "union_tag_not_found" and isinstance(detail["input"], dict):
        place = places.get(("algorithm", "name"), place)
        what = _unknown_method(detail["input"])
    elif kind == "missing":
        what = f"`{'.'.join(field)}` needs a value at position {int(inside[0][1:-1]) + 1} of its list"
    else:
        expected = " or ".join(_expected(detail) for detail in details)
        what = f"`{'.'.join(field)}{''.join(inside)}` must be {expected}, not {_describe(detail['input'])}"
    return f"{place}: {what}" if place else what


def _explain_inside(details: Sequence[Any], place: str) -> str:
    """The same about a section that stands in a list, or a field of it."""
    detail = details[0]
    kind = detail["type"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"`{place}.name` must be one of {', '.join(TRANSFORMS)}, not {_describe(detail['input'].get('name'))}"
    if kind == "model_attributes_type":
        return f"`{place}` must be a section, such as {{name: clip, high: 1}}, not {_describe(detail['input'])}"
    if kind == "missing":
        return f"`{place}` is missing; it has no default"
    if kind == "extra_forbidden":
        return f"`{place}` is not a known field there"
    if kind == "string_pattern_mismatch":
        return f"`{place}` must be lower-case letters, digits and _, a letter first, not {_describe(detail['input'])}"
    return f"`{place}` must be {' or '.join(_expected(detail) for detail in details)}, not {_describe(detail['input'])}"


def _within(section: yamls.Path, places: dict[yamls.Path, str]) -> str | None:
    """Where a section's first field stands, for a section that only an override names."""
    return next((place for field, place in places.items() if field[: len(section)] == section), None)


def _missing(tree: type[Section], field: yamls.Path) -> str:
    if len(field) == 1:
        needed = [name for name, info in _fields(tree, field).items() if info.is_required()]
        return f"the section `{field[0]}` is missing; it needs at least " + " and ".join(f"`{n}`" for n in needed)
    return f"`{'.'.join(field)}` is missing; it has no default: {_fields(tree, field[:-1])[field[-1]].description}"


def _required(tree: type[Section]) -> str:
    fields = [f"`{'.'.join(field)}`" for field, info in _all_fields(tree) if info.is_required()]
    return ", ".join(fields) + ", and who judges: `reward.path`, `reward.url` or `reward.members`"


def _fields(tree: type[Section], section: yamls.Path, method: str | None = None) -> dict[str, FieldInfo] | None:
    """The fields of the section at this place; of `algorithm`, those of one method (by default the one that is the default). None:
    there is no such section."""
    fields = tree.model_fields
    for name in section:
        kind = METHODS.get(method or "online_dpo", OwnAlgorithm) if name == "algorithm" and name in fields else None
        if name in fields and kind is None:
            kind = fields[name].annotation
        if not isinstance(kind, type) or not issubclass(kind, Section):
            return None
        fields = kind.model_fields
    return fields


def _all_fields(
    tree: type[Section], section: yamls.Path = (), method: str | None = None
) -> Iterator[tuple[yamls.Path, FieldInfo]]:
    """Every field that is no section itself, with its place."""
    for name, info in _fields(tree, section, method).items():
        here = (*section, name)
        if _fields(tree, here, method) is None:
            yield here, info
        else:
            yield from _all_fields(tree, here, method)


def _unknown_method(given: dict[str, Any]) -> str:
    name = given["name"]
    near = difflib.get_close_matches(str(name), list(METHODS), 1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return (
        f"`algorithm.name`: there is no built-in algorithm `{name}`.{hint} Choose one of {', '.join(METHODS)}, or name "
        "your own by its import path, `module:function`"
    )


def _suggestion(tree: type[Section], field: yamls.Path, method: str | None) -> str:
    """`. Did you mean ...?`: the nearest field, in the same section first, else in any; nothing if none is near."""
    siblings = list(_fields(tree, field[:-1], method))
    near = [(*field[:-1], name) for name in difflib.get_close_matches(field[-1], siblings, 1)]
    if not near:
        leaves = {place[-1]: place for place, _ in _all_fields(tree, method=method)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(field[-1], list(leaves), 1)]
    if near:
        return f". Did you mean `{'.'.join(near[0])}`?"
    return f". Known {'fields are' if len(field) > 1 else 'sections are'}: {', '.join(siblings)}"


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text (put a value that looks like a number in quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
    "model_type": "a section: indented `field: value` lines",
    "union_tag_not_found": "a section: indented `field: value` lines",
    "dict_type": "a mapping: indented `name: value` lines, or {name: value}",
    "string_pattern_mismatch": "an import path, `module:name`",
}


def _expected(detail: Any) -> str:
    """What a field wants, in words. The rest of pydantic's messages already read `Input should be ...`."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "literal_error":
        return f"one of {context['expected']}" + _nearest_choice(detail["input"], context["expected"])
    if kind == "too_long":
        return f"a list of {context['max_length']} values"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")


def _nearest_choice(value: Any, expected: str) -> str:
    choices = expected.replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(str(value), choices, 1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"
