"""All cases of the walk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from types import ModuleType

from tests.bad_input import checkpoints, commands, models, modules, rows, schema, texts
from tests.bad_input.walk import Case

CONFIGURATION = (schema, texts)
INPUTS = (commands, rows, models, modules, checkpoints)


def all_cases(every: bool = False) -> Iterator[Case]:
    """All cases, in a fixed order.

    Args:
        every: also those of the schema and of the commands that the tests leave out.
    """
    return chain.from_iterable(table.cases(every) for table in (*CONFIGURATION, *INPUTS))


def by_group(tables: Sequence[ModuleType]) -> dict[str, list[Case]]:
    """The cases of these tables by what they are about: their names without the last part."""
    groups: dict[str, list[Case]] = {}
    for case in chain.from_iterable(table.cases() for table in tables):
        groups.setdefault(case.name.rpartition("/")[0], []).append(case)
    return groups
