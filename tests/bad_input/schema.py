"""Every field of every section, found in the schema, with values that it may not have and some that it may."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf.config import Settings
from rlhf.config.sft import SftSettings
from tests.bad_input.place import RUN, SFT, Place, flow
from tests.bad_input.walk import Case

Schema = Mapping[str, Any]

KINDS: tuple[dict[str, Any], ...] = (
    {"null": None},
    {"empty": "", "blank": "  "},
    {"text": "banana", "number-as-text": "5", "true-as-text": "true"},
    {"true": True},
    {"zero": 0},
    {"negative": -1, "negative-fraction": -0.5},
    {"whole": 3, "fraction": 0.5},
    {"nan": float("nan"), "inf": float("inf"), "negative-inf": float("-inf")},
    {"huge": 10**30, "huge-fraction": 1e308},
    {"list": [], "list-of-one": [1], "nested-list": [[[]]]},
    {"mapping": {}, "unknown-key": {"no_such_key": 1}},
    {"long": "x" * 5000},
    {"nul": "a\0b"},
    {"surrogate": "a\ud800b"},
    {"control": "a\x1b[31mb"},
    {"newline": "a\nb"},
    {"up": "../" * 5 + "x"},
    {"home": "~/x"},
)
"""Values by kind. A field is tried with one of every other kind, the next field with the next; `--every` tries all."""
OF_TEXTS = ("long", "nul", "surrogate", "control", "newline", "up", "home")
"""What is tried with fields that take a text."""
NEVER = ("nul", "surrogate", "nan", "inf", "negative-inf", "huge", "huge-fraction", "control", "blank", "empty")
"""What no field can make sense of."""
TEXTS = {
    "data.system_prompt": "a text for the model, whatever is in it",
    "tracking.project": "a name that only the service checks",
}
"""Fields that hold a text and no name or path."""
SECTIONS = sorted({*Settings.model_fields, *SftSettings.model_fields})
FREE = ("data.template_arguments", "algorithm.options")
"""Mappings of the user's own."""


@dataclass(frozen=True)
class Field:
    """A field or a section.

    Attributes:
        place: `("policy", "lora", "rank")`; the names of its sections and its own.
        schema: of its value.
        around: what the sections beside it must hold for it to count.
    """

    place: tuple[str, ...]
    schema: Schema
    around: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return ".".join(self.place)

    def changes(self, value: Any) -> dict[str, Any]:
        """Sections with this field, and what is around it, set."""
        inner: Any = {**dict(self.around), self.place[-1]: value}
        for part in reversed(self.place[:-1]):
            if part.endswith("[0]"):
                inner = {part[:-3]: [inner]}
            else:
                inner = {part: inner}
        if self.place[1:2] == ("members[0]",):
            inner["reward"] |= {"kind": "several", "path": None}
        return inner


@cache
def fields(tree: type[Settings] | type[SftSettings]) -> tuple[Field, ...]:
    """All fields, once each though several methods share it, and all sections."""
    root = tree.model_json_schema()
    return tuple(_fields(root, root["$defs"], (), (), set()))


def _fields(
    section: Schema, defs: Schema, place: tuple[str, ...], around: tuple[tuple[str, Any], ...], seen: set[tuple]
) -> Iterator[Field]:
    for name, schema in section["properties"].items():
        here, schema = (*place, name), _plain(schema, defs)
        key = (*(("algorithm",) if place[:1] == ("algorithm",) else place), name, _shape(schema))
        if key in seen:
            continue
        seen.add(key)
        yield Field(here, schema, around)
        if name == "name" and around:  # the name that chooses the section
            continue
        for one in _alternatives(schema):
            if "properties" in one:
                yield from _fields(one, defs, here, _named(one, "") if "anyOf" in schema else (), seen)
            for item in _alternatives(_plain(one.get("items", {}), defs)):
                if "properties" in item:
                    yield from _fields(item, defs, (*place, f"{name}[0]"), _named(item, "one"), seen)


def _named(section: Schema, otherwise: str) -> tuple[tuple[str, Any], ...]:
    """What a section among several needs: its name, and values of its other required fields."""
    given: dict[str, Any] = {}
    for name in section.get("required", ()):
        schema = section["properties"][name]
        given[name] = schema.get(
            "const", {"string": otherwise or "own_algorithm:make", "integer": 1}.get(schema["type"], 1.0)
        )
    if "kind" in section["properties"]:  # a member
        given |= {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"}
    if given.get("path") == "one":  # a source
        given["path"] = "prompts.jsonl"
    return tuple(given.items())


def _plain(schema: Schema, defs: Schema) -> Schema:
    """The same without references, and one flat `anyOf` for all alternatives."""
    while "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    several = schema.get("anyOf") or schema.get("oneOf")
    if several is None:
        return schema
    return {"anyOf": [one for part in several for one in _alternatives(_plain(part, defs))]}


def _alternatives(schema: Schema) -> Sequence[Schema]:
    return schema.get("anyOf", [schema])


def _shape(schema: Schema) -> str:
    return repr(
        {key: value for key, value in schema.items() if key not in ("title", "description", "default", "const")}
    )


def fits(value: Any, schema: Schema) -> bool:
    """Whether the schema admits a value: its type, choices and bounds; nothing inside lists and mappings."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "array": list}
    kind = schema.get("type", "object")
    if not isinstance(value, kinds.get(kind, dict)) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) and not value
    if isinstance(value, dict):
        return not schema.get("required") and not (value and "additionalProperties" not in schema)
    if value is None or isinstance(value, bool):
        return True
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", float("-inf"))
        and not value >= schema.get("exclusiveMaximum", float("inf"))
    )


def cases(every: bool = False) -> Iterator[Case]:
    """For `rlhf train` and, where its fields are others, `rlhf sft`.

    Args:
        every: every value with every field.
    """
    common = {(field.name, _shape(field.schema)) for field in fields(Settings)}
    own = [field for field in fields(SftSettings) if (field.name, _shape(field.schema)) not in common]
    walked = [("train", field) for field in fields(Settings)] + [("sft", field) for field in own]
    for number, (command, field) in enumerate(walked):
        for order, kind in enumerate(KINDS):
            names = list(kind)
            share = [names[number % len(names)]] if (order + number) % 2 else []
            for how in names if every else share:
                yield from _case(command, field, how, kind[how])


def _case(command: str, field: Field, how: str, value: Any) -> Iterator[Case]:
    if field.name in FREE and isinstance(value, dict):
        return
    if how in OF_TEXTS and not _takes_text(field.schema):
        return
    method = dict(field.around).get("name", "")
    right = _right(field, how, value)
    about = (field.name, *_inner(field)) if right is None else tuple(f"{section}." for section in SECTIONS)
    if how in ("null", "empty") or field.schema.get("properties"):
        about += (field.place[0],)
    if how in OF_TEXTS:
        about += ("bad.yaml, line",)  # what no text may hold is found by its place
    preparation = _preparation(command, field, value, dry=right is not None)
    yield Case(f"schema/{command}/{field.name}{f'@{method}' if method else ''}/{how}", preparation, about, right)


def _inner(field: Field) -> tuple[str, ...]:
    """Other names by which a message may call it: a section by its first missing field."""
    if field.schema.get("properties"):
        return tuple(f"{field.name}.{name}" for name in field.schema["properties"])
    return tuple(field.name.split("[")[0] for _ in field.around)


def _takes_text(schema: Schema) -> bool:
    return any(one.get("type") == "string" and not one.get("enum") for one in _alternatives(schema))


def _right(field: Field, how: str, value: Any) -> str | None:
    if how in ("mapping", "null") and any("properties" in one for one in _alternatives(field.schema)):
        return "a section of defaults"
    if not fits(value, field.schema):
        return None
    if field.name in TEXTS and how != "surrogate":
        return TEXTS[field.name]
    if how in NEVER:
        return None
    return "the schema admits it, and the dry run has looked at it"


def _preparation(command: str, field: Field, value: Any, dry: bool) -> Callable[[Place], Sequence[str]]:
    """A configuration with the value. Where it may be accepted it is an override of a good file and the dry run looks at it."""
    base, file = (RUN, "run.yaml") if command == "train" else (SFT, "sft.yaml")

    def prepare(place: Place) -> Sequence[str]:
        if dry and len(field.place) == 2 and not field.around:
            arguments = [file, f"{field.name}={flow(value)}"]
        else:
            arguments = [place.configuration(field.changes(value), base)]
        if field.place[0] == "algorithm":
            return ["config", "show", *arguments]
        return [command, *arguments, "--dry-run"]

    return prepare
