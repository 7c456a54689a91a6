"""From a YAML file and `section.key=value` overrides to `Settings`, or to an error that a person can act on.

Owns reading, merging and explaining; the fields are declared in the section files and what they demand of each other in
`checks.py`. Every mistake in a configuration is reported at once, each with its place, its field and what to do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.config import yamls
from rlhf.config.algorithm import METHODS, OwnAlgorithm
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
        overrides: `section.key=value`, the value in YAML; they win over the file, and a later one over an earlier one.

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
        raise _config_error(path, [_explain(detail, places) for detail in error.errors()]) from None
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
    # A section whose fields are all commented out reads as null; it means the defaults.
    sections = {str(name): {} if section is None else section for name, section in raw.items()}
    return sections, {field: f"line {line}" for field, line in found.items()}


def _apply(override: str, raw: dict[str, Any], places: dict[yamls.Path, str]) -> None:
    name, equals, text = override.partition("=")
    field = tuple(name.strip().split("."))
    if not equals or len(field) != 2 or not all(field):
        raise ConfigError(f"override `{override}`: write it as section.key=value, for example loop.steps=5")
    try:
        value = yamls.parse(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"override `{override}`: the value is not valid YAML ({problem}); put it in quotes") from None
    section = raw.setdefault(field[0], {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"override `{override}`: the file gives no fields under `{field[0]}:`, so there are none to set"
        )
    section[field[1]] = value
    places[field] = f"override `{override}`"


def _config_error(path: str, messages: Sequence[str]) -> ConfigError:
    if len(messages) == 1:
        return ConfigError(f"{path}: {messages[0]}")
    return ConfigError("\n  - ".join([f"{path}: {len(messages)} problems", *messages]))


def _explain(detail: Any, places: dict[yamls.Path, str]) -> str:
    """One of pydantic's findings, in words, with its place in front."""
    location, kind = tuple(str(part) for part in detail["loc"]), detail["type"]
    method = None
    if location[0] == "algorithm" and len(location) > 1:  # the union's tag stands between section and field
        method, location = location[1], (location[0], *location[2:])
    field = location[:2]
    place = places.get(field) or places.get(field[:1]) or _within(field, places)
    if kind == "missing" and len(location) <= 2:
        what = _missing(field)
    elif kind == "extra_forbidden":
        owner = f" of `algorithm.name: {method}`" if method in METHODS else ""
        noun = "field" if len(field) == 2 else "section"
        what = f"`{'.'.join(field)}` is not a known {noun}{owner}{_suggestion(field, method)}"
    elif kind == "union_tag_not_found" and isinstance(detail["input"], dict):
        place = places.get(("algorithm", "name"), place)
        what = _unknown_method(detail["input"])
    elif kind == "missing":
        what = f"`{'.'.join(field)}` needs a value at position {int(location[2]) + 1} of its list"
    else:
        inner = f"[{location[2]}]" if len(location) > 2 else ""
        what = f"`{'.'.join(field)}{inner}` must be {_expected(detail)}, not {_describe(detail['input'])}"
    return f"{place}: {what}" if place else what


def _within(section: yamls.Path, places: dict[yamls.Path, str]) -> str | None:
    """Where a section's first field stands, for a section that only an override names."""
    return next((place for field, place in places.items() if field[: len(section)] == section), None)


def _missing(field: yamls.Path) -> str:
    if len(field) == 1:
        needed = [name for name, info in _section_fields(field[0]).items() if info.is_required()]
        return f"the section `{field[0]}` is missing; it needs at least " + " and ".join(f"`{n}`" for n in needed)
    return f"`{'.'.join(field)}` is missing; it has no default: {_section_fields(field[0])[field[1]].description}"


def _required() -> str:
    return ", ".join(
        f"`{section}.{name}`"
        for section in Settings.model_fields
        for name, info in _section_fields(section).items()
        if info.is_required()
    )


def _section_fields(name: str, method: str | None = None) -> dict[str, FieldInfo]:
    """A section's fields; of `algorithm`, those of one method (by default the one that is the default)."""
    if name == "algorithm":
        return METHODS.get(method or "online_dpo", OwnAlgorithm).model_fields
    return Settings.model_fields[name].annotation.model_fields


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
    known = [f"{section}.{name}" for section in Settings.model_fields for name in _section_fields(section, method)]
    if len(field) == 1:
        near = difflib.get_close_matches(field[0], list(Settings.model_fields), 1)
    else:
        siblings = [name.partition(".")[2] for name in known if name.startswith(f"{field[0]}.")]
        near = [f"{field[0]}.{name}" for name in difflib.get_close_matches(field[1], siblings, 1)]
    if not near:
        leaves = {name.partition(".")[2]: name for name in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(field[-1], list(leaves), 1)]
    if near:
        return f". Did you mean `{near[0]}`?"
    return f". Known {'fields are' if len(field) == 2 else 'sections are'}: {', '.join(_names(field, method))}"


def _names(field: yamls.Path, method: str | None) -> list[str]:
    """What could have stood in the place of this unknown key."""
    if len(field) == 2 and field[0] in Settings.model_fields:
        return list(_section_fields(field[0], method))
    return list(Settings.model_fields)


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text (put a value that looks like a number in quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
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
