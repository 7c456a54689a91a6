"""What pydantic found wrong with a configuration, in words: the place, the field, what is wrong with the value, and the remedy.

Owns the words; reads no files. `loader` hands it the findings and where each field stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.config import yamls
from rlhf.config.algorithm import METHODS, OWN, OwnAlgorithm
from rlhf.config.base import Section
from rlhf.config.transforms import TRANSFORMS

LONGEST_SHOWN = 200
"""Characters of a value."""


def by_field(error: ValidationError, tree: type[Section]) -> list[list[Any]]:
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
    while depth < len(location) and fields_of(tree, location[:depth], method) is not None:
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


def explain(details: Sequence[Any], places: dict[yamls.Path, str], tree: type[Section]) -> str:
    """What pydantic found wrong with one value, in words, with its place in front."""
    # Of a field's types, the one that the value comes nearest to.
    deepest = max(len(detail["loc"]) for detail in details)
    details = [detail for detail in details if len(detail["loc"]) == deepest]
    detail = details[0]
    kind, (field, method, inside) = detail["type"], _place(detail, tree)
    outwards = (field[:depth] for depth in range(len(field), 0, -1))
    place = next((places[path] for path in outwards if path in places), None) or _within(field, places)
    if kind == "value_error":  # a validator of ours says what is wrong
        what = f"`{'.'.join(field)}{''.join(inside)}` {detail['ctx']['error']}"
    elif len(inside) > 1 or kind in ("union_tag_invalid", "model_attributes_type") or (inside and "tag" in kind):
        what = _explain_inside(details, f"{'.'.join(field)}{''.join(inside)}")
    elif kind == "missing" and not inside:
        what = _missing(tree, field)
    elif kind == "extra_forbidden":
        owner = f" of `algorithm.name: {method}`" if method in METHODS else ""
        noun = "field" if len(field) > 1 else "section"
        what = f"`{'.'.join(field)}` is not a known {noun}{owner}{suggestion(tree, field, method)}"
    elif kind == "union_tag_not_found" and isinstance(detail["input"], dict):
        place = places.get(("algorithm", "name"), place)
        what = _unknown_method(detail["input"])
    elif kind == "missing":
        what = f"`{'.'.join(field)}` needs a value at position {int(inside[0][1:-1]) + 1} of its list"
    else:
        expected = " or ".join(_expected(detail) for detail in details)
        what = f"`{'.'.join(field)}{''.join(inside)}` must be {expected}, not {describe(detail['input'])}"
    return f"{place}: {what}" if place else what


def _explain_inside(details: Sequence[Any], place: str) -> str:
    """The same about a section that stands in a list, or a field of it."""
    detail = details[0]
    kind = detail["type"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"`{place}.name` must be one of {', '.join(TRANSFORMS)}, not {describe(detail['input'].get('name'))}"
    if kind == "model_attributes_type":
        return f"`{place}` must be a section, such as {{name: clip, high: 1}}, not {describe(detail['input'])}"
    if kind == "missing":
        return f"`{place}` is missing; it has no default"
    if kind == "extra_forbidden":
        return f"`{place}` is not a known field there"
    if kind == "string_pattern_mismatch":
        return f"`{place}` must be lower-case letters, digits and _, a letter first, not {describe(detail['input'])}"
    return f"`{place}` must be {' or '.join(_expected(detail) for detail in details)}, not {describe(detail['input'])}"


def _within(section: yamls.Path, places: dict[yamls.Path, str]) -> str | None:
    """Where a section's first field stands, for a section that only an override names."""
    return next((place for field, place in places.items() if field[: len(section)] == section), None)


def _missing(tree: type[Section], field: yamls.Path) -> str:
    if len(field) == 1:
        needed = [name for name, info in (fields_of(tree, field) or {}).items() if info.is_required()]
        return f"the section `{field[0]}` is missing; it needs at least " + " and ".join(f"`{n}`" for n in needed)
    fields = fields_of(tree, field[:-1]) or {}
    return f"`{'.'.join(field)}` is missing; it has no default: {fields[field[-1]].description}"


def required(tree: type[Section]) -> str:
    fields = [f"`{'.'.join(field)}`" for field, info in _all_fields(tree) if info.is_required()]
    judge = ", and who judges: `reward.path`, `reward.url` or `reward.members`" if "reward" in tree.model_fields else ""
    return ", ".join(fields) + judge


def fields_of(tree: type[Section], section: yamls.Path, method: str | None = None) -> dict[str, FieldInfo] | None:
    """The fields of the section at this place; of `algorithm`, those of one method (by default the one that is the default). None:
    there is no such section."""
    fields = tree.model_fields
    for name in section:
        kind: Any = None
        if name in fields:
            kind = METHODS.get(method or "online_dpo", OwnAlgorithm) if name == "algorithm" else fields[name].annotation
        if not isinstance(kind, type) or not issubclass(kind, Section):
            return None
        fields = kind.model_fields
    return fields


def _all_fields(
    tree: type[Section], section: yamls.Path = (), method: str | None = None
) -> Iterator[tuple[yamls.Path, FieldInfo]]:
    """Every field that is no section itself, with its place."""
    for name, info in (fields_of(tree, section, method) or {}).items():
        here = (*section, name)
        if fields_of(tree, here, method) is None:
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


def suggestion(tree: type[Section], field: yamls.Path, method: str | None) -> str:
    """`. Did you mean ...?`: the nearest field, in the same section first, else in any; nothing if none is near."""
    owners = [name for name, kind in METHODS.items() if field[-1] in kind.model_fields]
    if field[0] == "algorithm" and method in METHODS and owners:  # left over from another method
        most = f"{', '.join(owners[:5])} and {len(owners) - 5} more" if len(owners) > 6 else ", ".join(owners)
        return f", but of {most}. Remove it, or choose another `algorithm.name`"
    if field[0] == "algorithm" and method == OWN and len(field) == 2:
        return (
            ". Known fields are: name, options. What your own algorithm wants to know stands under `algorithm.options`"
        )
    siblings = list(fields_of(tree, field[:-1], method) or ())
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
    "too_short": "a list that is not empty",
    "finite_number": "a finite number",
    "model_type": "a section: indented `field: value` lines",
    "union_tag_not_found": "a section: indented `field: value` lines",
    "dict_type": "a mapping: indented `name: value` lines, or {name: value}",
}


def _expected(detail: Any) -> str:
    """What a field wants, in words. The rest of pydantic's messages already read `Input should be ...`."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "string_pattern_mismatch":
        address = detail["loc"][-1] == "address"
        return "`auto`, HOST:PORT or ray://HOST:PORT" if address else "an import path, `module:name`"
    if kind == "literal_error":
        return f"one of {context['expected']}" + _nearest_choice(detail["input"], context["expected"])
    if kind == "too_long":
        return f"a list of {context['max_length']} values"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")


def _nearest_choice(value: Any, expected: str) -> str:
    choices = expected.replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(str(value), choices, 1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        more = f" of {len(value):,} characters" if len(value) > LONGEST_SHOWN else ""
        return f"the text '{shortened(value, LONGEST_SHOWN)}'{more}"
    if isinstance(value, (int, float)):
        digits = f"{value}"
        return f"the number {digits}" if len(digits) <= 40 else f"a number of {len(digits)} digits"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def shortened(text: str, most: int = 100) -> str:
    """For a message: on one line, and not all of a long one."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]} ..."
