"""From a YAML file and `section.key=value` overrides to `Settings`, or to an error that a person can act on.

Owns reading, merging and explaining; the fields are declared in the section files and what they demand of each other in
`checks.py`. Every mistake in a configuration is reported at once, each with its place, its field and what to do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.config import yamls
from rlhf.config.algorithm import METHODS, OwnAlgorithm
from rlhf.config.base import Section
from rlhf.config.checks import problems
from rlhf.config.settings import Settings


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
    path = os.fspath(path)
    raw, places = _read(path)
    for override in overrides:
        _apply(override, raw, places)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise _config_error(path, [_explain(details, places) for details in _by_field(error)]) from None
    found = problems(settings)
    if found:
        raise _config_error(path, found)
    return settings


def show(settings: Settings) -> str:
    """The resolved settings as YAML, every default written out. `load` of this text gives the same settings."""
    return yamls.dump(settings.model_dump(mode="json"))


def _read(path: str) -> tuple[dict[str, Any], dict[yamls.Path, str]]:
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
        raise ConfigError(f"{path}: the file is empty; it needs at least {_required()}")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected sections, such as `policy:` with indented fields under it, but the file holds "
            f"{_describe(raw)}"
        )
    return _filled(raw, ()), {field: f"line {line}" for field, line in found.items()}


def _filled(raw: dict[Any, Any], path: yamls.Path) -> dict[str, Any]:
    """The same with {} for a section that is null: its fields are all commented out, which means the defaults."""
    filled: dict[str, Any] = {}
    for name, value in raw.items():
        here = (*path, str(name))
        if _fields(here) is not None or not path:
            value = _filled(value, here) if isinstance(value, dict) else {} if value is None else value
        filled[str(name)] = value
    return filled


def _apply(override: str, raw: dict[str, Any], places: dict[yamls.Path, str]) -> None:
    name, equals, text = override.partition("=")
    field = tuple(name.strip().split("."))
    nested = len(field) > 2 and _fields(field[:-1]) is not None
    # Only `policy` and its like are meant: a method has no section inside it.
    if len(field) == 3 and field[0] != "algorithm" and field[1] not in (_fields(field[:1]) or field):
        raise ConfigError(
            f"override `{override}`: there is no section `{'.'.join(field[:2])}`{_suggestion(field[:2], None)}"
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


def _by_field(error: ValidationError) -> list[list[Any]]:
    """pydantic's findings; those about one value (a field that takes one of several types) together."""
    groups: dict[yamls.Path, list[Any]] = {}
    for detail in error.errors():
        field, _, inside = _place(detail)
        groups.setdefault((*field, *inside), []).append(detail)
    return list(groups.values())


def _place(detail: Any) -> tuple[yamls.Path, str | None, yamls.Path]:
    """The field that a finding is about, the method whose field it is, and the position in the field's list if it has one."""
    location, method = tuple(str(part) for part in detail["loc"]), None
    if location[0] == "algorithm" and len(location) > 1:  # the union's tag stands between section and field
        method, location = location[1], (location[0], *location[2:])
    depth = 1
    while depth < len(location) and _fields(location[:depth], method) is not None:
        depth += 1
    return location[:depth], method, tuple(part for part in location[depth:] if part.isdigit())


def _explain(details: Sequence[Any], places: dict[yamls.Path, str]) -> str:
    """What pydantic found wrong with one value, in words, with its place in front."""
    detail = details[0]
    kind, (field, method, inside) = detail["type"], _place(detail)
    outwards = (field[:depth] for depth in range(len(field), 0, -1))
    place = next((places[path] for path in outwards if path in places), None) or _within(field, places)
    if kind == "missing" and not inside:
        what = _missing(field)
    elif kind == "extra_forbidden":
        owner = f" of `algorithm.name: {method}`" if method in METHODS else ""
        noun = "field" if len(field) > 1 else "section"
        what = f"`{'.'.join(field)}` is not a known {noun}{owner}{_suggestion(field, method)}"
    elif kind == "union_tag_not_found" and isinstance(detail["input"], dict):
        place = places.get(("algorithm", "name"), place)
        what = _unknown_method(detail["input"])
    elif kind == "missing":
        what = f"`{'.'.join(field)}` needs a value at position {int(inside[0]) + 1} of its list"
    else:
        expected = " or ".join(_expected(detail) for detail in details)
        position = f"[{inside[0]}]" if inside else ""
        what = f"`{'.'.join(field)}{position}` must be {expected}, not {_describe(detail['input'])}"
    return f"{place}: {what}" if place else what


def _within(section: yamls.Path, places: dict[yamls.Path, str]) -> str | None:
    """Where a section's first field stands, for a section that only an override names."""
    return next((place for field, place in places.items() if field[: len(section)] == section), None)


def _missing(field: yamls.Path) -> str:
    if len(field) == 1:
        needed = [name for name, info in _fields(field).items() if info.is_required()]
        return f"the section `{field[0]}` is missing; it needs at least " + " and ".join(f"`{n}`" for n in needed)
    return f"`{'.'.join(field)}` is missing; it has no default: {_fields(field[:-1])[field[-1]].description}"


def _required() -> str:
    return ", ".join(f"`{'.'.join(field)}`" for field, info in _all_fields() if info.is_required())


def _fields(section: yamls.Path, method: str | None = None) -> dict[str, FieldInfo] | None:
    """The fields of the section at this place; of `algorithm`, those of one method (by default the one that is the default). None:
    there is no such section."""
    fields = Settings.model_fields
    for name in section:
        kind = METHODS.get(method or "online_dpo", OwnAlgorithm) if name == "algorithm" else None
        if name in fields and kind is None:
            kind = fields[name].annotation
        if not isinstance(kind, type) or not issubclass(kind, Section):
            return None
        fields = kind.model_fields
    return fields


def _all_fields(section: yamls.Path = (), method: str | None = None) -> Iterator[tuple[yamls.Path, FieldInfo]]:
    """Every field that is no section itself, with its place."""
    for name, info in _fields(section, method).items():
        here = (*section, name)
        if _fields(here, method) is None:
            yield here, info
        else:
            yield from _all_fields(here, method)


def _unknown_method(given: dict[str, Any]) -> str:
    name = given["name"]
    near = difflib.get_close_matches(str(name), list(METHODS), 1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return (
        f"`algorithm.name`: there is no built-in algorithm `{name}`.{hint} Choose one of {', '.join(METHODS)}, or name "
        "your own by its import path, `module:function`"
    )


def _suggestion(field: yamls.Path, method: str | None) -> str:
    """`. Did you mean ...?`: the nearest field, in the same section first, else in any; nothing if none is near."""
    siblings = list(_fields(field[:-1], method))
    near = [(*field[:-1], name) for name in difflib.get_close_matches(field[-1], siblings, 1)]
    if not near:
        leaves = {place[-1]: place for place, _ in _all_fields(method=method)}
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
