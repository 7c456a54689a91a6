"""What `docs/coming_from.md` says our settings are called is there: its fields exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf.config.reference import page

DOCS = Path(__file__).parents[1] / "docs"


def known_fields() -> set[str]:
    """`section.field` of each row of the reference, which is generated from the settings."""
    found, section = set(), ""
    for line in page().splitlines():
        if heading := re.match(r"##+ `([a-z.]+)`", line):
            section = heading[1]
        elif row := re.match(r"\| `([a-z_.]+)` \|", line):
            found.add(f"{section}.{row[1]}")
    return found


def ours() -> list[str]:
    """The last cell of each row of the page's tables, which is about this project."""
    rows = [line for line in (DOCS / "coming_from.md").read_text().splitlines() if line.startswith("| ")]
    return [row.rstrip(" |").rpartition(" | ")[2] for row in rows]


@pytest.fixture(scope="module")
def named() -> set[str]:
    return {name for cell in ours() for name in re.findall(r"`([a-z]+\.[a-z_.]+)(?:: [^`]*)?`", cell)}


def test_every_field_that_is_named_exists(named: set[str]) -> None:
    assert len(named) > 50
    assert sorted(named - known_fields()) == []
