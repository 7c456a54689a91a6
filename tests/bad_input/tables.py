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
        every: also those that the tests leave out, for time.
    """
    return chain(_of((*CONFIGURATION, *INPUTS), every), called_cases())


def called_cases() -> Iterator[Case]:
    """Cases that start a process each, for code that may not end."""
    return chain(modules.calls(), models.calls())


def _of(tables: Sequence[ModuleType], every: bool = False) -> Iterator[Case]:
    again = 0
    for case in chain.from_iterable(table.cases(every) for table in tables):
        again += case.again
        if every or not case.again or again % 3 == 0:
            yield case


def by_group(tables: Sequence[ModuleType]) -> dict[str, list[Case]]:
    """The cases of these tables by what they are about: their names without the last part."""
    groups: dict[str, list[Case]] = {}
    for case in _of(tables):
        groups.setdefault(case.name.rpartition("/")[0], []).append(case)
    return groups
