"""From a YAML file and `section.key=value` overrides to `Settings`, or to an error that a person can act on.

Owns reading and merging; the fields are declared in the section files, the rules between them in `checks.py`, and the words are
made in `explain.py`. Every mistake in a configuration is reported at once, each with its place, its field and what to do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from rlhf.config import yamls
from rlhf.config.base import Section
from rlhf.config.checks import problems
from rlhf.config.explain import LONGEST_SHOWN, by_field, describe, explain, fields_of, required, shortened, suggestion
from rlhf.config.settings import Settings

Tree = TypeVar("Tree", bound=Section)
MOST_SHOWN = 20
"""Problems that one message holds."""


class UserError(Exception):
    """Something the user can put right. The command line prints the message and exits with 2, without a traceback."""


class ConfigError(UserError):
    """The configuration cannot be used; the message names the file, the field and the remedy."""


@dataclass(frozen=True)
class Given:
    """An option of the command line that sets a field.

    Attributes:
        option: as it is written, such as `--margin`.
    """

    option: str
    field: yamls.Path
    value: Any


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Settings:
    """Read a configuration.

    Args:
        path: a YAML file with the sections as its keys.
        overrides: `section.key=value` (`policy.lora.rank=8` where a section lies in a section), the value in YAML; they win over
            the file, and a later one over an earlier one.

    Raises:
        ConfigError: with all mistakes found, each with its line or override, its field and a remedy.
    """
    return load_as(Settings, problems, path, overrides, "train")


def load_as(
    tree: type[Tree],
    problems: Callable[[Tree], Sequence[str]],
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    command: str,
    given: Sequence[Given] = (),
) -> Tree:
    """The same for a command with settings of its own.

    Args:
        tree: its sections.
        problems: the rules between its fields, as `checks.problems`.
        path: None: the overrides and options say everything.
        command: its name.
        given: options that win over file and overrides.
    """
    raw: dict[str, Any] = {}
    places: dict[yamls.Path, str] = {}
    if path is None:
        path = f"`rlhf {command}`"
    else:
        path = os.fspath(path)
        raw, places = _read(path, tree)
    meant = command_of(raw)
    if meant not in (None, command):
        raise ConfigError(
            f"{path}: this is a configuration of `rlhf {meant}`, not of `rlhf {command}`. Give it to `rlhf {meant}`, or name another file"
        )
    for override in overrides:
        _apply(override, raw, places, tree)
    for one in given:
        _put(one.field, one.value, one.option, raw, places)
    try:
        settings = tree.model_validate(raw)
    except ValidationError as error:
        raise _config_error(path, [explain(details, places, tree) for details in by_field(error, tree)]) from None
    found = problems(settings)
    if found:
        raise _config_error(path, found)
    return settings


def show(settings: Section) -> str:
    """The resolved settings as YAML, every default written out. `load` of this text gives the same settings."""
    return yamls.dump(settings.model_dump(mode="json"))


OF_A_COMMAND: Mapping[str, set[yamls.Path]] = {
    "train": {("rollout",), ("reward",), ("algorithm",), ("loop",), ("data", "prompts"), ("data", "eval_prompts")},
    "sft": {("data", "examples"), ("data", "eval_examples")},
    "reward train": {("model",), ("objective",), ("data", "train"), ("data", "test")},
}
"""Command -> sections and fields that no other has."""


def command_of(raw: dict[str, Any]) -> str | None:
    """Whose configuration a file is, by the fields that only one command has; None if it has of none or of several."""
    data = raw.get("data")
    given = {(name,) for name in raw} | {("data", name) for name in (data if isinstance(data, dict) else ())}
    meant = [command for command, own in OF_A_COMMAND.items() if own & given]
    return meant[0] if len(meant) == 1 else None


def read_raw(path: str) -> tuple[Any, dict[yamls.Path, int]]:
    """What a YAML file holds, and the line of each key.

    Raises:
        ConfigError: it cannot be read, or is no YAML.
    """
    try:
        return yamls.read(_text(path))
    except yamls.Mistake as error:
        raise ConfigError(f"{path}, line {error.line}: {error.problem}. {error.remedy}") from None


def _text(path: str) -> str:
    """Of a file as people have: a pipe or a device could be endless, or never answer."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "a folder" if os.path.isdir(path) else "no ordinary file (a device, a pipe or a socket)"
            raise ConfigError(f"{path}: this is {what}; give the path of a YAML file")
        with open(path, "rb") as file:
            return file.read(4 * yamls.LONGEST).decode().removeprefix("\ufeff")
    except FileNotFoundError:
        raise ConfigError(
            f"{path or '(no name)'}: there is no such file; give the path of a YAML configuration"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: this is not UTF-8 text (byte {error.object[error.start]:#04x}). Save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in its name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path!r}: the file cannot be read ({why}); give the path of a YAML file that you may read"
        ) from None


def _read(path: str, tree: type[Section]) -> tuple[dict[str, Any], dict[yamls.Path, str]]:
    """The sections in the file, and where each field stands, for messages."""
    raw, lines = read_raw(path)
    if raw is None:
        raise ConfigError(f"{path}: the file is empty; it needs at least {required(tree)}")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected sections, such as `policy:` with indented fields under it, but the file holds "
            f"{describe(raw)}"
        )
    return _filled(raw, (), tree), {field: f"line {line}" for field, line in lines.items()}


def _filled(raw: dict[str, Any], path: yamls.Path, tree: type[Section]) -> dict[str, Any]:
    """The same with {} for a section that is null: its fields are all commented out, which means the defaults."""
    filled: dict[str, Any] = {}
    for name, value in raw.items():
        here = (*path, name)
        if fields_of(tree, here) is not None or not path:
            value = _filled(value, here, tree) if isinstance(value, dict) else {} if value is None else value
        filled[name] = value
    return filled


def _apply(override: str, raw: dict[str, Any], places: dict[yamls.Path, str], tree: type[Section]) -> None:
    name, equals, text = override.partition("=")
    shown = f"override `{shortened(override, LONGEST_SHOWN)}`"
    field = tuple(name.strip().split("."))
    nested = len(field) > 2 and fields_of(tree, field[:-1]) is not None
    # Only `policy` and its like are meant: a method has no section inside it.
    if len(field) == 3 and field[0] != "algorithm" and field[1] not in (fields_of(tree, field[:1]) or field):
        raise ConfigError(
            f"{shown}: there is no section `{shortened('.'.join(field[:2]))}`{suggestion(tree, field[:2], None)}"
        )
    if not equals or not (len(field) == 2 or nested) or not all(part.isidentifier() for part in field):
        raise ConfigError(f"{shown}: write it as section.key=value, for example loop.steps=5")
    try:
        value = yamls.parse(text)
    except yamls.Mistake as error:
        raise ConfigError(f"{shown}: the value cannot be read: {error.problem}. {error.remedy}") from None
    _put(field, value, shown, raw, places)


def _put(field: yamls.Path, value: Any, shown: str, raw: dict[str, Any], places: dict[yamls.Path, str]) -> None:
    """Set a field.

    Args:
        shown: what sets it, as messages name it.
    """
    section = raw
    for depth, part in enumerate(field[:-1], start=1):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"{shown}: the file gives no fields under `{'.'.join(field[:depth])}:`, so there are none to set. Write the section as "
                "indented `field: value` lines"
            )
    section[field[-1]] = value
    for inner in [place for place in places if place[: len(field)] == field]:
        del places[inner]  # of what the override replaces
    places[field] = shown


def _config_error(path: str, messages: Sequence[str]) -> ConfigError:
    if len(messages) == 1:
        return ConfigError(f"{path}: {messages[0]}")
    shown = [*messages[:MOST_SHOWN], *(["and more; correct these first"] if len(messages) > MOST_SHOWN else [])]
    return ConfigError("\n  - ".join([f"{path}: {len(messages)} problems", *shown]))
