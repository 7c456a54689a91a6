"""What all sections share: unknown keys are errors, no value is converted in silence, each field is documented."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

MAX_TOKENS = 2**24
"""Most tokens of one text: longer than any model's context."""
MIN_S, MAX_S = 0.1, 1e7
"""Shortest and longest deadline, in seconds. Nothing between two processes is sure within less; 1e7 is four months."""
LONGEST_PATH = 4096
"""Characters, as on Linux."""


def path_text(path: str) -> str:
    """What names a file or a folder, with a leading `~` made the home folder, as a shell does."""
    if not path.strip():
        raise ValueError("is empty text. Name a file or folder, or leave the field out")
    if not path.isprintable() or path != path.strip():
        raise ValueError(f"{path[:80]!r} begins or ends with a space, or holds a control character. Remove it")
    if len(path) > LONGEST_PATH:
        raise ValueError(
            f"is a path of {len(path):,} characters, and a system has at most {LONGEST_PATH:,}. Shorten it"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(
            f"`{user}` stands for the home folder of a user whom this machine does not know. Write the folder out"
        )
    return expanded


PathText = Annotated[str, AfterValidator(path_text)]
"""Names a file or folder, or something else that is looked up like one: an asset, a hub name, a function's import path."""


def is_host(name: str | None) -> bool:
    """Whether a host can have this name: it is of parts of 1 to 63 characters between dots, 253 in all. No other name can be resolved."""
    return name is not None and len(name) <= 253 and all(0 < len(part) < 64 for part in name.rstrip(".").split("."))


class Section(BaseModel):
    """A section of the configuration. Frozen: settings are decided once, when the file is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


def section_class(tree: type[Section], name: str) -> type[Section]:
    """The class of a section inside another."""
    kind = tree.model_fields[name].annotation
    assert isinstance(kind, type) and issubclass(kind, Section)
    return kind
